// A token of each row of logits z, drawn by the inverse of the distribution function, and its
// log-prob: with a number u in [0, 1), the first token y, in the order of the vocabulary, with
//
//   sum_{j <= y} w_j > u W,  w_j = e^{(z_j - M) / T},  W = sum w_j
//   log p_y = (z_y - M) / T - log W
//
// One pass over the row, in blocks, sums the weights up to the end of each block; only the block in
// which they pass u W is read again.
//
// With top-k or top-p the lowest logit that is kept has to be found. A part of the row says how low
// it may be; the logits from there on, few, are listed in a second pass, without exponentials, and
// the search is among these. Where they turn out not to be enough, all that might be kept are.
#include "select.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kBlocks = 256;  // of a row, at most
// Of every so many vectors of a long row one is looked at, to guess what is kept.
constexpr int64_t kStride = 16, kLongRow = 8192;

// A block's end: the weights up to here, for M = shift.
struct BlockEnd {
  double shift, sum;
};

struct Found {
  int64_t place;
  double total;
};

// The first of n numbers, in their order, with which the sum of weights exceeds `share` of its
// total; if rounding keeps it below, the last that has a weight.
template <class T, class Weigh, class A = Accumulator<T>>
Found find(const T* z, int64_t n, double share, const Weigh& weigh) {
  const auto weights = [&](int64_t i) {
    if (i + kLanes<A> <= n) return weigh(load(z + i));
    Vec<A> x = splat(-kInfinity<A>);
    for (int64_t k = i; k < n; ++k) x[k - i] = widen(z[k]);
    return weigh(x);
  };
  // Sums of parts first: only one has to be added up number by number.
  constexpr int64_t most = 256, least_size = 64;
  const int64_t even = ((n + most - 1) / most + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  const int64_t size = even > least_size ? even : least_size;
  double ends[most];
  double total = 0;
  int64_t parts = 0, last = 0;
  for (int64_t begin = 0; begin < n; begin += size, ++parts) {
    Total<A> part;
    const int64_t end = begin + size < n ? begin + size : n;
    for (int64_t i = begin; i < end; i += kLanes<A>) part.add(weights(i));
    if (part.sum() > 0) last = parts;
    ends[parts] = total += part.sum();
  }
  const double goal = share * total;
  int64_t part = 0;
  while (part < last && !(ends[part] > goal)) ++part;

  double running = part > 0 ? ends[part - 1] : 0;
  int64_t place = part * size;
  for (int64_t i = part * size; i < (part + 1) * size && i < n; i += kLanes<A>) {
    const Vec<A> w = weights(i);
    for (int k = 0; k < kLanes<A>; ++k) {
      if (w[k] == 0) continue;
      running += w[k];
      place = i + k;
      if (running > goal) return {place, total};
    }
  }
  return {place, total};
}

// The first word of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), as a multiple
// of 2^-32 in [0, 1).
double uniform_number(uint64_t seed, uint64_t counter) {
  uint32_t a = uint32_t(counter), b = uint32_t(counter >> 32), c = 0, d = 0;
  uint32_t key_a = uint32_t(seed), key_b = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t of_a = uint64_t(a) * 0xD2511F53u, of_c = uint64_t(c) * 0xCD9E8D57u;
    a = uint32_t(of_c >> 32) ^ b ^ key_a;
    b = uint32_t(of_c);
    c = uint32_t(of_a >> 32) ^ d ^ key_b;
    d = uint32_t(of_a);
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
  return a * 0x1p-32;
}

// A row, and what one pass over it says.
template <class T>
class Sampler {
  using A = Accumulator<T>;

 public:
  Sampler(const SampleArgs& args, const T* z) : args_(args), z_(z), vocab_(args.logits.vocab) {
    const int64_t blocks = (vocab_ + kBlock - 1) / kBlock;
    size_ = (blocks + kBlocks - 1) / kBlocks * kBlock;
    OnlineSums<T, false, false> sums(args.temperature, kInfinity<double>,
                                     {-kInfinity<double>, 0, 0, 0});
    for (int64_t b = 0; b * size_ < vocab_; ++b) {
      sums.add_all(z, b * size_, block_end(b));
      ends_[b] = {sums.shift, sums.sum()};
    }
    shift_ = sums.shift;
    weight_ = sums.sum();
  }

  // NaN or infinity among the logits, or nothing but -inf: nothing can be drawn.
  bool is_distribution() const { return weight_ > 0 && weight_ < kInfinity<double>; }

  int64_t draw(double u) const {
    const double goal = u * weight_;
    double begin = 0, end = 0;
    int64_t b = 0;
    for (;; ++b) {
      end = ends_[b].sum;
      if (ends_[b].shift != shift_) {
        end *= std::exp2((ends_[b].shift - shift_) * kLog2E / args_.temperature);
      }
      if (end > goal || block_end(b) == vocab_) break;
      begin = end;
    }
    // Of the block's own weight, so that no rounding of sums can leave the goal beyond its end.
    const double share = (goal - begin) / (end - begin);
    const int64_t first = b * size_, n = block_end(b) - first;
    const Weights<A> weigh(args_.temperature, A(ends_[b].shift));
    return first + find(z_ + first, n, share, weigh).place;
  }

  // The same of what top-k and top-p leave. Each list has room for a row.
  int64_t draw_of_kept(double u, A* list, A* scratch) {
    const Weights<A> weigh(args_.temperature, A(shift_));
    A lowest = -kInfinity<A>;
    if (args_.top_k > 0) {
      // A fair share of them in a part of the row, and four standard deviations more.
      const double k = double(args_.top_k), fair = k / kStride;
      const auto enough = [&](double) { return fair + 4 * std::sqrt(fair) + 4; };
      lowest = lowest_kept(lowest, k, enough, Ones<A>(), list, scratch);
      weight_ = sum_of(list, counted_, from(lowest, weigh));
    }
    if (args_.top_p < 1) {
      // The logits that are not kept weigh little each, so that a part of them tells of all.
      const double rest = (1 - args_.top_p) * weight_ / kStride;
      const auto enough = [&](double of_part) { return of_part - 0.8 * rest; };
      const A bound = never_needed();
      lowest = lowest_kept(bound > lowest ? bound : lowest, args_.top_p * weight_, enough, weigh,
                           list, scratch);
    }
    const Found found = find(list, counted_, u, from(lowest, weigh));
    weight_ = found.total;
    int64_t b = 0;
    while (counts_[b] <= found.place) ++b;
    int64_t before = found.place - (b > 0 ? counts_[b - 1] : 0), token = b * size_;
    for (;; ++token) {
      if (widen(z_[token]) >= listed_ && before-- == 0) return token;
    }
  }

  double logprob(int64_t token) const {
    const double log_p = (widen(z_[token]) - shift_) / args_.temperature - std::log(weight_);
    return log_p < 0 ? log_p : 0;
  }

 private:
  int64_t block_end(int64_t b) const { return (b + 1) * size_ < vocab_ ? (b + 1) * size_ : vocab_; }

  // A logit such that all V together, were each below it, would not have 1 - p of the weight: top-p
  // never needs them. Far enough below for any rounding.
  A never_needed() const {
    const double weight = (1 - args_.top_p) * weight_ / double(vocab_);
    const double z = shift_ + (std::log(weight) - 0.01) * args_.temperature;
    const double eps = sizeof(A) == 8 ? 0x1p-52 : 0x1p-23;
    return A(z - 4 * eps * (std::fabs(z) + std::fabs(shift_)));
  }

  // The largest logit that with all above it weighs `least`, as all from `bound` on do. `enough`
  // says what to keep of a part of the row that weighs so much.
  template <class Enough, class Weigh>
  A lowest_kept(A bound, double least, const Enough& enough, const Weigh& weigh, A* list,
                A* scratch) {
    A guess = bound;
    if (vocab_ >= kLongRow) {
      const int64_t n = gather(z_, vocab_, bound, scratch, kStride);
      if (n > 0) {
        guess = lowest_of(scratch, n, enough(sum_of(scratch, n, from(bound, weigh))), weigh);
      }
    }
    list_from(guess, list);
    if (guess > bound && sum_of(list, counted_, from(guess, weigh)) < least) list_from(bound, list);
    gather(list, counted_, listed_, scratch);
    return lowest_of(scratch, counted_, least, weigh);
  }

  // All logits from `bound` on, in their order, and how many up to the end of each block.
  void list_from(A bound, A* list) {
    listed_ = bound;
    counted_ = 0;
    for (int64_t b = 0; b * size_ < vocab_; ++b) {
      const int64_t first = b * size_;
      counted_ += gather(z_ + first, block_end(b) - first, bound, list + counted_);
      counts_[b] = counted_;
    }
  }

  const SampleArgs& args_;
  const T* z_;
  const int64_t vocab_;
  int64_t size_;  // of a block
  double shift_, weight_;
  BlockEnd ends_[kBlocks];
  A listed_ = 0;
  int64_t counted_ = 0, counts_[kBlocks];
};

template <class T>
void sample_rows(const SampleArgs& args) {
  using A = Accumulator<T>;
  parallel_for(args.tasks, args.threads, [&](int64_t task) {
    A* list = static_cast<A*>(args.lists);
    const int64_t room = args.logits.vocab + kListRoom;
    if (list != nullptr) list += 2 * task * room;
    for (int64_t i = task; i < args.count; i += args.tasks) {
      const int64_t counter = args.offsets ? args.offsets[i] : args.offset + i;
      const double u = uniform_number(args.seed, uint64_t(counter));
      Sampler<T> sampler(args, logits_row<const T>(args.logits, i));
      const bool possible = sampler.is_distribution();
      int64_t token = 0;
      if (possible) token = list ? sampler.draw_of_kept(u, list, list + room) : sampler.draw(u);
      args.tokens[i] = token;
      static_cast<A*>(args.logprobs)[i] = A(possible ? sampler.logprob(token) : __builtin_nan(""));
    }
  });
}

}  // namespace

void sample(const SampleArgs& args) {
  with_dtype(args.logits.dtype, [&](auto zero) { sample_rows<decltype(zero)>(args); });
}

}  // namespace ppo::PPO_ISA
