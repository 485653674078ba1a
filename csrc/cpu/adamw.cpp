// A step of AdamW over many tensors, in one pass over each; the formula, with its roundings, is in
// ppo_kernels/reference/. Compiled without contraction (CMakeLists.txt), so that these are the
// roundings on every instruction set.
//
// A bf16 weight and a signed 16-bit remainder are together a float32 master weight: its bits are
// (weight << 16) + remainder, and the weight the nearest one (split_master in ppo_kernels/adamw.py).
//
// Moments in 8 bits are of blocks, whose new numbers stay in the cache until the largest is known.
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
  V root;  // of the new exp_avg_sq
};

inline void step(const AdamWArgs& args, V grad, Lanes& x) {
  const V g = grad * args.grad_scale;
  const V old = x.exp_avg;
  x.exp_avg = fused(splat(args.mix), g - old, args.near_mean ? old : g);
  x.exp_avg_sq = fused(args.rest * g, g, args.beta2 * x.exp_avg_sq);
  x.root = root_of(x.exp_avg_sq);
  const V change = args.size * x.exp_avg / (x.root / args.root + args.eps);
  x.master = args.decay * x.master + change;
}

template <class W, class G>
inline void step_at(const AdamWArgs& args, W* weights, uint16_t* remainder, const G* grads,
                    float* exp_avg, float* exp_avg_sq, int64_t i) {
  Lanes x{load_master(weights, remainder, i), load(exp_avg + i), load(exp_avg_sq + i), V{}};
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
  float* const exp_avg = static_cast<float*>(t.exp_avg);
  float* const exp_avg_sq = static_cast<float*>(t.exp_avg_sq);
  int64_t i = first;
  for (; i + lanes <= last; i += lanes) {
    step_at(args, weights, t.remainder, grads, exp_avg, exp_avg_sq, i);
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
  std::memcpy(mean_room, exp_avg + i, rest * sizeof(float));
  std::memcpy(square_room, exp_avg_sq + i, rest * sizeof(float));
  step_at(args, weight_room, remainder_room, grad_room, mean_room, square_room, 0);
  std::memcpy(weights + i, weight_room, rest * sizeof(W));
  if (t.remainder) std::memcpy(t.remainder + i, remainder_room, rest * sizeof(uint16_t));
  std::memcpy(exp_avg + i, mean_room, rest * sizeof(float));
  std::memcpy(exp_avg_sq + i, square_room, rest * sizeof(float));
}

// kLanes bytes; GCC 12 moves them one by one for __builtin_convertvector.
inline U load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __mmask16 all = 0xffff;
  return bit_cast<U>(_mm512_maskz_cvtepu8_epi32(all, load_bits<__m128i>(p)));
#elif defined(__AVX2__)
  return bit_cast<U>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_bits<VectorTypes<float>::Bytes>(p), U);
#endif
}
inline void store_bytes(uint8_t* p, U bits) {  // the lowest of each lane
#if defined(__AVX512F__)
  const __mmask16 all = 0xffff;
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(all, bit_cast<__m512i>(bits));
  std::memcpy(p, &bytes, sizeof(bytes));
#elif defined(__AVX2__)
  const __m256i lowest = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i four = _mm256_shuffle_epi8(bit_cast<__m256i>(bits), lowest);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(four),
                                      _mm256_extracti128_si256(four, 1)));
#else
  const auto bytes = __builtin_convertvector(bits, VectorTypes<float>::Bytes);
  std::memcpy(p, &bytes, sizeof(bytes));
#endif
}

// kLanes codes as numbers, of int8 or uint8; and back. A float32 in [2^23, 2^24) has its integer in
// its low bits, and adding to one rounds to the nearest, of two to the even one.
constexpr uint32_t kTwo23 = 0x4b000000;
template <bool is_signed> constexpr uint32_t kZero = is_signed ? 128 : 0;

template <bool is_signed>
inline V load_codes(const uint8_t* codes) {
  const U bits = load_bytes(codes) ^ kZero<is_signed>;
  return bit_cast<V>(bits | kTwo23) - (0x1p23f + kZero<is_signed>);
}
template <bool is_signed>
inline void store_codes(uint8_t* codes, V x) {
  store_bytes(codes, bit_cast<U>(x + (0x1p23f + kZero<is_signed>)) ^ kZero<is_signed>);
}

inline U magnitude(V x) { return bit_cast<U>(x) & 0x7fffffffu; }

// f and its inverse, of magnitudes up to 1: bits as a logarithm.
constexpr uint32_t kOne = 0x3f800000, kShift = kOne - (kOne >> 2);

inline V dequantized(V code, float most, float scale) {
  const V part = code * (1 / most);
  const U bits = magnitude(part);
  const U x = ((bits > kShift ? bits : U{} + kShift) - kShift) << 2;
  return bit_cast<V>(x | (bit_cast<U>(part) & 0x80000000u)) * scale;
}

// Of magnitudes, as bits: in their order that of the numbers, with NaN above all.
inline float scale_of(U largest) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes<float>; ++i) most = largest[i] > most ? largest[i] : most;
  const float scale = bit_cast<float>(most);
  return scale <= 0x1p126f ? scale : bit_cast<float>(0x7fc00000u);
}

inline V quantized(V x, float most, float inverse) {
  const U bits = magnitude(bit_cast<V>(magnitude(x)) * inverse);
  const U part = (bits < kOne ? bits : U{} + kOne) >> 2;  // NaN as 1
  const U negative = x < 0.0f ? U{} + 0x80000000u : U{};  // not a NaN
  return bit_cast<V>((part + kShift) | negative) * most;
}

// One block of moments in 8 bits, all kMomentBlock elements of it.
template <class W, class G>
inline void block(const AdamWArgs& args, W* weights, uint16_t* remainder, const G* grads,
                  uint8_t* means, uint8_t* roots, float& of_mean, float& of_root) {
  constexpr int64_t lanes = kLanes<float>;
  float mean_room[kMomentBlock], root_room[kMomentBlock];
  U most_mean{}, most_root{};
  for (int64_t i = 0; i < kMomentBlock; i += lanes) {
    const V root = dequantized(load_codes<false>(roots + i), 255, of_root);
    Lanes x{load_master(weights, remainder, i),
            dequantized(load_codes<true>(means + i), 127, of_mean), root * root, V{}};
    step(args, load(grads + i), x);
    store_master(weights, remainder, i, x.master);
    store(mean_room + i, x.exp_avg);
    store(root_room + i, x.root);
    const U mean_bits = magnitude(x.exp_avg), root_bits = magnitude(x.root);
    most_mean = mean_bits > most_mean ? mean_bits : most_mean;
    most_root = root_bits > most_root ? root_bits : most_root;
  }
  of_mean = scale_of(most_mean);
  of_root = scale_of(most_root);
  const float mean_inverse = of_mean >= 0x1p-126f ? 1 / of_mean : 0;
  const float root_inverse = of_root >= 0x1p-126f ? 1 / of_root : 0;
  for (int64_t i = 0; i < kMomentBlock; i += lanes) {
    store_codes<true>(means + i, quantized(load(mean_room + i), 127, mean_inverse));
    const V root = load(root_room + i);
    const V code = quantized(root, 255, root_inverse);
    store_codes<false>(roots + i, (root > 0.0f) & (code < 1.0f) ? splat(1.0f) : code);
  }
}

template <class W, class G>
void piece_of_blocks(const AdamWArgs& args, const AdamWTensor& t, int64_t first, int64_t last) {
  W* const weights = static_cast<W*>(t.weights);
  const G* const grads = static_cast<const G*>(t.grads);
  uint8_t* const means = static_cast<uint8_t*>(t.exp_avg);
  uint8_t* const roots = static_cast<uint8_t*>(t.exp_avg_sq);
  float* const of_means = t.scales;
  float* const of_roots = t.scales + (t.count + kMomentBlock - 1) / kMomentBlock;
  int64_t i = first;
  for (; i + kMomentBlock <= last; i += kMomentBlock) {
    block(args, weights + i, t.remainder ? t.remainder + i : nullptr, grads + i, means + i,
          roots + i, of_means[i / kMomentBlock], of_roots[i / kMomentBlock]);
  }
  const size_t rest = size_t(last - i);
  if (rest == 0) return;
  // The last block, with zeros after it.
  W weight_room[kMomentBlock]{};
  uint16_t remainder_room[kMomentBlock]{};
  G grad_room[kMomentBlock]{};
  uint8_t mean_room[kMomentBlock]{}, root_room[kMomentBlock]{};
  std::memcpy(weight_room, weights + i, rest * sizeof(W));
  if (t.remainder) std::memcpy(remainder_room, t.remainder + i, rest * sizeof(uint16_t));
  std::memcpy(grad_room, grads + i, rest * sizeof(G));
  std::memcpy(mean_room, means + i, rest);
  std::memcpy(root_room, roots + i, rest);
  block(args, weight_room, remainder_room, grad_room, mean_room, root_room,
        of_means[i / kMomentBlock], of_roots[i / kMomentBlock]);
  std::memcpy(weights + i, weight_room, rest * sizeof(W));
  if (t.remainder) std::memcpy(t.remainder + i, remainder_room, rest * sizeof(uint16_t));
  std::memcpy(means + i, mean_room, rest);
  std::memcpy(roots + i, root_room, rest);
}

template <class W, class G>
void all_pieces(const AdamWArgs& args) {
  const auto work = args.eight_bits ? piece_of_blocks<W, G> : piece<W, G>;
  parallel_for(args.piece_count, args.threads, [&](int64_t i) {
    const AdamWPiece& p = args.pieces[i];
    work(args, args.tensors[p.tensor], p.first, p.last);
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
