"""What must hold whether `auto` computes in bfloat16 or in float32: each test runs in both, on any
machine. Most of the other tests of the engine set float32."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from torch import Tensor

from ppo_engine import (
    Experience,
    PPOConfig,
    PPOEngine,
    PPOTrainer,
    RewardModelConfig,
    RewardModelTrainer,
    SFTConfig,
    SFTTrainer,
    UserError,
)

pytestmark = pytest.mark.usefixtures("either_cpu")
PROMPTS = ["Hello", "A longer prompt", "Hi", "Once upon a time", "a", "Tell me", "x y z", "Why?"]
SMALL = {
    "generation": {"max_new_tokens": 8, "temperature": 1.3},
    "ppo": {"rollout_batch_size": 8, "mini_batch_size": 8, "micro_batch_size": 8},
}


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(c.isalpha() for c in response) / 4 for response in responses]


def settings(config: Any, **sections: Any) -> Any:
    """`config` with some of its values changed, or some of a section's, given as a dict."""
    return dataclasses.replace(config, **{
        name: settings(getattr(config, name), **x) if isinstance(x, dict) else x
        for name, x in sections.items()
    })  # fmt: skip


FAST = {"optimizer": {"learning_rate": 1e-2}}


def make_engine(**ppo: Any) -> PPOEngine:
    config = settings(PPOConfig(), **SMALL | {"ppo": SMALL["ppo"] | ppo})
    return PPOEngine(tiny_model(), letters, config=config, tokenizer=tiny_tokenizer())


def experience_of(engine: PPOEngine) -> Experience:
    """Of the same responses each time, of unequal lengths."""
    torch.manual_seed(0)
    rollout = engine.generate(PROMPTS)
    lengths = torch.tensor([8, 1, 3, 8, 5, 2, 7, 4])
    rollout = dataclasses.replace(rollout, mask=torch.arange(8) < lengths[:, None])
    return engine.estimate_advantages(rollout, torch.arange(8.0))


def gradients(engine: PPOEngine, experience: Experience) -> list[Tensor]:
    """Of one update's only mini-batch: those of the policy, and of the critic."""
    found = []
    for learner in (engine.actor.learner, engine.critic.learner):

        def step(losses: Any, of: Any = learner) -> Tensor:
            found.append(torch.cat([p.grad.flatten() for p in of.model.parameters()]))
            return torch.zeros(())

        learner.step = step
    engine.update(experience)
    return found


def test_the_dtype_of_auto(either_cpu: bool) -> None:
    assert make_engine().dtype == (torch.bfloat16 if either_cpu else torch.float32)


def test_the_first_kl_is_exactly_0_and_the_ratios_are_exactly_1() -> None:
    engine = make_engine(micro_batch_size=3)
    experience = experience_of(engine)
    assert torch.equal(experience.kl, torch.zeros(8))
    assert torch.equal(experience.logprobs, experience.ref_logprobs)
    metrics = engine.update(experience)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_fraction"] == metrics["policy/approx_kl"] == 0.0


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up(either_cpu: bool, micro: int) -> None:
    whole, parts = (
        gradients(engine, experience_of(engine))
        for engine in (make_engine(), make_engine(micro_batch_size=micro))
    )
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).norm() <= (1e-2 if either_cpu else 1e-5) * a.norm()


def test_more_padding_changes_nothing(either_cpu: bool) -> None:
    engine = make_engine()
    narrow = experience_of(engine)

    def wider(x: Tensor, left: int, right: int) -> Tensor:
        return torch.nn.functional.pad(x, (left, right))

    rollout = narrow.rollout
    wide = engine.estimate_advantages(
        dataclasses.replace(
            rollout,
            prompt_ids=wider(rollout.prompt_ids, 5, 0),
            prompt_mask=wider(rollout.prompt_mask, 5, 0),
            response_ids=wider(rollout.response_ids, 0, 7),
            mask=wider(rollout.mask, 0, 7),
        ),
        torch.arange(8.0),
    )
    alone = experience_of(make_engine(micro_batch_size=1))  # each row without any
    assert torch.equal(alone.rollout.response_ids, rollout.response_ids)
    tolerance = 5e-3 if either_cpu else 1e-5
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "advantages"):
        expected = getattr(narrow, name)[rollout.mask]
        assert not getattr(wide, name)[:, 8:].any(), name
        for found in (getattr(wide, name)[:, :8], getattr(alone, name)):
            torch.testing.assert_close(
                found[rollout.mask], expected, rtol=tolerance, atol=tolerance
            )


# --- Trainers -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes longer than these runs."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, file, **_: Path(file).touch()
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def train(model: str, output: Path, reward: Any = letters, **sections: Any) -> list[Any]:
    """A run of four steps; its metrics, but for what depends on the clock."""
    sections = SMALL | {"policy": FAST, "critic": FAST} | sections
    sections["run"] = {"output_dir": str(output)} | sections.get("run", {})
    config = settings(PPOConfig(steps=4), **sections)
    PPOTrainer(model, reward, PROMPTS, config=config).train()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    of_time = ("time/", "tokens_per_second", "memory/", "mfu/", "overhead/")
    return [{k: v for k, v in row.items() if not k.startswith(of_time)} for row in rows]


def test_a_resumed_run_is_the_same_run_and_evaluation_changes_nothing(
    model: str, tmp_path: Path
) -> None:
    whole = train(model, tmp_path / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert whole[0]["objective/kl"] == 0 != whole[-1]["objective/kl"]
    calls = []

    def failing(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(len(responses))
        if len(calls) == 4:
            raise RuntimeError("the power went off")
        return letters(prompts, responses)

    halves = {"output_dir": str(tmp_path / "halves"), "checkpoint_every": 2}
    with pytest.raises(UserError, match="power"):
        train(model, tmp_path / "halves", failing, run=halves)
    torch.manual_seed(99)
    assert train(model, tmp_path / "halves", run=halves | {"resume": True}) == whole

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:3]))
    evaluated = train(model, tmp_path / "evaluated", evaluation={"path": str(held_out), "every": 2})
    assert evaluated[0]["step"] == 0
    for row, expected in zip(evaluated[1:], whole, strict=True):
        assert {name: row[name] for name in expected} == expected


def test_a_reward_model_learns(model: str, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": "yes " + "abcdef"[i % 6], "rejected": "no"}
             for i in range(48)]  # fmt: skip
    config = settings(
        RewardModelConfig(),
        model={"path": model} | FAST, data={"eval_fraction": 0.25},
        reward={"batch_size": 6, "epochs": 2}, run={"output_dir": str(tmp_path / "run")},
    )  # fmt: skip
    found = RewardModelTrainer(None, pairs, config, console=Console(file=io.StringIO())).train()
    assert found["eval/accuracy"] == 1.0


def test_supervised_training_learns(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "response": "the same answer"} for i in range(32)]
    config = settings(
        SFTConfig(),
        model=FAST, data={"eval_fraction": 0.25}, sft={"batch_size": 8, "micro_batch_size": 2},
        run={"output_dir": str(tmp_path / "run")},
    )  # fmt: skip
    found = SFTTrainer(model, rows, config, console=Console(file=io.StringIO())).train()
    assert found["eval/loss"] < 0.9 * found["eval_before/loss"]
