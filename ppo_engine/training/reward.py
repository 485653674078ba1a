"""Training a reward model on pairs and rankings (Bradley-Terry; Ouyang et al. 2022, section 3.4).

All ordered pairs of a prompt come from one forward pass of its K responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.data.encoded_rankings import EncodedRanking, encode_rankings
from ppo_engine.data.forms import reading
from ppo_engine.data.preferences import Ranking, count_pairs, load_preferences, sample_rankings
from ppo_engine.data.rows import SkippedLines
from ppo_engine.errors import UserError, entry_point
from ppo_engine.messages import counted
from ppo_engine.models import freezing, value_model
from ppo_engine.models.budget import Budget
from ppo_engine.models.experts import asks_for_balance
from ppo_engine.models.finite import Losses
from ppo_engine.models.reader import Limit, Reader
from ppo_engine.models.token_rows import scored
from ppo_engine.models.work import passing
from ppo_engine.pretrained import architecture, loading, storage
from ppo_engine.pretrained.weights import refuse_not_finite_weights
from ppo_engine.run.headlines import with_error
from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import RewardModelConfig, RewardModelSettings, settings_of
from ppo_engine.text.renderer import Renderer
from ppo_engine.training.supervised import SupervisedTrainer, mean_by_cluster
from ppo_kernels import pairwise_loss, ranking_loss
from ppo_kernels.reference import PairwiseStats


class RewardModelTrainer(SupervisedTrainer[Ranking, EncodedRanking]):
    """Trains a reward model: everything is loaded and checked here, nothing is written before
    `train`.

    Pairs alone are trained by `pairwise_loss`, with their margins and `reward.center_coef`. Where
    some prompts have rankings of three or more, all are trained by `ranking_loss`: each ranking
    weighs the same, however many pairs it has.
    """

    command = "reward"
    title = "Reward model"
    unit = "preferences"
    result = "reward_model"

    config: RewardModelConfig

    @entry_point
    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        preferences: str | Path | Iterable[Any] | None = None,
        config: RewardModelConfig | Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        console: Console | None = None,
    ) -> None:
        """`model` and `preferences` (a file, or rows as `load_preferences` takes them) come
        from `config` where they are not given. A model object needs its `tokenizer`. Progress goes
        to `console`, by default the terminal."""
        config = settings_of(RewardModelConfig, config)
        super().__init__(model, preferences, config, tokenizer, console)
        everything = [*self.training, *self.held_out]
        self.pairs_only = all(len(ranking.rows) == 2 for ranking in everything)
        if not self.pairs_only:
            self._refuse_settings_of_pairs(everything)

    @property
    def settings(self) -> RewardModelSettings:
        return self.config.reward

    @entry_point
    @torch.no_grad()
    def evaluate(self, progress: Progress | None = None) -> dict[str, float]:
        """Accuracy over all held-out pairs (a tie counts 1/2), its standard error (pairs of one
        prompt are not independent), loss, margin."""
        if not self.held_out:
            raise UserError(
                "No preferences are held out: set data.eval_fraction or data.eval_path."
            )
        scores, ranks = self._held_out_scores(progress), self._ranks(self.held_out)
        loss, stats = self._loss(scores, self.held_out)
        wins, pairs = _wins(scores, ranks)
        groups = torch.tensor([ranking.group for ranking in self.held_out], device=self.device)
        of_prompts = torch.zeros(2, int(groups.max()) + 1, dtype=torch.float32, device=self.device)
        of_prompts.index_add_(1, groups, torch.stack((wins, pairs)))
        accuracy, error = mean_by_cluster(*of_prompts)
        return {
            "eval/accuracy": accuracy,
            "eval/accuracy_se": error,
            "eval/loss": loss.item(),
            "eval/margin": stats.margin.item(),
        }

    def _read(self, source: Any) -> tuple[list[Ranking], SkippedLines]:
        data = self.config.data
        return load_preferences(
            source, tokenizer=self.tokenizer, on_bad_line=data.on_bad_line, **reading(data)
        )

    def _limit(self, rows: list[Ranking]) -> list[Ranking]:
        limit = self.config.data.max_pairs
        return rows if limit is None else sample_rankings(rows, limit, self.config.run.seed)

    def _split(self, source: Any) -> tuple[list[Ranking], list[Ranking]]:
        training, held_out = super()._split(source)
        guessed = sum(not ranking.prompt_given for ranking in (*training, *held_out))
        if guessed and held_out:
            self.notes.append(
                f"{guessed} preferences are whole texts without a prompt; their common prefix is "
                "used as the prompt, so one prompt may be in both the training and the held-out "
                "data. Add the prompts to rule this out."
            )
        return training, held_out

    def _load_model(self, model: str | PreTrainedModel | None) -> Any:
        config, seed = self.config.model, self.config.run.seed
        arguments, date = self.config.data.chat_template_kwargs, self.config.run.date
        self.renderer = Renderer(self.tokenizer, arguments=arguments, date=date)
        if isinstance(model, nn.Module):
            loading.check_given(model, config)
            refuse_not_finite_weights(model, "The given model")
            model = value_model.ready_value_model(
                storage.in_fp32(model), self.tokenizer, self.device
            )
        else:
            model = value_model.load_value_model(
                config.path,
                self.tokenizer,
                device=self.device,
                seed=seed,
                options=loading.load_options(config, self.device, self.dtype),
            )
        if asks_for_balance(model):
            self.notes.append(
                "The experts' balance loss is not part of a reward model's loss, as transformers "
                "has none for its sequence classifiers."
            )
        model = freezing.prepare_for_training(model, config, "SEQ_CLS", self.dtype)
        self.reader = Reader(model)
        self.budget = Budget(Limit.of(self.config.reward, model), "reward")
        return model

    def _encode(self, rows: Sequence[Ranking], name: str) -> list[EncodedRanking]:
        limit = min(self.config.data.max_tokens, architecture.context_length(self.model))
        on_bad_line = self.config.data.on_bad_line
        encoded, skipped, notes = encode_rankings(
            self.renderer, rows, limit, name=name, on_bad_line=on_bad_line
        )
        self.notes += [*skipped.notes("Preferences"), *notes]
        return encoded

    def _refuse_settings_of_pairs(self, rankings: Sequence[EncodedRanking]) -> None:
        """Margins and centering are defined for pairs; nothing is ignored silently."""
        longer = sum(len(ranking.rows) > 2 for ranking in rankings)
        for used, what in (
            (self.config.reward.center_coef > 0, "reward.center_coef"),
            (any(ranking.margin is not None for ranking in rankings), "A margin"),
        ):
            if used:
                raise UserError(
                    f"{what} is defined for pairs only, but {longer} prompts have rankings of more "
                    "than two responses: remove it, or give only pairs (chosen, rejected)."
                )

    def _backward(self, examples: Sequence[EncodedRanking]) -> tuple[dict[str, Tensor], Losses]:
        found, losses = self.budget.run(
            self._lengths(examples),
            lambda passes: self._backward_in(passes, examples),
            packed=self.reader.packs,
        )
        return dict(zip(("loss", "accuracy", "margin"), found, strict=True)), losses

    def _backward_in(
        self, passes: Sequence[list[int]], examples: Sequence[EncodedRanking]
    ) -> tuple[Tensor, Losses]:
        """The gradient of `examples` in these `passes`; loss, accuracy and margin, `[3]`, and each
        pass's loss."""
        self.learner.clear_gradients()
        settings = self.config.reward
        found = torch.zeros(3, dtype=torch.float32, device=self.device)
        losses = []
        pairs = sum(count_pairs(ranking.ranks) for ranking in examples)
        for planned in passes:
            part = [examples[i] for i in planned]
            scores = self._table(self._forward(_rows(part)), part)
            loss, stats = self._loss(scores, part, settings.center_coef)
            share = len(part) / len(examples)
            with passing():
                (loss * share).backward()
            of_pairs = sum(count_pairs(ranking.ranks) for ranking in part) / pairs
            found += torch.stack(
                (loss.detach() * share, stats.accuracy * of_pairs, stats.margin * of_pairs)
            )
            losses.append((planned, loss.detach()))
        return found, losses

    def _loss(
        self, scores: Tensor, rankings: Sequence[EncodedRanking], center_coef: float = 0.0
    ) -> tuple[Tensor, PairwiseStats]:
        """The mean loss of `scores` `[P, K]`, and statistics over all their pairs."""
        if not self.pairs_only:
            return ranking_loss(scores, self._ranks(rankings))
        margins = torch.tensor(
            [r.margin or 0.0 for r in rankings], dtype=torch.float32, device=self.device
        )
        return pairwise_loss(scores[:, 0], scores[:, 1], margin=margins, center_coef=center_coef)

    def _lengths(self, rankings: Sequence[EncodedRanking]) -> list[int]:
        """Tokens of all responses of each."""
        width = max(len(ranking.rows) for ranking in rankings)
        # Padded, a ranking takes as much as the longest of its responses for each.
        return [
            sum(map(len, r.rows)) if self.reader.packs else width * max(map(len, r.rows))
            for r in rankings
        ]

    def _forward(self, rows: Sequence[list[int]]) -> Tensor:
        # The longest first, as attention has the least padding so.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        part = self.reader.stack([scored(rows[i]) for i in order])
        scores = value_model.read_values(self.model, self.reader, part)
        return scores[torch.tensor(order, device=self.device).argsort()]

    def _ranks(self, rankings: Sequence[EncodedRanking]) -> Tensor:
        """`[P, K]`, -1 where a ranking has fewer than K responses."""
        width = max(len(ranking.ranks) for ranking in rankings)
        padded = [r.ranks + [-1] * (width - len(r.ranks)) for r in rankings]
        return torch.tensor(padded, device=self.device)

    def _table(self, scores: Tensor, rankings: Sequence[EncodedRanking]) -> Tensor:
        """The scores of `_rows`, `[P, K]`; 0 where there is no response."""
        there = self._ranks(rankings).T >= 0
        return scores.new_zeros(there.shape).masked_scatter(there, scores).T

    def _held_out_scores(self, progress: Progress | None) -> Tensor:
        """Scores of all held-out responses, `[P, K]`."""
        rows = _rows(self.held_out)

        def score(passes: list[list[int]]) -> Tensor:
            scores = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
            for planned in progress.track(passes, "held-out batch") if progress else passes:
                scores[planned] = self._forward([rows[i] for i in planned])
            return scores

        scores = self.budget.run([len(row) for row in rows], score, packed=self.reader.packs)
        return self._table(scores, self.held_out)

    def _tokens(self, example: EncodedRanking) -> int:
        return sum(map(len, example.rows))

    def _save_model(self, folder: Path) -> None:
        run = self.config.run
        loading.save_model(
            self.model, self.tokenizer, folder, run.save_dtype, as_adapters=run.save_adapters
        )

    def _summary(self, metrics: dict[str, float]) -> str:
        pairs = sum(count_pairs(ranking.ranks) for ranking in self.held_out)
        accuracy = with_error(metrics, "eval/accuracy", "{:.1%}")
        error = "± standard error, " * ("±" in accuracy)
        return (
            f"held-out accuracy {accuracy} ({error}"
            f"{counted(pairs, 'pair')}), loss {metrics['eval/loss']:.4f}"
        )


def _rows(rankings: Sequence[EncodedRanking]) -> list[list[int]]:
    """The responses, without absent ones: the first of each ranking, then the second of each, …"""
    width = max(len(ranking.rows) for ranking in rankings)
    return [r.rows[k] for k in range(width) for r in rankings if k < len(r.rows)]


def _wins(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each ranking: pairs that the scores put right (a tie is 1/2), and all pairs; `[P]`."""
    there = ranks >= 0
    better = there[:, :, None] & there[:, None] & (ranks[:, :, None] < ranks[:, None])
    ahead = scores[:, :, None] - scores[:, None]
    right = (ahead > 0).float() + (ahead == 0).float() / 2
    return (right * better).sum((1, 2)), better.sum((1, 2)).float()
