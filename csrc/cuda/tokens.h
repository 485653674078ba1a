// The tokens of a sequence as the threads of a GPU read them: in groups, 16 bytes at once.
#pragma once

#include "dtypes.h"
#include "gae.h"

namespace ppo::cuda {

template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Group { T x[kCount]; };

template <class T>
__device__ T* row_of(const Tokens& x, int64_t b, int64_t first) {
  return x.data == nullptr ? nullptr : static_cast<T*>(x.data) + b * x.row_stride + first;
}

// One sequence. Group g is the tokens from g kCount - shift on, so that it can be read at once.
template <class T, int kCount>
struct Sequence {
  using A = Accumulator<T>;
  const T *given, *ref_logprobs, *values;  // given: rewards, or the log-probs to make them of
  const uint8_t* mask;
  A *advantages, *returns;
  int64_t length, groups;
  int shift;
  bool wide;

  __device__ Sequence(const GaeArgs& args, int64_t b) {
    int64_t first = 0;
    length = args.rows.length;
    if (args.rows.cu_seqlens != nullptr) {
      first = args.rows.cu_seqlens[b];
      length = args.rows.cu_seqlens[b + 1] - first;
    }
    given = row_of<const T>(args.rewards.data != nullptr ? args.rewards : args.logprobs, b, first);
    ref_logprobs = row_of<const T>(args.ref_logprobs, b, first);
    values = row_of<const T>(args.values, b, first);
    mask = row_of<const uint8_t>(args.mask, b, first);
    advantages = row_of<A>(args.advantages, b, first);
    returns = row_of<A>(args.returns, b, first);
    shift = place(values);
    wide = place(given) == shift && place(advantages) == shift && place(returns) == shift &&
           (mask == nullptr || place(mask) == shift) &&
           (ref_logprobs == nullptr || place(ref_logprobs) == shift);
    groups = (length + shift + kCount - 1) / kCount;
  }

 private:
  template <class X>
  __device__ static int place(const X* x) {  // of what x points to, in its group
    return int(reinterpret_cast<uintptr_t>(x) / sizeof(X) % kCount);
  }
};

// The inputs of a group. Masked tokens are read with the others, and not used.
template <class T, int kCount>
struct Inputs {
  Group<T, kCount> given, ref_logprobs, values;
  unsigned real = 0;  // a bit for each token
  int64_t first;
  bool whole;

  __device__ Inputs(const Sequence<T, kCount>& s, int64_t group) {
    first = group * kCount - s.shift;
    whole = s.wide && first >= 0 && first + kCount <= s.length;
    if (whole) {
      read_at(s.values, values);
      read_at(s.given, given);
      if (s.ref_logprobs != nullptr) read_at(s.ref_logprobs, ref_logprobs);
      if (s.mask == nullptr) {
        real = (1u << kCount) - 1;
        return;
      }
      Group<uint8_t, kCount> mask;
      read_at(s.mask, mask);
#pragma unroll
      for (int i = 0; i < kCount; ++i) real |= unsigned(mask.x[i] != 0) << i;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t t = first + i;
      const bool there = group >= 0 && t >= 0 && t < s.length;
      real |= unsigned(there && (s.mask == nullptr || s.mask[t] != 0)) << i;
      values.x[i] = there ? s.values[t] : T{};
      given.x[i] = there ? s.given[t] : T{};
      if (s.ref_logprobs != nullptr) ref_logprobs.x[i] = there ? s.ref_logprobs[t] : T{};
    }
  }

  __device__ bool is_real(int i) const { return real >> i & 1; }

 private:
  template <class X>
  __device__ void read_at(const X* row, Group<X, kCount>& group) const {
    group = *reinterpret_cast<const Group<X, kCount>*>(row + first);
  }
};

}  // namespace ppo::cuda
