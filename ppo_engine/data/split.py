"""Training and held-out examples: no prompt is in both."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TypeVar

from ppo_engine.errors import UserError
from ppo_engine.text.prompt import HasPrompt

Example = TypeVar("Example", bound=HasPrompt)


def prompt_groups(examples: Sequence[HasPrompt]) -> list[list[int]]:
    """The indices of each prompt's examples; one without a prompt is a group of its own."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        key = json.dumps(example.prompt) if example.prompt else f"no prompt {index}"
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def overlap(training: Sequence[HasPrompt], held_out: Sequence[HasPrompt], name: str) -> list[str]:
    """A warning where prompts of a file that is held out are trained on; `name` is its setting."""
    trained_on, asked = (
        {json.dumps(example.prompt) for example in examples if example.prompt}
        for examples in (training, held_out)
    )
    shared = len(trained_on & asked)
    return [
        f"{shared} of the {len(asked)} prompts of {name} are also in the training data: metrics on "
        "these are not held-out metrics."
    ] * bool(shared)


def split_by_prompt(
    examples: Sequence[Example], fraction: float, seed: int, name: str = "examples"
) -> tuple[list[Example], list[Example]]:
    """`(training, held out)`, about `fraction` of the examples held out, by prompt and repeatably.

    Examples of one prompt are never on both sides, which would inflate held-out metrics. Of whole
    texts the prompt is only a guess (`preferences.Ranking.prompt_given`).
    """
    if fraction == 0:
        return list(examples), []
    groups = prompt_groups(examples)
    random.Random(seed).shuffle(groups)
    target = max(1, round(fraction * len(examples)))
    held_out: set[int] = set()
    for group in groups:
        if len(held_out) + len(group) <= target:
            held_out.update(group)
    if not held_out:
        smallest = min(groups, key=len)
        held_out.update(smallest)
    if len(held_out) == len(examples):
        raise UserError(
            f"{len(examples)} {name} over {len(groups)} prompts are too few for a held-out set: "
            "give more data, data.eval_path, or data.eval_fraction=0."
        )
    training = [example for index, example in enumerate(examples) if index not in held_out]
    return training, [examples[index] for index in sorted(held_out)]
