"""One GRPO step, ours against TRL's: `python bench/e2e_grpo.py --trl PYTHON`; see --help.

As `bench/e2e.py` is for PPO. The TRL is one that lives, in an environment of its own:

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch
    python bench/e2e_grpo.py --device cpu --dtype bf16 --trl trl/bin/python

Rewards come from a function that takes no time. Nothing is downloaded while it measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.e2e_floor import Pass, Shape, grpo_passes
from bench.e2e_models import Sizes
from bench.e2e_run import Contest, main
from bench.e2e_worker import GRPO_KL_COEF, Work


def _passes(shape: Shape, work: Work) -> dict[str, list[Pass]]:
    lengths = [len(ids) for ids in work.prompt_ids]
    return grpo_passes(shape, lengths, work.group, work.new_tokens, work.epochs)


def _same(work: Work) -> list[str]:
    count, prompt_tokens = len(work.prompts), sum(map(len, work.prompt_ids))
    return [
        "Policy and reference: the same files. Every weight of the policy is trained.",
        f"{count} prompts, {prompt_tokens} tokens; {work.group} responses to each, of "
        f"{work.new_tokens} tokens, whatever is sampled: temperature 1, no top-k, no top-p.",
        f"{work.epochs} epoch of one mini-batch of {work.responses}, so one optimizer step; the "
        "mean of each response's mean loss.",
        "AdamW, learning rate 1e-6, gradients clipped to a norm of 1, ratios to 0.2; advantages "
        f"divided by their group's deviation; k3 with {GRPO_KL_COEF} in the loss; PyTorch "
        "attention, no dropout, no gradient checkpointing.",
    ]


def _different(work: Work) -> list[tuple[str, str, str]]:
    rows = [
        (
            "prompts of a group",
            "read once, their keys and values shared",
            "read for every response",
        ),
        (
            "passes with gradients",
            "packed, by tokens, without padding",
            f"{work.micro_batch} sequences, padded",
        ),
        (
            "log-probs before the update",
            "the sampler's where they agree with a pass's to 0.02 nats (in fp32), else the "
            "update's own",
            "none: the ratio of the only epoch is 1",
        ),
        (
            "log-probs of policy and reference",
            "from hidden states, of response tokens only",
            "likewise, by parts of the vocabulary, which the backward pass multiplies again; on a "
            "CPU of prompts too",
        ),
        ("memory that is freed", "kept for the next tensor, as ppo-engine does", "as torch has it"),
    ]
    if work.dtype == "bfloat16":
        rows.insert(
            0,
            (
                "weights, gradients, Adam states",
                "bf16, with the rest of an fp32 master; Adam states fp32",
                "bf16",
            ),
        )
    return rows


GRPO = Contest(
    what="GRPO",
    command="bench/e2e_grpo.py",
    trl="1.16.0",
    why="the newest when this was written",
    scripts={"ours": "e2e_grpo_ours.py", "TRL": "e2e_grpo_trl.py"},
    sizes={
        "cpu": Sizes(prompts=2, group=8, new_tokens=32, epochs=1),
        "cuda": Sizes(prompts=8, group=8, new_tokens=128, epochs=1),
    },
    trained=1,
    frozen=1,
    passes=_passes,
    same=_same,
    different=_different,
)

if __name__ == "__main__":
    sys.exit(main(GRPO, "Time one GRPO step, ours against TRL's, each in processes of its own."))
