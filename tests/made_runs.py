"""Folders of runs that nobody trained: made numbers, in the files that a run writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ppo_engine.run.directory import folder_of_step
from ppo_engine.run.rollout_record import ROLLOUTS, RolloutRecord, UpdateState, write_record
from ppo_engine.settings.describe import dump_config
from ppo_engine.settings.schema import PPOConfig

PIECES = ("The", " sea", " is", " deep", ",", " blue", " and", "\n", " old", ".")
END, END_TEXT = 99, "<|im_end|>"
_NO_UPDATE = UpdateState(**dict.fromkeys(x.name for x in fields(UpdateState)))  # replay's alone


def metrics_row(step: int, **more: Any) -> dict[str, Any]:
    """Of a step of PPO that goes well."""
    wave = math.sin(step / 7)
    return {
        "step": step,
        "objective/scores": 0.1 * step + wave,
        "objective/scores_std": 1.0,
        "objective/kl": 0.02 * step,
        "objective/kl_coef": 0.05,
        "objective/entropy": 2.0 + 0.1 * wave,
        "objective/response_length": 20.0,
        "objective/finished": 0.75,
        "policy/loss": 0.01 * wave,
        "policy/approx_kl": 1e-5 * 10 ** (step % 5),
        "policy/grad_norm": 0.5,
        "policy/learning_rate": 1e-6,
        "policy/ratio_mean": 1.0,
        "value/loss": 1.0 / step,
        "value/explained_variance": 0.5,
        "time/generate": 1.5,
        "time/update": 2.5,
        "tokens_per_second": 120.0,
        "memory/peak": 3.5,
        **more,
    }


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_record(
    step: int,
    *,
    responses: int = 8,
    tokens: int = 12,
    group_size: int = 1,
    critic: bool = True,
    pieces: Sequence[str] = PIECES,
    prompt: Any = None,
) -> RolloutRecord:
    """Responses of `tokens` tokens, the last of which is the end; the third and fourth of the
    second response are an environment's."""
    rng = np.random.default_rng(step)
    total = responses * tokens
    ids = rng.integers(0, len(pieces), (responses, tokens))
    ids[:, -1] = END
    texts = [[END_TEXT if i == END else pieces[i] for i in row] for row in ids]
    mask = np.ones((responses, tokens), dtype=bool)
    if responses > 1:
        mask[1, 2:4] = False
    logprobs = -rng.exponential(1.0, total).astype(np.float32)
    arrays = {
        "tokens": ids.reshape(-1).astype(np.int64),
        "cu_seqlens": np.arange(responses + 1, dtype=np.int64) * tokens,
        "prompt_tokens": np.zeros(responses, dtype=np.int64),
        "prompt_cu_seqlens": np.arange(responses + 1, dtype=np.int64),
        "mask": mask.reshape(-1),
        "logprobs": logprobs,
        "ref_logprobs": logprobs - rng.normal(0, 0.1, total).astype(np.float32),
        "advantages": rng.normal(0, 1, total).astype(np.float32),
        "ratio": np.exp(rng.normal(0, 0.1, total)).astype(np.float32),
        "clipped": rng.random(total) < 0.1,
    }
    if critic:
        arrays["values"] = rng.normal(0, 1, total).astype(np.float32)
        arrays["returns"] = arrays["values"] + arrays["advantages"]
    scores = rng.normal(0, 1, responses).round(3).tolist()
    return RolloutRecord(
        step=step,
        method="PPO" if critic else "GRPO",
        prompts=[
            prompt or [{"role": "user", "content": f"Write about case {i // group_size}."}]
            for i in range(responses)
        ],
        responses=["".join(row[:-1]) for row in texts],
        pieces=texts,
        special=[END],
        score=scores,
        rewards={"r": scores},
        shaped=scores,
        kl=[0.1 * i for i in range(responses)],
        finished=[i % 4 != 3 for i in range(responses)],
        group=[i // group_size for i in range(responses)],
        clip_range=(0.2, 0.2),
        metrics={},
        update=_NO_UPDATE,
        arrays=arrays,
    )


def held_out_rows(step: int, prompts: Sequence[Any], answer: str) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "held_out": True,
            "prompt": prompt,
            "response": f"{answer} {number}",
            "score": step + 0.5 * number,
            "finished": number % 2 == 0,
            "reference_response": f"reference {number}",
            "reference_score": -1.0,
        }
        for number, prompt in enumerate(prompts)
    ]


def made_run(
    folder: Path,
    *,
    steps: int = 20,
    records: Sequence[RolloutRecord] = (),
    config: Any = None,
    held_out: Sequence[Any] = ("Write about rain.", "Write about bread."),
    **metrics: Any,
) -> Path:
    """A run of PPO, evaluated before training and after its last step; `metrics` are of every step,
    with `__` for `/`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config or PPOConfig(steps=steps)))
    more = {name.replace("__", "/"): value for name, value in metrics.items()}
    evaluated = {
        step: {"eval/scores": 0.1 * step, "eval/scores_se": 0.25, "eval/win_rate": 0.5}
        for step in (0, steps)
    }
    rows = [{"step": 0, **evaluated[0]}]
    rows += [metrics_row(step, **more) for step in range(1, steps)]
    rows.append(metrics_row(steps, **more) | evaluated[steps])
    write_rows(folder / "metrics.jsonl", rows)
    samples = held_out_rows(0, held_out, "before") + held_out_rows(steps, held_out, "after")
    write_rows(folder / "samples.jsonl", samples)
    for record in records:
        write_record(folder_of_step(folder / ROLLOUTS, record.step), record)
    return folder
