// The table of entry points, compiled once per instruction set like the kernels themselves.
#include "ops.h"

namespace ppo::PPO_ISA {

void gae(const GaeArgs&);
void token_logprobs(const LogprobForward&);
void token_logprobs_backward(const LogprobBackward&);
void ppo_policy_loss(const PolicyLossArgs&);
void ppo_value_loss(const ValueLossArgs&);
void pairwise_loss(const PairwiseLossArgs&);
void ranking_loss(const RankingLossArgs&);
void sample(const SampleArgs&);
void decode_attention(const DecodeAttention&);
void adamw(const AdamWArgs&);
void rms_norm(const RmsNorm&);
void rms_norm_backward(const RmsNorm&);
void rotary_embedding(const RotaryEmbedding&);
void swiglu(const SwiGLU&);
void swiglu_backward(const SwiGLU&);
void pack_weight(const PackWeight&);
void packed_linear(const PackedLinear&);

extern const Kernels kernels;
const Kernels kernels = {gae,
                         token_logprobs,
                         token_logprobs_backward,
                         ppo_policy_loss,
                         ppo_value_loss,
                         pairwise_loss,
                         ranking_loss,
                         sample,
                         decode_attention,
                         adamw,
                         rms_norm,
                         rms_norm_backward,
                         rotary_embedding,
                         swiglu,
                         swiglu_backward,
                         pack_weight,
                         packed_linear};

}  // namespace ppo::PPO_ISA
