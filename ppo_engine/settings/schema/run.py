"""Settings of a run: where results go, on what it runs, and what is measured meanwhile."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from ppo_engine.settings.schema.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    settings,
)


@settings
class EvaluationConfig:
    """Held-out prompts, answered before training, after every `every` steps and at the end.

    They come from a file of their own, or are taken out of the training data; none by default.
    """

    path: str | None = None
    """Held-out prompts, in a file as data.path; null: those of evaluation.prompts."""
    prompts: NonNegativeInt = 0
    """Distinct prompts of the training data that are held out, in place of a file."""
    every: NonNegativeInt = 0
    """Steps between evaluations; 0 is before training and at the end only."""
    best_of: PositiveInt = 1
    """Responses to each prompt; with N > 1 the expected best of N is measured too."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a new best; null: never."""
    keep_best: bool = True
    """Keep the policy with the best score so far in best/. It is judged by eval/shaped_scores, with
    missing-EOS rule and length penalty; by eval/scores where there is neither, or where the scale
    of the shaped ones changes (reward.normalize)."""


@settings
class RunConfig:
    """What every training command has: where results go, and what makes a run repeatable."""

    output_dir: str = ""
    """A new folder for the results; empty: runs/COMMAND-TIME, with the estimator for the command
    where there is no critic."""
    seed: Seed = 0
    """Of everything that is drawn: samples, orders of data, new weights."""
    date: datetime.date | None = None
    """For chat templates that show the date (YYYY-MM-DD); null: the day on which the run began."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute. In bfloat16, what is trained has the rest of an fp32 master beside
    it. auto: bfloat16 where the device multiplies it faster."""
    offload: list[Literal["reference", "reward"]] = Field(default_factory=list)
    """Frozen models of `ppo` and `grpo` whose weights wait in the memory of the CPU, and are on the
    GPU only while they are read with: once each in a step. Same numbers, less memory, more time."""
    deterministic: bool = False
    """The same bits in every run on one machine, however many threads it may have and whatever
    memory is free: computes with one thread, and does not go on in smaller passes where memory runs
    out."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of saved models; auto: the dtype they came in. Checkpoints to resume from keep every bit."""
    save_adapters: bool = False
    """Save adapters in place of models that they are merged into, in the format of `peft`: in
    fp32, or in save_dtype. Needs lora, and a base that is a folder or a name: where this is of
    adapters itself, only ppo-engine loads the result as it was trained, `peft` another model."""
    on_bad_numbers: Literal["raise", "skip"] = "raise"
    """Where a score, log-prob, value, advantage, loss or gradient is not finite: raise ends the
    run; skip leaves out the update, in at most 3 steps in a row. Weights always end it."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0 leaves it to checkpoint_minutes. The last step's, and a
    failure's, are always written."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes since the last checkpoint after which a finished step writes one, too, but for no
    more than a twentieth of the time; 0 leaves it to checkpoint_every."""
    keep_checkpoints: NonNegativeInt = 2
    """How many checkpoints stay, the newest; 0: all. best/ and the result are none."""
    sample_every: NonNegativeInt = 5
    """Steps between those whose first responses are written into samples.jsonl, one of them
    printed; 0: none. Held-out responses are written after each evaluation."""
    record_rollouts: NonNegativeInt | None = None
    """Steps between those that `ppo` and `grpo` record token by token, for `ppo-engine replay`; 0:
    none. null: the first, some four more over the run, and those that a checkpoint can replay; at
    most 64 MiB of them."""
    report_every: NonNegativeInt = 1
    """Steps after which report.html is written anew, but for no more than a hundredth of the time;
    0: at the end only."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""
