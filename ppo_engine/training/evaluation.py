"""Evaluation of the policy, while it trains, on prompts that it does not train on.

Each evaluation samples the held-out prompts' responses anew, always from the same random numbers,
and measures them with the run's own reward, next to the reference's responses. Training is not
affected: every random state is restored, and nothing is learned here.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_engine.data.prompts import PromptExample, columns_of
from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.rewards.best_of_n import expected_best
from ppo_engine.rollout.batch import Rollout
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.run.checkpoint import seeded
from ppo_engine.run.directory import RunDirectory, atomic_folder
from ppo_engine.run.progress import Progress

READ = tuple(range(10, 101, 10))  # percent of a response at which values are taken
POINTS_AT = 50  # the one of them whose single values are kept, for a plot


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # rows for samples.jsonl, one for each held-out prompt
    points: dict[str, Any] | None  # a row for critic.jsonl: values and scores


@dataclass(frozen=True)
class _Answers:
    """Responses to the held-out prompts, those to one prompt together: R in all."""

    responses: list[str]
    numbers: dict[str, Tensor]  # [R] each, or [R, 10], fp64 on the CPU


class Evaluator:
    """Evaluates the policy of `engine` on `examples`, as `engine.config.evaluation` says.

    It also keeps track of the best evaluation so far, and of how many have come since.
    """

    def __init__(self, engine: PPOEngine, examples: Sequence[PromptExample]) -> None:
        self.engine = engine
        self.examples = list(examples)
        self.config = engine.config.evaluation
        self.best_score = -math.inf
        self.best_step = -1
        self.since_best = 0  # evaluations
        self._kept = (-1, -math.inf)  # step and score of what is in best/
        self._reference: _Answers | None = None
        self._of_reference: Sampler | None = None

    def due(self, step: int) -> bool:
        """Whether to evaluate when `step` steps are done; never without held-out prompts."""
        every = self.config.every
        regular = step in (0, self.engine.config.steps) or (every and step % every == 0)
        return bool(self.examples and regular)

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.since_best >= self.config.patience

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> Evaluation:
        """Sample and measure; the policy stays as it is, and so does every random state."""
        with progress.phase("evaluate"):
            # Not kept in checkpoints: the same random numbers give the same responses again.
            self._reference = self._reference or self._answers(progress, by_reference=True)
            return self._compared(self._answers(progress, by_reference=False), self._reference)

    def keep(self, step: int, evaluation: Evaluation, run: RunDirectory) -> None:
        """Count the evaluation after `step`; a new best policy goes into the run's `best/`."""
        if evaluation.points is not None:
            run.log_critic(step, evaluation.points)
        metrics = evaluation.metrics
        score = metrics["eval/scores"]
        if not self.engine.config.reward.normalize:
            score = metrics.get("eval/shaped_scores", score)
        self.since_best += 1
        if not score > self.best_score:  # nor where it is not finite
            return
        self.best_score, self.best_step, self.since_best = score, step, 0
        # The policy as it came is where it came from; and a better one may be there, of a later
        # step than that from which a run was resumed.
        if self.config.keep_best and step > 0 and score >= self._kept[1]:
            with atomic_folder(run.path / "best") as folder:
                config = self.engine.config
                self.engine.policy.save(
                    folder,
                    config.run.save_dtype,
                    config.generation,
                    as_adapters=config.run.save_adapters,
                )
                facts = json.dumps({"step": step, "score": score})
                (folder / "best.json").write_text(facts + "\n", encoding="utf-8")
            self._kept = step, score

    def notes(self) -> list[str]:
        """Notes for the end of a run."""
        score, step = max((self.best_score, self.best_step), self._kept[::-1])
        if step < 0:
            return []
        told = f"score {score:+.3f}"
        if step == 0:
            found = [f"No evaluation was better than the one before training ({told})."]
        else:
            kept = "; it is in best/" * self.config.keep_best
            found = [f"Best on held-out prompts: step {step}, {told}{kept}."]
        if self.out_of_patience:
            found.append(
                f"Stopped early, after {self.since_best} evaluations in a row without a new best "
                f"score (evaluation.patience={self.config.patience})."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        names = ("best_score", "best_step", "since_best")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], run: RunDirectory) -> None:
        """Resume from a checkpoint of `run`, whose `best/` may be from a later step than it."""
        for name, value in state.items():
            setattr(self, name, value)
        file = run.path / "best" / "best.json"
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if math.isfinite(kept["score"]):
                self._kept = kept["step"], kept["score"]

    def _answers(self, progress: Progress, by_reference: bool) -> _Answers:
        """Responses of the policy, or of the reference, measured; in batches like training's."""
        settings = self.engine.config
        whose = "reference" if by_reference else "policy"
        rows = [example for example in self.examples for _ in range(self.config.best_of)]
        size = settings.ppo.rollout_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        responses: list[str] = []
        numbers: list[dict[str, Tensor]] = []
        # Different random numbers for each of the two: a win rate needs independent responses. A
        # reward function that draws random numbers also gets the same in every evaluation.
        with seeded(f"{settings.run.seed}/evaluation/{whose}"), self._asking(by_reference):
            for batch in progress.track(batches, f"held-out responses of the {whose}, batch"):
                rollout = self._respond(batch, by_reference)
                rewards = self.engine.score_each(rollout)
                scores = self.engine.rewards.total(rewards)
                found = {"scores": scores, "rounding": self.engine.rewards.rounding(rewards)}
                if len(rewards) > 1:
                    found |= {f"rewards/{name}": each for name, each in rewards.items()}
                if not by_reference:
                    found |= self._measure(rollout, scores)
                responses += rollout.responses
                numbers.append({name: x.cpu().double() for name, x in found.items()})
                self.engine.trunks.clear()  # before the next batch takes memory
        return _Answers(
            responses, {name: torch.cat([part[name] for part in numbers]) for name in numbers[0]}
        )

    def _author(self, by_reference: bool) -> LanguageModel:
        """Whose responses these are; without its adapters, the policy is the reference."""
        engine = self.engine
        return engine.reference if by_reference and engine.reference else engine.policy

    @contextmanager
    def _asking(self, by_reference: bool) -> Iterator[None]:
        """Inside, the author's weights are on the device. The reference is asked once: then what
        samples from it is gone, which takes memory and knows where the weights were."""
        with self._author(by_reference).reader.on_device():
            try:
                yield
            finally:
                self._of_reference = None

    def _respond(self, batch: Sequence[PromptExample], by_reference: bool) -> Rollout:
        """One response to each, sampled as in training."""
        engine, author = self.engine, self._author(by_reference)
        unadapted = by_reference and author is engine.policy
        with author.without_adapter() if unadapted else nullcontext():
            sampler = engine.sampler
            if by_reference:
                sampler = self._of_reference = self._of_reference or Sampler(author)
            return generate(
                sampler,
                [example.prompt for example in batch],
                engine.config.generation,
                columns_of(batch),
                environment=engine.environment,
            )

    def _measure(self, rollout: Rollout, scores: Tensor) -> dict[str, Tensor]:
        """Metrics of each of the policy's responses besides its score."""
        engine = self.engine
        logprobs, ref_logprobs, _ = engine.compare_with_reference(rollout)
        found = {
            "kl": (logprobs - ref_logprobs).sum(1),
            "ref_nll": -ref_logprobs.sum(1),
            "tokens": rollout.mask.sum(1),
            "response_length": rollout.lengths,
            "finished": rollout.finished,
        }
        found["shaped_scores"] = engine.shaped_scores(rollout, scores)
        if engine.critic is not None:
            found["values"] = values_along(engine.values(rollout), rollout.mask)
        return found

    def _compared(self, policy: _Answers, reference: _Answers) -> Evaluation:
        each, numbers = self.config.best_of, policy.numbers
        scores, rounding = (numbers[name].view(-1, each) for name in ("scores", "rounding"))
        ref_scores = reference.numbers["scores"].view(-1, each)
        metrics = mean_and_error("eval/scores", scores.mean(1))
        for name in filter(lambda name: name.startswith("rewards/"), numbers):
            metrics |= mean_and_error(f"eval/{name}", numbers[name].view(-1, each).mean(1))
        if each > 1:
            metrics[f"eval/best_of_{each}"] = float(expected_best(scores, each).mean())
        metrics |= mean_and_error("eval/win_rate", win_shares(scores, ref_scores, rounding))
        shaped = numbers["shaped_scores"].view(-1, each)
        if not torch.equal(shaped, scores):
            metrics |= mean_and_error("eval/shaped_scores", shaped.mean(1))
        metrics |= mean_and_error("eval/kl", numbers["kl"].view(-1, each).mean(1))
        for name in ("response_length", "finished"):
            metrics[f"eval/{name}"] = float(numbers[name].mean())
        metrics["eval/distinct"] = len(set(policy.responses)) / len(policy.responses)
        nll = numbers["ref_nll"].sum() / numbers["tokens"].sum()
        metrics["eval/ref_perplexity"] = float(nll.exp())
        points = None
        if "values" in numbers:
            values, final = numbers["values"], numbers["shaped_scores"]
            metrics |= anticipation(values, final)
            column = values[:, READ.index(POINTS_AT)]
            points = {"read": POINTS_AT, "values": _short(column), "scores": _short(final)}
        samples = [
            {
                "held_out": True,
                "prompt": example.prompt,
                "response": policy.responses[index * each],
                "score": float(scores[index, 0]),
                "finished": bool(numbers["finished"][index * each]),
                "reference_response": reference.responses[index * each],
                "reference_score": float(ref_scores[index, 0]),
            }
            for index, example in enumerate(self.examples)
        ]
        return Evaluation(metrics, samples, points)


def hold_out(
    examples: Sequence[PromptExample], count: int, seed: int
) -> tuple[list[PromptExample], list[PromptExample]]:
    """`(training, held out)`: `count` different prompts held out, chosen repeatably by `seed`.

    Other rows with one of these prompts are in neither: the policy would train on it. Raises
    `UserError` where none would be left to train on.
    """
    keys = [_key(example) for example in examples]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    if count >= len(first):
        raise UserError(
            f"evaluation.prompts={count} leaves nothing to train on: the data has {len(first)} "
            "different prompts. Hold out fewer, or give evaluation.path."
        )
    chosen = set(random.Random(f"{seed}/held out").sample(sorted(first), count))
    training = [x for x, key in zip(examples, keys, strict=True) if key not in chosen]
    return training, [examples[index] for index in sorted(first[key] for key in chosen)]


def _key(example: PromptExample) -> str:
    return json.dumps(example.prompt)


def win_shares(scores: Tensor, others: Tensor, rounding: Tensor) -> Tensor:
    """How often a score of `scores` [P, N] is above one of `others` [P, M], over all pairs of a
    prompt: [P]; NaN where one is not finite. A tie counts 1/2: a difference of no more than
    `rounding` [P, N]."""
    ahead = scores[:, :, None] - others[:, None, :]
    tied = ahead.abs() <= rounding[:, :, None]
    share = 0.5 * tied.double() + ((ahead > 0) & ~tied).double()
    return torch.where(ahead.isfinite(), share, math.nan).mean((1, 2))


def mean_and_error(name: str, of_prompts: Tensor) -> dict[str, float]:
    """The mean of `of_prompts` [P] as `name`, and as `name_se` its standard error over prompts,
    which one prompt alone does not have."""
    found = {name: float(of_prompts.mean())}
    if len(of_prompts) > 1:
        found[f"{name}_se"] = float(of_prompts.std() / math.sqrt(len(of_prompts)))
    return found


def values_along(values: Tensor, mask: Tensor) -> Tensor:
    """The critic's values where 10, 20, … 100 % of each response is reached: `[B, 10]`.

    `values` and `mask` are [B, T]. At p % it is the value before the k-th real token, with
    k = ceil(p / 100 * real tokens): the critic has read the prompt and all before that token. So
    at 100 % only the last token is unread; after it the response ends, and has no value.
    """
    percent = torch.tensor(READ, device=mask.device)
    k = (mask.sum(1, keepdim=True) * percent + 99) // 100
    # The k-th real token's index is the number of positions with fewer than k up to and with them.
    places = (mask.cumsum(1)[:, None] < k[:, :, None]).sum(2)
    return values.gather(1, places)


def anticipation(values: Tensor, scores: Tensor) -> dict[str, float]:
    """How well the critic predicts `scores` [R] from parts of the responses; `values` are [R, 10].

    For each part read, Pearson's correlation over responses (`value/anticipation_10` …) and the
    explained variance 1 - Var(score - value) / Var(score) (`value/explained_variance_10` …), which
    also needs the right scale. What does not vary has no correlation, and its metric is absent.
    """
    found: dict[str, float] = {}
    if not _varies(scores):
        return found
    for percent, at in zip(READ, values.T, strict=True):
        left = (scores - at).var(unbiased=False) / scores.var(unbiased=False)
        found[f"value/explained_variance_{percent}"] = float(1 - left)
        if _varies(at):
            both = torch.stack((at, scores))
            found[f"value/anticipation_{percent}"] = float(both.corrcoef()[0, 1])
    return found


def _varies(x: Tensor) -> bool:
    return bool((x != x[0]).any())


def _short(x: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in x.tolist()]
