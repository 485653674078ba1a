"""Supervised fine-tuning: a language model learns to answer as the examples do.

The loss is the mean of -log pi over response tokens (Ouyang et al. 2022, section 3.5), prompts
excluded. It comes from hidden states before these tokens; the logits of all never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.data.demonstrations import (
    Demonstration,
    EncodedExample,
    encode_demonstrations,
    load_demonstrations,
)
from ppo_engine.data.forms import reading
from ppo_engine.data.rows import SkippedLines
from ppo_engine.errors import UserError, entry_point
from ppo_engine.models.budget import Budget
from ppo_engine.models.finite import Losses
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.notes import training_notes
from ppo_engine.models.reader import Limit
from ppo_engine.models.token_rows import Row, predicting
from ppo_engine.models.work import passing
from ppo_engine.pretrained import architecture
from ppo_engine.run.headlines import with_error
from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import SFTConfig, SFTSettings, settings_of
from ppo_engine.training.supervised import SupervisedTrainer, mean_by_cluster

Result = TypeVar("Result")


class SFTTrainer(SupervisedTrainer[Demonstration, EncodedExample]):
    """Fine-tunes a language model on examples: everything is loaded and checked here, nothing is
    written before `train`."""

    command = "sft"
    title = "Supervised fine-tuning"
    unit = "examples"
    result = "policy"

    config: SFTConfig

    @entry_point
    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        examples: str | Path | Iterable[Any] | None = None,
        config: SFTConfig | Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        console: Console | None = None,
    ) -> None:
        """`model` and `examples` (a file, or rows as `demonstrations.load_demonstrations` takes
        them) come from `config` where they are not given. A model object needs its `tokenizer`.
        Progress goes to `console`, by default the terminal."""
        super().__init__(model, examples, settings_of(SFTConfig, config), tokenizer, console)

    @property
    def settings(self) -> SFTSettings:
        return self.config.sft

    @entry_point
    @torch.no_grad()
    def evaluate(self, progress: Progress | None = None) -> dict[str, float]:
        """Loss on the held-out response tokens, its standard error (answers to one prompt are not
        independent), and the perplexity, exp(loss)."""
        if not self.held_out:
            raise UserError("Nothing is held out: set data.eval_fraction or data.eval_path.")
        groups = torch.tensor([example.group for example in self.held_out], device=self.device)
        rows = [predicting(example.ids, example.trained) for example in self.held_out]

        def measured(passes: list[list[int]]) -> Tensor:
            found = torch.zeros(2, int(groups.max()) + 1, dtype=torch.float32, device=self.device)
            for planned in progress.track(passes, "held-out batch") if progress else passes:
                part = self.reader.stack([rows[i] for i in planned])
                nll = self.policy.nll(part)
                counts = torch.tensor(part.counts, device=self.device)
                of_tokens = groups[planned].repeat_interleave(counts)
                found.index_add_(1, of_tokens, torch.stack((nll, torch.ones_like(nll))))
            return found

        loss, error = mean_by_cluster(*self._in_passes(rows, measured))
        return {
            "eval/loss": loss,
            "eval/loss_se": error,
            "eval/perplexity": torch.tensor(loss, dtype=torch.float32).exp().item(),
        }

    def _read(self, source: Any) -> tuple[list[Demonstration], SkippedLines]:
        data = self.config.data
        return load_demonstrations(
            source, tokenizer=self.tokenizer, on_bad_line=data.on_bad_line, **reading(data)
        )

    def _load_model(self, model: str | PreTrainedModel | None) -> Any:
        self.policy = LanguageModel.open(
            model or "",
            self.config.model,
            device=self.device,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            template_arguments=self.config.data.chat_template_kwargs,
            date=self.config.run.date,
        )
        self.reader = self.policy.reader
        self.notes += training_notes(self.policy)
        self.budget = Budget(Limit.of(self.config.sft, self.policy.model), "sft")
        return self.policy.model.train()

    def _encode(self, rows: Sequence[Demonstration], name: str) -> list[EncodedExample]:
        encoded, skipped, notes = encode_demonstrations(
            self.policy.renderer,
            rows,
            self._limit_of_tokens(),
            name=name,
            on_bad_line=self.config.data.on_bad_line,
        )
        self.notes += [*skipped.notes("Examples"), *notes]
        return encoded

    def _limit_of_tokens(self) -> int:
        return min(self.config.data.max_tokens, architecture.context_length(self.policy.model))

    def _backward(self, examples: Sequence[EncodedExample]) -> tuple[dict[str, Tensor], Losses]:
        rows = [predicting(example.ids, example.trained) for example in examples]
        tokens = sum(len(row.places) for row in rows)

        def backward(passes: list[list[int]]) -> tuple[Tensor, Losses]:
            self.learner.clear_gradients()
            total, losses = torch.zeros((), dtype=torch.float32, device=self.device), []
            for planned in passes:
                part = self.reader.stack([rows[i] for i in planned])
                loss = self.policy.nll_loss(part, tokens)
                with passing():
                    loss.backward()
                total += loss.detach()
                losses.append((planned, loss.detach()))
            return total, losses

        total, losses = self._in_passes(rows, backward)
        return {"loss": total}, losses

    def _in_passes(
        self, rows: Sequence[Row], attempt: Callable[[list[list[int]]], Result]
    ) -> Result:
        """What `attempt` gives of the passes over `rows`, see `Budget.run`."""
        lengths = [len(row.ids) for row in rows]
        return self.budget.run(lengths, attempt, packed=self.reader.packs)

    def _tokens(self, example: EncodedExample) -> int:
        return len(example)

    def _save_model(self, folder: Path) -> None:
        run = self.config.run
        self.policy.save(folder, run.save_dtype, as_adapters=run.save_adapters)

    def _summary(self, metrics: dict[str, float]) -> str:
        loss = with_error(metrics, "eval/loss", "{:.4f}")
        error = " (± standard error)" * ("±" in loss)
        return (
            f"held-out loss {loss} nats per token{error}, "
            f"perplexity {metrics['eval/perplexity']:.3f}"
        )
