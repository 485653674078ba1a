"""What the reward model learns from: several responses to each prompt, ranked by sentiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ppo_engine.demo.prompts import prompt_about
from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import GenerationConfig

# Candidates are asked for in several tones and ranked as answers to the neutral prompt: rankings
# of clearly different answers teach more than those of near ties (compare RLCD, Yang et al. 2023,
# arXiv:2307.12950).
TONES = ("", "joyful", "terrible and sad", "hateful")
TOPICS_PER_BATCH = 16


def load_vader() -> Callable[[str], float]:
    """VADER's compound score of a text, from -1 (negative) to 1 (positive)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "The demo needs the package vaderSentiment: pip install 'ppo-engine[demo]'"
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def rank_candidates(
    policy: LanguageModel,
    topics: Sequence[str],
    each: int,
    new_tokens: int,
    sentiment: Callable[[str], float],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A ranking for each topic: `each` candidate responses of each tone; of their ranks, 0 is best.

    Each batch of topics is a step of `progress`.
    """
    sampler = Sampler(policy)
    chat = bool(policy.tokenizer.chat_template)
    generation = GenerationConfig(max_new_tokens=new_tokens)
    tones = TONES * each
    rankings: list[dict[str, Any]] = []
    for step, start in enumerate(range(0, len(topics), TOPICS_PER_BATCH), start=1):
        batch = topics[start : start + TOPICS_PER_BATCH]
        with progress.phase("generate"):
            asked = [prompt_about(topic, tone, chat) for topic in batch for tone in tones]
            rollout = generate(sampler, asked, generation)
        for index, topic in enumerate(batch):
            of_topic = slice(index * len(tones), (index + 1) * len(tones))
            candidates = list(rollout.responses[of_topic])
            scores = [sentiment(text) for text in candidates]
            distinct = sorted(set(scores), reverse=True)
            rankings.append(
                {
                    "prompt": prompt_about(topic, chat=chat),
                    "responses": candidates,
                    "ranks": [distinct.index(score) for score in scores],
                    "finished": rollout.finished[of_topic].tolist(),
                }
            )
        progress.step(step, {})
    return rankings


def clear_pairs(rankings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rankings of two: the best with the best of the worse half, and so on, each response in one
    of them, so that no forward pass is spent on it twice. Ties are no pair."""
    pairs = []
    for ranking in rankings:
        order = best_first(ranking)
        half = len(order) // 2
        for better, worse in zip(order[:half], order[half:], strict=True):
            if ranking["ranks"][better] < ranking["ranks"][worse]:
                pairs.append(part(ranking, (better, worse)))
    return pairs


def best_first(ranking: dict[str, Any]) -> list[int]:
    """The indices of a ranking's responses, by rank."""
    return sorted(range(len(ranking["ranks"])), key=lambda place: ranking["ranks"][place])


def part(ranking: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """The ranking of only the responses at the indices `places`."""
    of_responses = ("responses", "ranks", "finished")
    return ranking | {name: [ranking[name][place] for place in places] for name in of_responses}
