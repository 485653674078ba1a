"""Numbers that break training: nothing that is not finite is saved, and nothing is a traceback."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from safetensors.torch import load_file
from tiny import tiny_model_folder

from faults import REFUSED, SURVIVED, Try
from ppo_engine.cli import main

# Scores of a function that counts its calls.
_SCORES = (
    "1e38",
    "10.0 ** (10 * len(responses[0]))",
    "1e-45 * len(responses[0])",
    "float('nan') if calls[0] > 2 else 1.0",
    "float('inf') if calls[0] > 2 else 1.0",
    "10 ** 400",
)
_OF_PPO = (
    "generation.temperature=1e-6", "generation.temperature=1e30", "generation.top_p=1e-300",
    "ppo.kl_coef=3e38", "ppo.lam=1e-320", "ppo.gamma=1e-300", "ppo.entropy_coef=3e38",
    "ppo.clip_range=[1,1e38]", "ppo.value_clip_range=1e-38", "ppo.importance_cap=3e38",
    "ppo.dual_clip=1e38", "reward.weights=[3e38]", "reward.weights=[1e-45]",
    "reward.missing_eos_score=3e38", "reward.missing_eos_penalty=3e38",
    "reward.length_penalty=3e38", "reward.normalize=true", "critic.optimizer.learning_rate=1e38",
    "policy.optimizer.learning_rate=1e38", "policy.optimizer.learning_rate=1e-45",
    "policy.optimizer.eps=1e-45", "policy.optimizer.weight_decay=3e38",
    "policy.optimizer.max_grad_norm=3e38", "policy.optimizer.max_grad_norm=1e-45",
    "run.save_dtype=float16",
)  # fmt: skip
_OF_OTHERS = (
    "model.optimizer.learning_rate=1e38", "model.optimizer.learning_rate=1e10",
    "model.optimizer.weight_decay=3e38", "model.optimizer.eps=1e-45", "run.save_dtype=float16",
)  # fmt: skip


def _write(folder: Path) -> None:
    tiny_model_folder(folder)
    rows = [
        {"prompt": f"Q{n}", "response": "A" * n, "chosen": "y", "rejected": "n", "margin": 1e30}
        for n in range(1, 9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _reward(score: str, folder: Path, number: int) -> str:
    """A function of its own for each run: it counts its calls."""
    file = folder / f"reward_{number}.py"
    file.write_text(
        "calls = [0]\n"
        "def reward(prompts, responses):\n"
        "    calls[0] += 1\n"
        f"    return [{score}] * len(responses)\n"
    )
    return f"{file}:reward"


def _run(fault: str, folder: Path, number: int, *given: str) -> Try:
    output = folder / f"run-{number}"
    command = [*given, "--data", str(folder / "rows.jsonl"), "--output-dir", str(output)]
    said, name = io.StringIO(), " ".join(given)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main(command)
    except BaseException as error:
        return Try(fault, f"{name}: {type(error).__name__}: {error}")
    ending = {0: SURVIVED, 2: REFUSED}.get(status, f"{name}: exit {status}, {said.getvalue()}")
    saved = [x for file in output.rglob("*.safetensors") for x in load_file(file).values()]
    if not all(bool(x.isfinite().all()) for x in saved if x.is_floating_point()):
        ending = f"{name}: saved weights that are not finite"
    elif status == 2 and (output / given[0].replace("ppo", "policy")).exists():
        ending = f"{name}: failed, and left a result"
    return Try(fault, ending)


def tries() -> Iterator[Try]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        _write(folder)
        model = ["--model", str(folder / "tiny-chat")]
        sizes = ["steps=3", "ppo.rollout_batch_size=4", "ppo.mini_batch_size=2"]
        ppo = ["ppo", *model, *sizes, "generation.max_new_tokens=4", "run.dtype=float32"]
        count = 0
        for score in _SCORES:
            for choice in ("raise", "skip"):
                count += 1
                function = _reward(score, folder, count)
                given = [*ppo, "--reward", function, f"run.on_bad_numbers={choice}"]
                yield _run("scores of a reward", folder, count, *given)
        for setting in _OF_PPO:
            count += 1
            function = _reward("len(responses[0]) / 10", folder, count)
            given = [*ppo, "--reward", function, setting]
            yield _run("extreme settings of PPO", folder, count, *given)
        for command in ("sft", "reward"):
            for setting in _OF_OTHERS:
                count += 1
                given = [
                    command,
                    *model,
                    f"{command}.batch_size=2",
                    "data.eval_fraction=0",
                    setting,
                ]
                yield _run("extreme settings of SFT and reward models", folder, count, *given)
