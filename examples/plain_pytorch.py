"""The kernels in a trainer of plain PyTorch: all of PPO on a Hugging Face model.

    python examples/plain_pytorch.py

The toy reward: does the response begin with a letter from A to M? Nothing of `ppo_engine` trains
here, and logits of [batch, tokens, vocabulary] are never made.
"""

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_kernels import kl_shaped_gae, linear_logprobs, linear_ppo_loss, ppo_value_loss

PROMPT, RESPONSES, MINI_BATCH, NEW_TOKENS = "Write one sentence about rain.", 16, 8, 16


def early(text):
    """Whether the first letter stands in the first half of the alphabet."""
    return float("a" <= text.lstrip()[:1].lower() <= "m")


def main(rate=2e-4):
    options = common.options(__doc__)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2)
    )
    policy.eval()  # no dropout: the ratio of PPO begins at 1
    for model in (policy, reference):
        model.requires_grad_(False)
    trained = policy.base_model.layers[-8:].requires_grad_(True)  # as much as a laptop likes
    value_head = torch.nn.Linear(policy.config.hidden_size, 1)
    torch.nn.init.zeros_(value_head.weight)
    parameters = [*trained.parameters(), *value_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    width = prompt["input_ids"].shape[1]

    def hidden_of(model, ids, attention_mask):
        """The state that predicts each response token: [B, T, H].

        The shift: the state at a token predicts the next one. Response token t stands at position
        width + t, so that the state which predicts it is that of position width + t - 1.
        """
        states = model.base_model(ids, attention_mask=attention_mask).last_hidden_state
        return states[:, width - 1 : -1]

    for step in range(1, (2 if options.smoke else 15) + 1):
        # 1 the policy writes; the mask has its tokens up to the first EOS, that one included
        ids = policy.generate(
            **prompt, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS,
            num_return_sequences=RESPONSES, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        tokens = ids[:, width:]
        ended = (tokens == tokenizer.eos_token_id).long().cumsum(1)
        mask = ended - (tokens == tokenizer.eos_token_id).long() == 0
        attention_mask = torch.cat((torch.ones_like(ids[:, :width], dtype=torch.bool), mask), 1)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)

        # 2 scores, 3 KL to the reference, values, advantages
        scores = torch.tensor([early(text) for text in texts])
        weight = policy.get_output_embeddings().weight
        with torch.no_grad():
            hidden = hidden_of(policy, ids, attention_mask)
            old_values = value_head(hidden).squeeze(-1)
            old_logprobs = linear_logprobs(hidden, weight, tokens)
            ref_logprobs = linear_logprobs(
                hidden_of(reference, ids, attention_mask),
                reference.get_output_embeddings().weight,
                tokens,
            )
        shaped = kl_shaped_gae(
            scores, old_logprobs, ref_logprobs, old_values, kl_coef=0.01, mask=mask
        )

        # 4 the policy's loss and the critic's, a mini-batch at a time
        for rows in torch.randperm(RESPONSES).split(MINI_BATCH):
            hidden = hidden_of(policy, ids[rows], attention_mask[rows])
            policy_loss, stats = linear_ppo_loss(
                hidden, weight, tokens[rows], old_logprobs[rows], shaped.advantages[rows],
                mask=mask[rows], moments=shaped.moments,
            )  # fmt: skip
            values = value_head(hidden.detach()).squeeze(-1)
            value_loss, _ = ppo_value_loss(
                values, old_values[rows], shaped.returns[rows], mask=mask[rows]
            )
            optimizer.zero_grad()
            (policy_loss + value_loss).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        print(
            f"step {step:2}: A to M {float(scores.mean()):.0%}, "
            f"KL {float(shaped.kl.mean()):.2f}, clipped {float(stats.clip_fraction):.0%}"
        )


if __name__ == "__main__":
    main()
