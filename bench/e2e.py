"""One PPO step, ours against TRL's: `python bench/e2e.py --device cpu`; see --help.

The same models, prompts, batch, response length, epochs and dtype; each side in processes of its
own, in turn (ours, TRL, ours, TRL, …). The first step of each process is warm-up. Printed: the
median seconds of each phase, response tokens per second, peak memory, the floor (`e2e_floor.py`
has the formula), and what is the same on both sides and what is not.

TRL 1.12.0 is the last release with a PPO trainer: its owner deleted it in September 2026. Nothing
is downloaded. `bench/e2e_grpo.py` has GRPO, against a TRL that has it.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.e2e_floor import Pass, Shape, passes, shared_base_passes
from bench.e2e_models import ADAPTED_LAYERS, Sizes
from bench.e2e_run import Contest, main
from bench.e2e_worker import Work


def _passes(shape: Shape, work: Work) -> dict[str, list[Pass]]:
    lengths = [len(ids) for ids in work.prompt_ids]
    if work.share_base:
        return shared_base_passes(shape, ADAPTED_LAYERS, lengths, work.new_tokens, work.epochs)
    return passes(shape, lengths, work.new_tokens, work.epochs)


def _same(work: Work) -> list[str]:
    count, prompt_tokens = len(work.prompts), sum(map(len, work.prompt_ids))
    return [
        "Policy, reference, reward model and critic: one architecture; the critic starts from the "
        "reward model."
        + " The same files; every weight of policy and critic is trained."
        * (not work.share_base),
        f"{count} prompts, {prompt_tokens} tokens; every response {work.new_tokens} tokens, "
        "whatever is sampled: temperature 1, no top-k, no top-p, all prompts in one batch.",
        f"{work.epochs} epochs of one mini-batch of {count}, so {work.epochs} optimizer steps.",
        "Fused AdamW, learning rate 1e-6, policy and value clip 0.2, gamma 1, lambda 0.95, KL "
        "coefficient 0.05; PyTorch attention, no dropout, no gradient checkpointing.",
    ]


def _different(work: Work) -> list[tuple[str, str, str]]:
    count = len(work.prompts)
    rows = [
        (
            "log-probs before the update",
            "the sampler's where they agree with a pass's to 0.02 nats (in fp32), else that pass",
            "from the sampler's logits, which are kept for every token; no pass",
        ),
        (
            "passes of the update",
            "packed, by tokens, without padding",
            f"{work.micro_batch} sequences, padded",
        ),
        (
            "logits of policy and reference",
            "none; log-probs from hidden states, of response tokens only",
            "of prompt and response tokens",
        ),
        (
            "passes without gradients",
            "likewise, all but the last token",
            f"{count} at once (the setting that also sets the sampling batch), every token",
        ),
        (
            "hidden states",
            "the last layer's",
            "those of every layer are kept until the pass is over",
        ),
        (
            "policy and critic",
            "one backward pass and one optimizer step each, one after the other",
            "one backward pass over the sum of both losses, one optimizer over both",
        ),
        (
            "gradient clipping",
            "to a norm of 1, for each model",
            "none: max_grad_norm is not read",
        ),
        (
            "entropy in the update",
            "in the same pass over the logits as the log-probs",
            "by a softmax over the logits of its own, after each micro-batch",
        ),
        (
            "GAE and rewards",
            "one kernel",
            "a Python loop over tokens",
        ),
        ("responses", "decoded to text", "left as tokens"),
        ("memory that is freed", "kept for the next tensor, as ppo-engine does", "as torch has it"),
    ]
    if work.share_base:
        rows.insert(
            0,
            (
                "what is trained",
                "adapters in the last layers of one base; the layers below are run once",
                "every weight of policy and critic",
            ),
        )
    if work.dtype == "bfloat16":
        rows.insert(
            0,
            (
                "weights, gradients, Adam states",
                "bf16, with the rest of an fp32 master; Adam states fp32",
                "bf16: its sampling does not use mixed precision",
            ),
        )
    return rows


PPO = Contest(
    what="PPO",
    command="bench/e2e.py",
    trl="1.12.0",
    why="the last release with PPO",
    scripts={"ours": "e2e_ours.py", "TRL": "e2e_trl.py"},
    sizes={
        "cpu": Sizes(prompts=16, new_tokens=32),
        "cuda": Sizes(prompts=64, new_tokens=128),
    },
    trained=2,
    frozen=2,
    passes=_passes,
    same=_same,
    different=_different,
)

if __name__ == "__main__":
    sys.exit(main(PPO, "Time one PPO step, ours against TRL's, each in processes of its own."))
