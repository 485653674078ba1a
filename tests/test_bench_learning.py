"""The benchmark of what is learnt: its judge, its curves, its verdicts, and a small run of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import learning, learning_ours, speed_page
from bench.learning_curves import Curve, below, curves, judged
from bench.learning_evaluator import Evaluator, _until
from bench.results import read_csv
from ppo_engine import PPOConfig
from ppo_engine.demo.tiny import save_tiny_model

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy, another one, and a reward model on the first."""
    folder = tmp_path_factory.mktemp("learning")
    for seed in (0, 1):
        save_tiny_model(folder / f"policy-{seed}", seed=seed)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(
        folder / "policy-0", num_labels=1
    )
    reward.config.pad_token_id = 0
    reward.save_pretrained(folder / "reward")
    return folder


def an_evaluator(folder: Path) -> Evaluator:
    policy, reward = str(folder / "policy-0"), str(folder / "reward")
    return Evaluator(policy, reward, PROMPTS, new_tokens=5, samples=2)


def test_the_judge_finds_no_kl_where_nothing_was_learnt(folder: Path) -> None:
    judge = an_evaluator(folder)
    same, other = (judge.measure(folder / f"policy-{seed}", seed=3) for seed in (0, 1))
    assert same["kl"] == pytest.approx(0, abs=1e-5) and other["kl"] > 0.01
    assert judge.measure(folder / "policy-1", seed=3) == other


def test_the_judge_sums_over_the_response_alone_and_scores_its_last_token(folder: Path) -> None:
    judge = an_evaluator(folder)
    model = type(judge.reference).from_pretrained(folder / "policy-1", dtype=torch.float32).eval()
    responses = [[11, 12, 13, 14], [15, 16]]
    kls, rewards = judge._kl(model, PROMPTS, responses), judge._rewards(PROMPTS, responses)
    for prompt, response, kl, reward in zip(PROMPTS, responses, kls, rewards, strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            p, q = (each(ids).logits[0].log_softmax(-1) for each in (model, judge.reference))
            expected = float(judge.reward(ids).logits)
        tokens = (p.exp() * (p - q)).sum(-1)
        assert kl == pytest.approx(float(tokens[len(prompt) - 1 : -1].sum()), rel=1e-4)
        assert reward == pytest.approx(expected, rel=1e-4)


def test_a_response_ends_with_the_token_that_ends_it() -> None:
    assert _until(2, [5, 2, 7, 2]) == [5, 2]
    assert _until(2, [5, 7]) == [5, 7]


def test_curves_are_read_at_equal_kl_as_far_as_all_seeds_reached() -> None:
    rows = [
        {"side": side, "seed": seed, "kl": kl, "reward": reward}
        for side, seed, points in (
            ("now", 0, [(0, 0), (4, 8)]),
            ("now", 1, [(0, 2), (2, 4), (8, 10)]),
            ("TRL", 0, [(0, 0), (3, 3), (2, 2)]),
        )
        for kl, reward in points
    ]
    found = curves(rows)
    now, trl = found["now"], found["TRL"]
    assert now.kl == trl.kl and now.kl[-1] == 3
    assert now.reward[-1] == pytest.approx((6 + 5) / 2)
    assert now.spread[-1] == pytest.approx(0.5**0.5)
    assert trl.reward == pytest.approx(trl.kl) and trl.spread[-1] == 0


@pytest.mark.parametrize(("reward", "most", "verdict"), [(4.0, 0.0, "met"), (1.0, 2.0, "MISSED")])
def test_a_side_may_be_below_another_within_their_spread(
    reward: float, most: float, verdict: str
) -> None:
    one, other = Curve([0, 1], [1, reward], [0.3, 0.3]), Curve([0, 1], [1, 2], [0.4, 0.4])
    assert below(one, other) == pytest.approx(most)
    (line,) = judged({"now": one, "TRL": other}, [("now", "TRL"), ("now", "before")])
    assert line.endswith(verdict)
    alone = Curve([0, 1], [1, reward], [0, 0])
    assert "one seed" in judged({"now": alone, "TRL": alone}, [("now", "TRL")])[0]


def test_settings_are_those_of_the_engine(folder: Path) -> None:
    work = learning._work(str(folder / "policy-0"), "r", learning._SMOKE, seed=1)
    config = PPOConfig(**learning_ours.settings(work))
    assert config.ppo.lam == 1 and config.ppo.mini_batch_size == 2 and config.steps == 2
    assert config.policy.optimizer == config.critic.optimizer
    assert [len(prompts) for prompts in work["prompts"]] == [4, 4]


def test_what_has_been_run_is_not_run_again_and_other_sizes_are_told(tmp_path: Path) -> None:
    file = tmp_path / "now-0.json"
    assert not learning._is_there(file, {"steps": 2})
    learning._write(file, {"sizes": {"steps": 2}})
    assert learning._is_there(file, {"steps": 2})
    with pytest.raises(learning.UserError, match="give another --folder"):
        learning._is_there(file, {"steps": 3})


@pytest.mark.parametrize(
    ("side", "message"), [("before", "none was given"), ("TRL", "TRL 1.12.0 is needed")]
)
def test_a_side_that_cannot_be_run_says_so(
    monkeypatch: pytest.MonkeyPatch, side: str, message: str
) -> None:
    monkeypatch.setattr(learning, "versions", lambda python: {})
    with pytest.raises(learning.UserError, match=message):
        learning._check(side, None)


@pytest.mark.slow
def test_a_small_run_goes_on_where_it_was_and_makes_a_picture(tmp_path: Path) -> None:
    command = [
        sys.executable, "bench/learning.py", "--smoke", "--sides", "now", "--seeds", "0",
        "--folder", str(tmp_path), "--out", str(tmp_path / "learning.csv"),
    ]  # fmt: skip
    for _ in range(2):
        ran = subprocess.run(
            command, cwd=learning.ROOT, capture_output=True, text=True, env=os.environ
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "trained in" not in ran.stdout  # the second time
    _, rows = read_csv(tmp_path / "learning.csv")
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["kl"]) < 1e-4 < float(rows[2]["kl"])
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "now-0").exists()  # policies are not kept
    table = speed_page._learning(*read_csv(tmp_path / "learning.csv"))
    assert table.count("\n| ") == 9  # two of them are the head
