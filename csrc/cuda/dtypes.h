// Storage dtypes as the kernels read them, on the GPU and (for the tests) on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PPO_BOTH __host__ __device__
#else
#define PPO_BOTH
#endif

namespace ppo::cuda {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

PPO_BOTH inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

PPO_BOTH inline double widen(double x) { return x; }
PPO_BOTH inline float widen(float x) { return x; }
PPO_BOTH inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
// Shifted into place, the exponent is 112 too small; the multiplication, exact, also makes the
// subnormals right. Inf and NaN need all exponent bits set.
PPO_BOTH inline float widen(f16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float finite = float_of(magnitude) * 0x1p112f;
  const float found = magnitude >= 0x0f800000u ? float_of(magnitude | 0x7f800000u) : finite;
  return sign ? -found : found;
}

}  // namespace ppo::cuda
