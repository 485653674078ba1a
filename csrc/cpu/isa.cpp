#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace ppo {

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

namespace {

std::vector<Isa> detect() {
  std::vector<Isa> isas = {{"baseline", &baseline::kernels}};
  // The compiler's builtins also ask the operating system whether it saves the wide registers.
#ifdef PPO_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back({"avx2", &avx2::kernels});
  }
#endif
#ifdef PPO_WITH_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back({"avx512", &avx512::kernels});
  }
#endif
  return isas;
}

const Isa& choose() {
  const auto& isas = supported_isas();
  const char* wanted = std::getenv("PPO_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string names;
  for (const Isa& isa : isas) {
    if (isa.name == wanted) return isa;
    names += (names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("PPO_KERNELS_ISA is '" + std::string(wanted) +
                              "', but this machine and build have: " + names);
}

}  // namespace

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace ppo
