"""One process of `bench/growth.py`: a step by `PPOEngine` on responses of given lengths.

The responses are random tokens, so their old log-probs are those of a pass, not the sampler's. Two
steps, then two rollouts of as many tokens; the first of each is warm-up.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.e2e_ours import config_of
from bench.e2e_worker import PhaseClock, Work, report_step
from ppo_engine import PPOEngine, Rollout
from ppo_engine.memory import keep_freed_memory
from ppo_engine.models.token_rows import pad_left

STEPS = 4  # reports of a process


@dataclass(frozen=True, kw_only=True)
class Growth(Work):
    """A step on a response to each prompt; `new_tokens` is the longest that one may be."""

    lengths: list[int]  # of the responses
    pass_tokens: int  # of a forward pass, at most


def main(work: Growth) -> None:
    keep_freed_memory()  # as `ppo-engine` does
    config = config_of(work)
    engine = PPOEngine(
        config=replace(config, ppo=replace(config.ppo, micro_batch_tokens=work.pass_tokens))
    )
    engine.policy.renderer.end_ids = []  # so that what is sampled has all its tokens
    clock = PhaseClock(engine.device)
    rollout = random_rollout(engine, work)
    for part in (rollout.select(torch.arange(warm_up(work), device=engine.device)), rollout):
        clock.start("score")
        scores = engine.score(part)
        clock.switch("advantages")
        experience = engine.estimate_advantages(part, scores)
        clock.switch("update")
        engine.update(experience)
        _report(clock, part)
    whole = work.prompts[: max(1, sum(work.lengths) // work.new_tokens)]
    for _ in range(2):
        clock.start("generate")
        written = engine.generate(whole)
        _report(clock, written)


def _report(clock: PhaseClock, rollout: Rollout) -> None:
    report_step(
        clock,
        prompt_tokens=int(rollout.prompt_mask.sum()),
        response_tokens=int(rollout.mask.sum()),
    )


def warm_up(work: Growth) -> int:
    """How many responses fill a pass: then the memory that a pass takes is there."""
    before_last = [*accumulate(work.lengths)][:-1]
    return 1 + sum(tokens < work.pass_tokens for tokens in before_last)


def random_rollout(engine: PPOEngine, work: Growth) -> Rollout:
    """What the policy could have written: responses of random words, of the lengths given."""
    device, tokenizer = engine.device, engine.policy.tokenizer
    prompt_ids, prompt_mask = pad_left(work.prompt_ids, tokenizer.pad_token_id)
    special = set(tokenizer.all_special_ids)
    words = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    draw = random.Random(0)
    responses = [draw.choices(words, k=length) for length in work.lengths]
    width = max(work.lengths)
    padded = [[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in responses]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in responses]
    texts = zip(work.prompts, work.prompt_ids, responses, strict=True)
    return Rollout(
        prompt_ids=torch.tensor(prompt_ids, device=device),
        prompt_mask=torch.tensor(prompt_mask, device=device),
        response_ids=torch.tensor(padded, device=device),
        mask=torch.tensor(mask, device=device),
        finished=torch.zeros(len(mask), dtype=torch.bool, device=device),
        prompts=work.prompts,
        responses=[engine.policy.renderer.said(*text) for text in texts],
    )


if __name__ == "__main__":
    main(Growth.load(sys.argv[1]))
