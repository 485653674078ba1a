"""Training a reward model on preference pairs (Bradley-Terry; Ouyang et al. 2022, section 3.4)."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine import models, value_model
from ppo_engine.checkpoint import (
    load_trainable_state,
    load_training_state,
    random_states,
    restore_random_states,
    save_training_state,
    trainable_state,
)
from ppo_engine.config import RewardModelConfig
from ppo_engine.config_io import as_dict, flatten
from ppo_engine.data import Preference, load_preferences, split_preferences
from ppo_engine.errors import UserError
from ppo_engine.optim import make_optimizer, make_scheduler, optimizer_step
from ppo_engine.progress import Progress
from ppo_engine.report import write_curves
from ppo_engine.run_directory import RunDirectory, atomic_folder
from ppo_engine.text import encode_dialogue, pad_left
from ppo_engine.trackers import Trackers, check_trackers
from ppo_kernels import pairwise_loss


@dataclass(frozen=True)
class EncodedPair:
    """Two token sequences, prompt and response each, the first preferred."""

    chosen: list[int]
    rejected: list[int]
    margin: float

    def __len__(self) -> int:
        """Tokens of the longer one, which is what a micro-batch is padded to."""
        return max(len(self.chosen), len(self.rejected))


class RewardModelTrainer:
    """Trains a reward model: everything is loaded and checked here, nothing is written before
    `train`."""

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        preferences: str | Path | Iterable[Any] | None = None,
        config: RewardModelConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        console: Console | None = None,
    ) -> None:
        """`model` and `preferences` (a file, or rows as `data.load_preferences` takes them) come
        from `config` where they are not given. A model object needs its `tokenizer`. Progress goes
        to `console`, by default the terminal."""
        config = config or RewardModelConfig()
        if isinstance(model, str):
            chosen_model = replace(cast(Any, config.model), path=model)
            config = replace(cast(Any, config), model=chosen_model)
        self.config = config
        self.console = console
        check_trackers(config.run.trackers)
        self.device = models.choose_device(config.run.device)
        self.dtype = models.choose_dtype(config.run.dtype, self.device)
        torch.manual_seed(config.run.seed)

        if tokenizer is None:
            if isinstance(model, PreTrainedModel):
                raise UserError("A model object was given without its tokenizer: pass tokenizer=….")
            models.load_model_config(models.resolve(config.model.path))
            tokenizer = models.load_tokenizer(models.resolve(config.model.path))
        self.tokenizer = tokenizer
        source = config.data.path if preferences is None else preferences
        self.notes: list[str] = []
        self.training, self.held_out = self._load_pairs(source)

        if isinstance(model, PreTrainedModel):
            model = value_model.ready_value_model(model.float(), tokenizer, self.device)
        else:
            model = value_model.load_value_model(
                config.model.path,
                tokenizer,
                device=self.device,
                seed=config.run.seed,
                options=models.load_options(config.model, self.device, self.dtype),
            )
        self.model = models.prepare_for_training(model, config.model, "SEQ_CLS")
        self.steps_per_epoch = math.ceil(len(self.training) / config.reward.batch_size)
        self.total_steps = self.steps_per_epoch * config.reward.epochs
        self.optimizer = make_optimizer(self.model, config.model.optimizer)
        self.scheduler = make_scheduler(self.optimizer, config.model.optimizer, self.total_steps)
        self.step = 0
        self.before: dict[str, float] = {}  # held-out metrics of the untrained model

    def train(self) -> dict[str, float]:
        """Train to the end, or from the newest checkpoint on; returns the last step's metrics.

        Writes the run's folder, with the model in `reward_model/` (Hugging Face format). Held-out
        metrics are `eval/…` after training and `eval_before/…` before it.
        """
        config = self.config.run
        run = RunDirectory(config.output_dir, self.config, config.resume, command="reward")
        if config.resume:
            self._restore(run)
        settings = flatten(as_dict(self.config))
        trackers = Trackers(config.trackers, run.path, settings, self.step)
        pairs = f"{len(self.training)} pairs, {len(self.held_out)} held out"
        if not self.before and self.held_out:
            # Apart from the training's progress, whose estimate of the time left it would spoil.
            with Progress(1, "Held-out pairs before training", console=self.console) as progress:
                self.before = self.evaluate(progress)
                run.log_metrics(0, self.before)
                progress.step(1, self.before)
        metrics: dict[str, float] = {}
        with Progress(
            self.total_steps, f"Reward model, {pairs}", start=self.step, console=self.console
        ) as progress:
            for note in self.notes:
                progress.note(note)
            while self.step < self.total_steps:
                with progress.phase("update"):
                    metrics = self.train_step(self.mini_batch(self.step))
                last = self.step == self.total_steps
                if last and self.held_out:
                    with progress.phase("evaluate"):
                        metrics |= self.evaluate(progress)
                metrics |= progress.times
                run.log_metrics(self.step, metrics)
                trackers.log(self.step, metrics)
                progress.step(self.step, metrics)
                every = config.checkpoint_every
                if last or (every and self.step % every == 0):
                    self._save_checkpoint(run)
            if not metrics and self.held_out:  # resumed at its end
                metrics = self.evaluate(progress)
            with atomic_folder(run.path / "reward_model") as folder:
                value_model.save_value_model(self.model, self.tokenizer, folder)
            if self.before and metrics:
                progress.note(f"Before training: {_accuracy(self.before, len(self.held_out))}")
                progress.note(f"After training:  {_accuracy(metrics, len(self.held_out))}")
            progress.note(f"The reward model is in {run.path / 'reward_model'}")
        trackers.close()
        write_curves(run.path, run.path / "report.png", "Reward model")
        before = {name.replace("eval/", "eval_before/"): x for name, x in self.before.items()}
        return {**metrics, **before}

    @torch.no_grad()
    def evaluate(self, progress: Progress | None = None) -> dict[str, float]:
        """Accuracy on the held-out pairs (a tie counts 1/2), its standard error, loss, margin."""
        pairs = self.held_out
        if not pairs:
            raise UserError("No pairs are held out: set data.eval_fraction or data.eval_path.")
        rows = [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
        scores = self._scores(rows, progress)
        loss, stats = pairwise_loss(
            scores[: len(pairs)], scores[len(pairs) :], margin=self._margins(pairs)
        )
        accuracy = stats.accuracy.item()
        return {
            "eval/accuracy": accuracy,
            "eval/accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(pairs)),
            "eval/loss": loss.item(),
            "eval/margin": stats.margin.item(),
        }

    def train_step(self, pairs: Sequence[EncodedPair]) -> dict[str, float]:
        """One optimizer step on a mini-batch, accumulated over micro-batches to its exact mean."""
        settings = self.config.reward
        started = time.perf_counter()
        learning_rate = self.scheduler.get_last_lr()[0]
        found = torch.zeros(3, device=self.device)
        # By length within the mini-batch, which stays random: less padding, the same gradient.
        ordered = sorted(pairs, key=len)
        for start in range(0, len(ordered), settings.micro_batch_size):
            part = ordered[start : start + settings.micro_batch_size]
            scores = self._forward([*(p.chosen for p in part), *(p.rejected for p in part)])
            loss, stats = pairwise_loss(
                scores[: len(part)],
                scores[len(part) :],
                margin=self._margins(part),
                center_coef=settings.center_coef,
            )
            share = len(part) / len(pairs)
            (loss * share).backward()
            found += torch.stack((loss.detach(), stats.accuracy, stats.margin)) * share
        self.step += 1
        norm = optimizer_step(
            self.optimizer,
            self.scheduler,
            self.config.model.optimizer,
            f"the reward model, step {self.step}",
        )
        loss_value, accuracy, margin = found.tolist()
        seconds = time.perf_counter() - started
        return {
            "reward/loss": loss_value,
            "reward/accuracy": accuracy,
            "reward/margin": margin,
            "reward/grad_norm": norm.item(),
            "reward/learning_rate": learning_rate,
            "tokens_per_second": sum(len(p.chosen) + len(p.rejected) for p in pairs) / seconds,
        }

    def mini_batch(self, step: int) -> list[EncodedPair]:
        """The pairs of step 0, 1, …: each epoch is a fresh permutation, known from the seed."""
        epoch, place = divmod(step, self.steps_per_epoch)
        seed = f"{self.config.run.seed}/{epoch}"
        order = random.Random(seed).sample(range(len(self.training)), len(self.training))
        size = self.config.reward.batch_size
        return [self.training[i] for i in order[place * size : (place + 1) * size]]

    def _forward(self, rows: Sequence[list[int]]) -> Tensor:
        ids, mask = pad_left(rows, self.tokenizer.pad_token_id)
        with models.compute(self.device, self.dtype):
            return value_model.sequence_scores(
                self.model,
                torch.tensor(ids, device=self.device),
                torch.tensor(mask, device=self.device),
            )

    def _scores(self, rows: Sequence[list[int]], progress: Progress | None) -> Tensor:
        """Scores of any number of sequences, in micro-batches of similar length."""
        scores = torch.zeros(len(rows), device=self.device)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = 2 * self.config.reward.micro_batch_size  # as many sequences as in training
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        for picked in progress.track(parts, "held-out batch") if progress else parts:
            scores[picked] = self._forward([rows[i] for i in picked])
        return scores

    def _save_checkpoint(self, run: RunDirectory) -> None:
        with atomic_folder(run.checkpoint(self.step)) as folder:
            save_training_state(
                folder,
                {
                    "step": self.step,  # the data's position too: see `mini_batch`
                    "before": self.before,
                    "model": trainable_state(self.model),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "random": random_states(),
                },
            )

    def _restore(self, run: RunDirectory) -> None:
        newest = run.newest_checkpoint()
        if newest is None:
            run.rewind(-1)
            return
        state = load_training_state(newest[1], self.device)
        load_trainable_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        restore_random_states(state["random"])
        self.step, self.before = state["step"], state["before"]
        run.rewind(self.step)

    def _margins(self, pairs: Sequence[EncodedPair]) -> Tensor:
        return torch.tensor([pair.margin for pair in pairs], device=self.device)

    def _load_pairs(self, source: Any) -> tuple[list[EncodedPair], list[EncodedPair]]:
        data = self.config.data
        pairs = self._read(source)
        if data.max_pairs is not None and len(pairs) > data.max_pairs:
            # A sample, not the start: files are often sorted.
            chosen = random.Random(self.config.run.seed).sample(range(len(pairs)), data.max_pairs)
            pairs = [pairs[i] for i in sorted(chosen)]
        if data.eval_path is not None:
            training, held_out = pairs, self._read(data.eval_path)
        else:
            training, held_out = split_preferences(pairs, data.eval_fraction, self.config.run.seed)
        return self._encode(training, "training"), self._encode(held_out, "held-out")

    def _read(self, source: Any) -> list[Preference]:
        pairs, skipped = load_preferences(
            source, tokenizer=self.tokenizer, on_bad_line=self.config.data.on_bad_line
        )
        if skipped.total:
            self.notes.append(f"Preferences: {skipped}.")
        return pairs

    def _encode(self, pairs: Sequence[Preference], name: str) -> list[EncodedPair]:
        """Token ids; pairs that differ only beyond the limit are left out, and it is noted."""
        limit = self.config.data.max_tokens
        encoded, cut, same = [], 0, 0
        for pair in pairs:
            full = [
                encode_dialogue(self.tokenizer, pair.prompt, response, sys.maxsize)
                for response in (pair.chosen, pair.rejected)
            ]
            both = [
                ids
                if len(ids) <= limit
                else encode_dialogue(self.tokenizer, pair.prompt, response, limit)
                for ids, response in zip(full, (pair.chosen, pair.rejected), strict=True)
            ]
            cut += both != full
            if both[0] == both[1]:
                same += 1
                continue
            encoded.append(EncodedPair(both[0], both[1], pair.margin or 0.0))
        if cut:
            self.notes.append(
                f"{cut} of {len(pairs)} {name} pairs were cut to data.max_tokens={limit} tokens."
            )
        if same:
            self.notes.append(f"{same} {name} pairs are equal as tokens, and were left out.")
        if pairs and not encoded:
            raise UserError(
                f"No {name} pair is left: as tokens, chosen and rejected are the same within the "
                f"limit of data.max_tokens={limit}."
            )
        return encoded


def _accuracy(metrics: dict[str, float], pairs: int) -> str:
    return (
        f"held-out accuracy {metrics['eval/accuracy']:.1%} ± {metrics['eval/accuracy_se']:.1%} "
        f"(standard error, {pairs} pairs), loss {metrics['eval/loss']:.4f}"
    )
