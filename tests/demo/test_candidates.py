"""The demo's rankings: who is asked what, who is ranked how, and which pairs are made of them."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import tiny_tokenizer

from ppo_engine.demo import candidates
from ppo_engine.demo.candidates import TONES, TOPICS_PER_BATCH, clear_pairs, rank_candidates
from ppo_engine.demo.prompts import prompt_about
from ppo_engine.run.progress import Progress

TOPICS = [f"topic {i}" for i in range(TOPICS_PER_BATCH + 2)]


def scripted(policy: Any, prompts: list[Any], settings: Any) -> Any:
    """Responses that repeat the request, and end where that is about an even topic."""
    assert settings.max_new_tokens == 7
    texts = [prompt[0]["content"] for prompt in prompts]
    finished = torch.tensor([int(text[:-1].split()[-1]) % 2 == 0 for text in texts])
    return SimpleNamespace(responses=texts, finished=finished)


def sentiment(text: str) -> float:
    """Joyful is best, plain next, and the two others are as bad as each other."""
    return 1.0 if "joyful" in text else -1.0 if "sad" in text or "hateful" in text else 0.0


@pytest.mark.parametrize("each", [1, 2])
def test_candidates_of_every_tone_are_ranked_as_answers_to_the_plain_request(
    monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    monkeypatch.setattr(candidates, "generate", scripted)
    policy: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    quiet = Console(file=io.StringIO())
    with Progress(2, "", console=quiet) as progress:
        rankings = rank_candidates(policy, TOPICS, each, 7, sentiment, progress)
    assert len(rankings) == len(TOPICS)
    for index, (topic, ranking) in enumerate(zip(TOPICS, rankings, strict=True)):
        requests = [prompt_about(topic, tone)[0]["content"] for tone in TONES]  # type: ignore[index]
        assert ranking == {
            "prompt": prompt_about(topic),
            "responses": requests * each,
            "ranks": [1, 0, 2, 2] * each,
            "finished": [index % 2 == 0] * (4 * each),
        }


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([1, 0], [("b", "a")]),
        ([3, 5, 4, 2, 0, 1], [("e", "a"), ("f", "c"), ("d", "b")]),
        ([1, 0, 3, 2], [("b", "d"), ("a", "c")]),  # best and third, second and last
        ([3, 2, 1, 0], [("d", "b"), ("c", "a")]),
        ([0, 0, 0, 1], [("b", "d")]),  # the first and the third tie
        ([0, 0, 0, 0], []),
    ],
)
def test_pairs_are_of_clearly_different_answers(ranks: list[int], expected: list[Any]) -> None:
    ranking = {
        "prompt": "p",
        "responses": list("abcdef"[: len(ranks)]),
        "ranks": ranks,
        "finished": [True, False, True, False, False, False][: len(ranks)],
    }
    pairs = clear_pairs([ranking])
    assert [tuple(pair["responses"]) for pair in pairs] == expected
    for pair in pairs:
        assert pair["prompt"] == "p" and pair["ranks"][0] < pair["ranks"][1]
        assert pair["finished"] == [response in "ac" for response in pair["responses"]]
