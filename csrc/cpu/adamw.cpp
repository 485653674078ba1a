// A step of AdamW over many tensors, in one pass over each; the formula, with its roundings, is in
// ppo_kernels/reference.py. Compiled without contraction (CMakeLists.txt), so that these are the
// roundings on every instruction set.
//
// A bf16 weight and a signed 16-bit remainder are together a float32 master weight: its bits are
// (weight << 16) + remainder, and the weight the nearest one (split_master in ppo_kernels/adamw.py).
#include "simd.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

using V = Vec<float>;
using U = Bits<float>;

// a b + c, rounded once. Without an instruction for it the C library's, which is slow and exact.
inline V fused(V a, V b, V c) {
  if constexpr (kFused) return multiply_add(a, b, c);
  V x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return x;
}

inline V root_of(V x) {
#if defined(__AVX512F__)
  const __mmask16 all = 0xffff;  // without a mask, GCC 12 warns of its own header
  return _mm512_maskz_sqrt_ps(all, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// kLanes master weights at element i, and back.
inline V load_master(const float* weights, const uint16_t*, int64_t i) { return load(weights + i); }
inline void store_master(float* weights, uint16_t*, int64_t i, V master) {
  store(weights + i, master);
}
inline V load_master(const bf16* weights, const uint16_t* remainder, int64_t i) {
  const U low = (load_halves(remainder + i) ^ 0x8000u) - 0x8000u;  // with its sign
  return bit_cast<V>((load_halves(weights + i) << 16) + low);
}
inline void store_master(bf16* weights, uint16_t* remainder, int64_t i, V master) {
  const U bits = bit_cast<U>(master);
  const U high = (bits + 0x8000u) >> 16;
  const U low = bits - (high << 16);
  const U nan = U{} + 0x7fc0u;
  store_halves(weights + i, master == master ? high : nan);
  store_halves(remainder + i, master == master ? low : U{});
}

struct Lanes {
  V master, exp_avg, exp_avg_sq;
};

inline void step(const AdamWArgs& args, V grad, Lanes& x) {
  const V g = grad * args.grad_scale;
  const V old = x.exp_avg;
  x.exp_avg = fused(splat(args.mix), g - old, args.near_mean ? old : g);
  x.exp_avg_sq = fused(args.rest * g, g, args.beta2 * x.exp_avg_sq);
  const V change = args.size * x.exp_avg / (root_of(x.exp_avg_sq) / args.root + args.eps);
  x.master = args.decay * x.master + change;
}

template <class W, class G>
inline void step_at(const AdamWArgs& args, W* weights, uint16_t* remainder, const G* grads,
                    float* exp_avg, float* exp_avg_sq, int64_t i) {
  Lanes x{load_master(weights, remainder, i), load(exp_avg + i), load(exp_avg_sq + i)};
  step(args, load(grads + i), x);
  store_master(weights, remainder, i, x.master);
  store(exp_avg + i, x.exp_avg);
  store(exp_avg_sq + i, x.exp_avg_sq);
}

template <class W, class G>
void piece(const AdamWArgs& args, const AdamWTensor& t, int64_t first, int64_t last) {
  constexpr int64_t lanes = kLanes<float>;
  W* const weights = static_cast<W*>(t.weights);
  const G* const grads = static_cast<const G*>(t.grads);
  int64_t i = first;
  for (; i + lanes <= last; i += lanes) {
    step_at(args, weights, t.remainder, grads, t.exp_avg, t.exp_avg_sq, i);
  }
  const size_t rest = size_t(last - i);
  if (rest == 0) return;
  // The last few, in whole vectors of their own.
  W weight_room[lanes]{};
  uint16_t remainder_room[lanes]{};
  G grad_room[lanes]{};
  float mean_room[lanes]{}, square_room[lanes]{};
  std::memcpy(weight_room, weights + i, rest * sizeof(W));
  if (t.remainder) std::memcpy(remainder_room, t.remainder + i, rest * sizeof(uint16_t));
  std::memcpy(grad_room, grads + i, rest * sizeof(G));
  std::memcpy(mean_room, t.exp_avg + i, rest * sizeof(float));
  std::memcpy(square_room, t.exp_avg_sq + i, rest * sizeof(float));
  step_at(args, weight_room, remainder_room, grad_room, mean_room, square_room, 0);
  std::memcpy(weights + i, weight_room, rest * sizeof(W));
  if (t.remainder) std::memcpy(t.remainder + i, remainder_room, rest * sizeof(uint16_t));
  std::memcpy(t.exp_avg + i, mean_room, rest * sizeof(float));
  std::memcpy(t.exp_avg_sq + i, square_room, rest * sizeof(float));
}

template <class W, class G>
void all_pieces(const AdamWArgs& args) {
  parallel_for(args.piece_count, args.threads, [&](int64_t i) {
    const AdamWPiece& p = args.pieces[i];
    piece<W, G>(args, args.tensors[p.tensor], p.first, p.last);
  });
}

template <class W>
void with_weights(const AdamWArgs& args) {
  switch (args.grads) {
    case DType::bf16: return all_pieces<W, bf16>(args);
    case DType::f16: return all_pieces<W, f16>(args);
    default: return all_pieces<W, float>(args);
  }
}

}  // namespace

void adamw(const AdamWArgs& args) {
  args.weights == DType::bf16 ? with_weights<bf16>(args) : with_weights<float>(args);
}

}  // namespace ppo::PPO_ISA
