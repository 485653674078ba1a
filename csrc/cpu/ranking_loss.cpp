// The Bradley-Terry loss of rankings, with statistics and gradients, in one sweep: of all pairs of
// a prompt's responses the mean of softplus(-d), d = s_better - s_worse; of the prompts that have
// a pair, the mean again.
//
// A prompt of few responses takes one lane of a vector, beside others; of many, its responses fill
// the vectors. Either way a few tiles of responses are held, never all pairs. Sums of tiles in
// float64, over blocks of a fixed size, merged in order.
#include "log_sigmoid.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kMostAcross = 32;  // responses of a prompt that takes a lane
constexpr int64_t kRoom = 2048;      // responses of a tile of such prompts
constexpr int64_t kOwn = 64;         // responses that meet a tile of their prompt's at a time
constexpr int64_t kTerms = 64;       // pairs summed in A at a time, in double up to twice as many

// Ranks beside A: R is int32_t where A is float and that holds them all, else int64_t.
template <class A, class R> struct RankVector {
  typedef R Type __attribute__((vector_size(kLanes<A> * sizeof(R))));
};
template <class A, class R> using Ranks = typename RankVector<A, R>::Type;

template <class A, class Mask>
inline Truth<A> truth(Mask mask) {
  if constexpr (sizeof(Mask) == sizeof(Truth<A>)) return Truth<A>(mask);
  else return __builtin_convertvector(mask, Truth<A>);
}

// Some of the responses: one of each of several prompts, or several of one prompt.
struct Run {
  int64_t prompt, response, count;
  bool along_prompts;
};

template <class T>
inline Row<T> row_of(const Tokens& x, const Run& run) {
  if (x.data == nullptr) return {nullptr, 0};
  return {static_cast<T*>(x.data) + run.prompt * x.row_stride + run.response * x.stride,
          run.along_prompts ? x.row_stride : x.stride};
}

// Puts their scores and ranks one after the other. Of rank -1 are those that are absent, and what
// follows up to a whole number of vectors. False where a rank is none of R.
template <class A, class R>
using Gather = bool (*)(const RankingLossArgs& args, const Run& run, A* scores, R* ranks);

template <class T, class I, class R, class A = Accumulator<T>>
bool gather(const RankingLossArgs& args, const Run& run, A* scores, R* ranks) {
  const Row<const T> from = row_of<const T>(args.scores, run);
  const Row<const I> from_ranks = row_of<const I>(args.ranks, run);
  I beyond = 0;
  for (int64_t i = 0; i < run.count; ++i) {
    const I rank = from_ranks[i];
    beyond |= rank ^ I(R(rank));
    ranks[i] = R(rank < 0 ? -1 : rank);
    scores[i] = A(widen(from[i]));
  }
  for (int64_t i = run.count; i % kWidth<A>; ++i) {
    ranks[i] = -1;
    scores[i] = 0;
  }
  return beyond == 0;
}

// Sums over the pairs of each lane, and their number; a count is negative.
template <class A>
struct LanePairs {
  Vec<A> loss{}, difference{};
  Truth<A> pairs{}, wins{}, ties{};
  // The loss lacks log(1 + e^-|d|) of each pair: of the product of these 1 + e^-|d|, this plus 1.
  Vec<A> product{};

  // Adds a pair in each lane in which the ranks make one. Where `want_slope`, returns by how much
  // its loss rises with the second score; with the first, it falls by as much.
  template <class R>
  Vec<A> add(Vec<A> s, Ranks<A, R> rank, Vec<A> s_other, Ranks<A, R> rank_other, bool want_slope) {
    const Truth<A> pair = truth<A>((rank != rank_other) & ((rank | rank_other) >= 0));
    const Truth<A> sign = truth<A>(rank > rank_other) & bit_cast<Truth<A>>(splat(A(-0.0)));
    const Vec<A> d = flipped(s - s_other, sign);
    const Vec<A> e = where<A>(pair, exp_minus_magnitude<A>(d));
    product = multiply_add(product, e, Vec<A>(product + e));
    loss += where<A>(pair & (d < A(0)), -d);
    difference += where<A>(pair, d);
    pairs += pair;
    wins += pair & (d > A(0));
    ties += pair & (d == A(0));
    return want_slope ? flipped(where<A>(pair, sigmoid_of_minus<A>(d, e)), sign) : Vec<A>{};
  }

  void take_logarithm() {
    loss += log1p_positive<A>(product);
    product = Vec<A>{};
  }

  void add(const LanePairs& other) {
    loss += other.loss;
    difference += other.difference;
    pairs += other.pairs;
    wins += other.wins;
    ties += other.ties;
  }

 private:
  static Vec<A> flipped(Vec<A> x, Truth<A> sign) {
    return bit_cast<Vec<A>>(bit_cast<Truth<A>>(x) ^ sign);
  }
};

template <class A>
struct RankingTotals {
  Total<A> loss, ranked, pairs, wins, ties, difference;

  void add(const LanePairs<A>& x) {
    loss.add(x.loss);
    pairs.add_count(x.pairs);
    wins.add_count(x.wins);
    ties.add_count(x.ties);
    difference.add(x.difference);
  }
  RankingSums sums() const {
    return {loss.sum(), ranked.sum(), pairs.sum(), wins.sum() + ties.sum() / 2, difference.sum()};
  }
};

void add_to(RankingSums& all, const RankingSums& x) {
  all.loss += x.loss;
  all.ranked += x.ranked;
  all.pairs += x.pairs;
  all.wins += x.wins;
  all.difference += x.difference;
}

// --- A lane for each prompt ----------------------------------------------------------------------

// Response k of the prompts of some lanes is k * width from the first, and so is its gradient.
template <class A, class R>
LanePairs<A> pairs_of_lanes(const A* scores, const R* ranks, A* grads, int64_t responses,
                            int64_t width) {
  LanePairs<A> all, some;
  int64_t terms = 0;
  for (int64_t k = 0; grads && k < responses; ++k) store(grads + k * width, Vec<A>{});
  for (int64_t k = 0; k < responses; ++k) {
    const Vec<A> s = load(scores + k * width);
    const auto rank = load_bits<Ranks<A, R>>(ranks + k * width);
    Vec<A> rise{};
    for (int64_t other = k + 1; other < responses; ++other) {
      const int64_t at = other * width;
      const auto rank_other = load_bits<Ranks<A, R>>(ranks + at);
      const Vec<A> slope = some.template add<R>(s, rank, load(scores + at), rank_other, grads);
      if (grads) store(grads + at, load(grads + at) + slope);
      rise += slope;
    }
    if (grads) store(grads + k * width, load(grads + k * width) - rise);
    terms += responses - k - 1;
    if (k + 1 == responses || terms + responses > kTerms) {
      some.take_logarithm();
      all.add(some);
      some = {};
      terms = 0;
    }
  }
  return all;
}

template <class A, class R>
bool across_prompts(const RankingLossArgs& args, Gather<A, R> gather, int64_t first, int64_t last,
                    RankingSums& sums) {
  using V = Vec<A>;
  const int64_t responses = args.responses;
  const int64_t fit = kRoom / (responses > 0 ? responses : 1) / kWidth<A> * kWidth<A>;
  const int64_t width = fit < kTile ? fit : kTile;
  const V share = splat(A(1.0 / double(args.prompts)));
  A scores[kRoom], grad_room[kRoom];
  R ranks[kRoom];
  A* const grads = args.grad_scores.data ? grad_room : nullptr;
  RankingTotals<A> totals;
  for (int64_t prompt = first; prompt < last; prompt += width) {
    const int64_t n = last - prompt < width ? last - prompt : width;
    for (int64_t k = 0; k < responses; ++k) {
      if (!gather(args, {prompt, k, n, true}, scores + k * width, ranks + k * width)) return false;
    }
    LanePairs<A> of_tile;
    Truth<A> ranked{};
    for (int64_t lane = 0; lane < n; lane += kWidth<A>) {
      A* const grads_of = grads ? grads + lane : nullptr;
      LanePairs<A> some = pairs_of_lanes(scores + lane, ranks + lane, grads_of, responses, width);
      const V count = __builtin_convertvector(-some.pairs, V);
      const V each = A(1) / (count > A(1) ? count : splat(A(1)));
      for (int64_t k = 0; grads && k < responses; ++k) {
        store(grads_of + k * width, load(grads_of + k * width) * (each * share));
      }
      some.loss *= each;
      ranked += some.pairs != 0;
      of_tile.add(some);
    }
    totals.add(of_tile);
    totals.ranked.add_count(ranked);
    for (int64_t k = 0; grads && k < responses; ++k) {
      const Row<A> to = row_of<A>(args.grad_scores, {prompt, k, n, true});
      for (int64_t i = 0; i < n; ++i) to[i] = grads[k * width + i];
    }
  }
  sums = totals.sums();
  return true;
}

// --- A prompt's responses in the lanes -----------------------------------------------------------

template <class A, class R>
struct TileOfPrompt {
  int64_t begin, count;  // its responses
  A scores[kTile], rises[kTile];
  R ranks[kTile];

  // All pairs of response k, which is in this tile or before it, with those of the tile after k.
  // Returns by how much their loss falls as its score rises.
  double pair_with(int64_t k, A score, R rank, bool want_slopes, RankingTotals<A>& totals) {
    LanePairs<A> some;
    Ranks<A, R> places{};
    for (int64_t i = 0; i < kLanes<A>; ++i) places[i] = R(i);
    const int64_t next = k < begin ? 0 : k + 1 - begin;
    Vec<A> fall{};
    for (int64_t i = next / kWidth<A> * kWidth<A>; i < count; i += kWidth<A>) {
      auto rank_other = load_bits<Ranks<A, R>>(ranks + i);
      if (i < next) rank_other |= places < R(next - i);  // -1: as if absent
      const Vec<A> slope = some.template add<R>(splat(score), rank - Ranks<A, R>{},
                                                load(scores + i), rank_other, want_slopes);
      if (want_slopes) store(rises + i, load(rises + i) + slope);
      fall += slope;
    }
    some.take_logarithm();
    totals.add(some);
    return sum_lanes<A>(fall);
  }
};

template <class A, class R>
bool within_prompt(const RankingLossArgs& args, Gather<A, R> gather, int64_t prompt,
                   RankingSums& sums) {
  const int64_t responses = args.responses;
  const Row<A> grads = row_of<A>(args.grad_scores, {prompt, 0, responses, false});
  for (int64_t k = 0; grads && k < responses; ++k) grads[k] = 0;
  RankingTotals<A> totals;
  TileOfPrompt<A, R> tile;
  A own_scores[kOwn];
  R own_ranks[kOwn];
  for (tile.begin = 0; tile.begin < responses; tile.begin += kTile) {
    const int64_t rest = responses - tile.begin;
    tile.count = rest < kTile ? rest : kTile;
    const int64_t end = tile.begin + tile.count;
    const Run run{prompt, tile.begin, tile.count, false};
    if (!gather(args, run, tile.scores, tile.ranks)) return false;
    for (int64_t own = 0; own < end; own += kOwn) {
      const int64_t owns = end - own < kOwn ? end - own : kOwn;
      gather(args, {prompt, own, owns, false}, own_scores, own_ranks);
      for (int64_t i = 0; i < kTile; ++i) tile.rises[i] = 0;
      for (int64_t i = 0; i < owns; ++i) {
        if (own_ranks[i] < 0) continue;
        const double fall =
            tile.pair_with(own + i, own_scores[i], own_ranks[i], bool(grads), totals);
        if (grads) grads[own + i] -= A(fall);
      }
      for (int64_t i = 0; grads && i < tile.count; ++i) grads[tile.begin + i] += tile.rises[i];
    }
  }
  sums = totals.sums();
  const double pairs = sums.pairs > 0 ? sums.pairs : 1;
  const A weight = A(1.0 / (pairs * double(args.prompts)));
  for (int64_t k = 0; grads && k < responses; ++k) grads[k] *= weight;
  sums.loss /= pairs;
  sums.ranked = sums.pairs > 0;
  return true;
}

// --- Blocks of prompts ---------------------------------------------------------------------------

template <class A, class R>
bool prompts_of_block(const RankingLossArgs& args, Gather<A, R> gather, int64_t first, int64_t last,
                      RankingSums& sums) {
  if (args.responses <= kMostAcross) return across_prompts(args, gather, first, last, sums);
  sums = {};
  for (int64_t prompt = first; prompt < last; ++prompt) {
    RankingSums of_prompt;
    if (!within_prompt(args, gather, prompt, of_prompt)) return false;
    add_to(sums, of_prompt);
  }
  return true;
}

template <class T>
void rankings(const RankingLossArgs& args, int64_t first, int64_t last, RankingSums& sums) {
  const bool wide = args.ranks_are_int64;
  if constexpr (sizeof(Accumulator<T>) == sizeof(int32_t)) {
    const auto narrow = wide ? gather<T, int64_t, int32_t> : gather<T, int32_t, int32_t>;
    if (prompts_of_block<float, int32_t>(args, narrow, first, last, sums)) return;
    prompts_of_block<float, int64_t>(args, gather<T, int64_t, int64_t>, first, last, sums);
  } else {
    const auto exact = wide ? gather<T, int64_t, int64_t> : gather<T, int32_t, int64_t>;
    prompts_of_block<double, int64_t>(args, exact, first, last, sums);
  }
}

template <class A>
void scale_gradients(const RankingLossArgs& args, int64_t first, int64_t last, double by) {
  for (int64_t prompt = first; prompt < last; ++prompt) {
    const Row<A> grads = row_of<A>(args.grad_scores, {prompt, 0, args.responses, false});
    for (int64_t k = 0; k < args.responses; ++k) grads[k] = A(grads[k] * by);
  }
}

// body(block, its first prompt, that after its last)
template <class Body>
int64_t for_blocks(const RankingLossArgs& args, const Body& body) {
  const int64_t size = args.prompts_per_block, blocks = (args.prompts + size - 1) / size;
  parallel_for(blocks, args.threads, [&](int64_t block) {
    const int64_t end = (block + 1) * size;
    body(block, block * size, end < args.prompts ? end : args.prompts);
  });
  return blocks;
}

}  // namespace

void ranking_loss(const RankingLossArgs& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = for_blocks(args, [&](int64_t block, int64_t first, int64_t last) {
      rankings<T>(args, first, last, args.sums[block]);
    });
    RankingSums all{};
    for (int64_t block = 0; block < blocks; ++block) add_to(all, args.sums[block]);
    const double ranked = all.ranked > 0 ? all.ranked : 1, pairs = all.pairs > 0 ? all.pairs : 1;
    args.results[0] = all.loss / ranked;
    args.results[1] = all.wins / pairs;
    args.results[2] = all.difference / pairs;
    // The gradients are as if every prompt had a pair: to count them first would be a sweep more.
    if (args.grad_scores.data && all.ranked < double(args.prompts)) {
      for_blocks(args, [&](int64_t, int64_t first, int64_t last) {
        scale_gradients<Accumulator<T>>(args, first, last, double(args.prompts) / ranked);
      });
    }
  });
}

}  // namespace ppo::PPO_ISA
