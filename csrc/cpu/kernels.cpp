// The table of entry points, compiled once per instruction set like the kernels themselves.
#include "ops.h"

namespace ppo::PPO_ISA {

void gae(const GaeArgs&);
void token_logprobs(const LogprobForward&);
void token_logprobs_backward(const LogprobBackward&);

extern const Kernels kernels;
const Kernels kernels = {gae, token_logprobs, token_logprobs_backward};

}  // namespace ppo::PPO_ISA
