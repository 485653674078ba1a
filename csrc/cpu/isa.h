// Which instruction set runs: the best that this machine has, or the one that the environment
// variable PPO_KERNELS_ISA names.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace ppo {

struct Isa {
  std::string name;
  const Kernels* kernels;
};

// Those that are in this binary and that this machine runs, best last.
const std::vector<Isa>& supported_isas();

// Throws std::invalid_argument where PPO_KERNELS_ISA names none of them.
const Isa& active_isa();

}  // namespace ppo
