"""A step as it was, in `RUN/rollouts/step-000012/`: what the policy wrote, what was measured of
every token, and what the update of that step began with. Read without torch.

rollout.safetensors    numbers of tokens and of the state; `RolloutRecord.arrays`
rollout.json           all else
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ppo_engine.messages import first_line
from ppo_engine.run.directory import atomic_folder, steps_in
from ppo_engine.sealed import Damaged, check
from ppo_engine.text.prompt import Prompt

ROLLOUTS = "rollouts"
_ARRAYS, _REST = "rollout.safetensors", "rollout.json"


@dataclass(frozen=True)
class UpdateState:
    """What an update depends on besides its batch, weights and optimizers."""

    policy_version: int  # optimizer steps that the policy had taken
    kl_coef: float
    sampled: bool  # whether `logprobs` are the sampler's
    width: int  # columns of the padded responses, which decide how sums are rounded
    pass_tokens: int  # at most, in a forward pass
    weights: dict[str, str]  # digests of the policy's and the critic's before the update
    steps: int  # of the run, as it was planned then: the schedules of learning rates
    pass_rows: int | None  # at most, in a forward pass
    device: str
    dtype: str


@dataclass(frozen=True)
class RolloutRecord:
    """B responses with N tokens in all, one response behind another in `arrays`:

    tokens [N] int64            of the responses; response i has those from cu_seqlens[i] on
    cu_seqlens [B+1] int64
    prompt_tokens [M] int64, prompt_cu_seqlens [B+1] int64      the same of the prompts
    mask [N] bool               False: written by an environment; every number of such a token is 0
    logprobs [N] float32        of the policy before the update
    ref_logprobs                of the reference, where something uses the KL to it
    sampler_logprobs            of the sampler, where they are not `logprobs`, and are known
    entropy                     of the policy, where it was measured
    values, returns             of the critic, where there is one
    advantages                  not whitened
    ratio                       policy after the update / before it (`logprobs`)
    clipped [N] bool            whether `clip_range` holds that ratio
    moments [3] float32         (count, mean, M2) of the advantages; M2 may have become infinite
    rounding [B] float32        by how much rounding alone may change a score, where it is known
    random_shuffle, random_torch uint8      states of generators before the update
    """

    step: int
    method: str  # such as "GRPO"
    prompts: list[Prompt]
    responses: list[str]
    pieces: list[list[str]]  # of each response its tokens' text, special tokens included
    special: list[int]  # ids of the special tokens among them
    score: list[float]  # the weighted sum of `rewards`
    rewards: dict[str, list[float]]  # of each reward its scores
    shaped: list[float]  # what training made of `score`
    kl: list[float]  # to the reference, the sum over a response; 0 where nothing uses it
    finished: list[bool]  # False: cut off
    group: list[int]  # responses of one number answer one prompt, and were sampled together
    clip_range: tuple[float, float]
    metrics: dict[str, float | None]  # of the update; None: not finite
    update: UpdateState
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.responses)

    def of(self, name: str, response: int) -> np.ndarray:
        """The numbers of one response's tokens."""
        bounds = self.arrays["prompt_cu_seqlens" if name == "prompt_tokens" else "cu_seqlens"]
        found: np.ndarray = self.arrays[name][bounds[response] : bounds[response + 1]]
        return found


def recorded_steps(run: Path) -> dict[int, Path]:
    """The folders of the steps that the run in this folder has recorded, the first first."""
    return steps_in(run / ROLLOUTS)


def write_record(folder: Path, record: RolloutRecord) -> None:
    """Into `folder`, whole or not at all, replacing what was there."""
    rest = {x.name: getattr(record, x.name) for x in fields(record) if x.name != "arrays"}
    rest["update"] = asdict(record.update)
    text = json.dumps(rest, allow_nan=False, default=str, separators=(",", ":"))
    with atomic_folder(folder) as inside:
        save_file(dict(record.arrays), inside / _ARRAYS)
        (inside / _REST).write_text(text, encoding="utf-8", newline="\n")


def read_record(folder: Path) -> RolloutRecord:
    """What `write_record` wrote; raises `Damaged` where it is not that."""
    check(folder)
    try:
        rest: dict[str, Any] = json.loads((folder / _REST).read_text(encoding="utf-8"))
        rest["update"] = UpdateState(**rest["update"])
        rest["clip_range"] = tuple(rest["clip_range"])
        return RolloutRecord(**rest, arrays=load_file(folder / _ARRAYS))
    except OSError as error:
        raise Damaged(f"{folder} cannot be read: {error.strerror or first_line(error)}.") from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise Damaged(
            f"{folder} does not hold a rollout: it was cut short, damaged, or not written by a run "
            "of this version."
        ) from error
