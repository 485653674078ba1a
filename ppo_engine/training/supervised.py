"""Training on given examples: the loop that the reward model and supervised fine-tuning share.

examples ─▶ mini-batch ─▶ gradient, summed over micro-batches ─▶ optimizer step ─▶ metrics

A trainer says what an example is, what its loss is and what is measured on held-out ones.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.data.rows import SkippedLines
from ppo_engine.data.split import split_by_prompt
from ppo_engine.errors import UserError
from ppo_engine.models import loading, precision
from ppo_engine.models.adapter_folder import tokenizer_source
from ppo_engine.models.optimizer import Learner
from ppo_engine.run.checkpoint import (
    load_training_state,
    random_states,
    restore_random_states,
    save_training_state,
)
from ppo_engine.run.directory import RunDirectory, atomic_folder
from ppo_engine.run.progress import Progress
from ppo_engine.run.report import write_curves
from ppo_engine.run.trackers import Trackers, check_trackers
from ppo_engine.settings.files import as_dict, flatten
from ppo_engine.settings.schema import (
    RewardModelConfig,
    RewardModelSettings,
    SFTConfig,
    SFTSettings,
)
from ppo_engine.text.tokenizer import load_tokenizer, separate_pad_from_eos

Row = TypeVar("Row", bound=Any)  # a row of the data, checked
Example = TypeVar("Example")  # the same as token ids


class SupervisedTrainer(ABC, Generic[Row, Example]):
    """Everything is loaded and checked when a trainer is made; `train` is the first to write."""

    command: ClassVar[str]  # the command, and the prefix of its metrics
    title: ClassVar[str]
    unit: ClassVar[str]  # what examples are called
    result: ClassVar[str]  # the trained model's folder within the run's

    config: RewardModelConfig | SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None,
        source: str | Path | Iterable[Any] | None,
        config: RewardModelConfig | SFTConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        console: Console | None,
    ) -> None:
        # The run's config.yaml names what is trained, and on what, however it was given.
        if isinstance(model, str):
            config = replace(cast(Any, config), model=replace(cast(Any, config.model), path=model))
        if isinstance(source, str | Path):
            data = replace(cast(Any, config.data), path=str(source))
            config = replace(cast(Any, config), data=data)
        self.config = config
        self.console = console
        check_trackers(config.run.trackers)
        self.device = precision.choose_device(config.run.device)
        self.dtype = precision.choose_dtype(config.run.dtype, self.device)
        torch.manual_seed(config.run.seed)
        if tokenizer is None:
            if isinstance(model, PreTrainedModel):
                raise UserError("A model object was given without its tokenizer: pass tokenizer=….")
            path = loading.resolve(config.model.path)
            loading.load_model_config(path)
            tokenizer = load_tokenizer(tokenizer_source(path))
        separate_pad_from_eos(tokenizer)  # of a model object
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        training, held_out = self._split(config.data.path if source is None else source)
        self.model = self._load_model(model)
        self.training = self._encode(training, "training")
        self.held_out = self._encode(held_out, "held-out")
        self.steps_per_epoch = math.ceil(len(self.training) / self.settings.batch_size)
        self.total_steps = self.steps_per_epoch * self.settings.epochs
        self.learner = Learner(self.model, config.model.optimizer, self.total_steps, "the model")
        self.step = 0
        self.before: dict[str, float] = {}  # held-out metrics of the untrained model

    @property
    @abstractmethod
    def settings(self) -> RewardModelSettings | SFTSettings:
        """The section of the method's own settings."""

    @abstractmethod
    def evaluate(self, progress: Progress | None = None) -> dict[str, float]:
        """Metrics of the held-out examples, `eval/…`; a `UserError` where there are none."""

    @abstractmethod
    def _read(self, source: Any) -> tuple[list[Row], SkippedLines]:
        """The rows of a file or a sequence, checked, and what was left out."""

    @abstractmethod
    def _load_model(self, model: str | PreTrainedModel | None) -> Any:
        """The model to be trained, in training mode."""

    @abstractmethod
    def _encode(self, rows: Sequence[Row], name: str) -> list[Example]:
        """Rows as token ids; `name` says which of the two sets they are."""

    @abstractmethod
    def _backward(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Add the gradient of the mini-batch's mean loss; returns the metrics to log."""

    @abstractmethod
    def _tokens(self, example: Example) -> int:
        """The tokens that the model reads of an example."""

    @abstractmethod
    def _save_model(self, folder: Path) -> None: ...

    @abstractmethod
    def _summary(self, metrics: dict[str, float]) -> str:
        """Held-out metrics as a sentence."""

    def train(self) -> dict[str, float]:
        """Train to the end, or from the newest checkpoint on; returns the last step's metrics.

        Writes the run's folder, with the model in Hugging Face format. Held-out metrics are
        `eval/…` after training and `eval_before/…` before it.
        """
        config = self.config.run
        run = RunDirectory(config.output_dir, self.config, config.resume, command=self.command)
        if config.resume:
            self._restore(run)
        settings = flatten(as_dict(self.config))
        trackers = Trackers(config.trackers, run.path, settings, self.step)
        try:
            metrics = self._train(run, trackers)
        finally:
            trackers.close()
        write_curves(run.path, run.path / "report.png", self.title)
        before = {name.replace("eval/", "eval_before/"): x for name, x in self.before.items()}
        return {**metrics, **before}

    def _train(self, run: RunDirectory, trackers: Trackers) -> dict[str, float]:
        """All that `train` does between creating the run's folder and drawing the curves."""
        if not self.before and self.held_out:
            # With a progress of its own: the training's estimate of the time left stays right.
            title = f"Held-out {self.unit} before training"
            with Progress(1, title, console=self.console) as progress:
                self.before = self.evaluate(progress)
                run.log_metrics(0, self.before)
                trackers.log(0, self.before)
                progress.step(1, self.before)
        metrics: dict[str, float] = {}
        counts = f"{len(self.training)} {self.unit}, {len(self.held_out)} held out"
        title = f"{self.title}, {counts}"
        with Progress(self.total_steps, title, start=self.step, console=self.console) as progress:
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
                every = self.config.run.checkpoint_every
                if last or (every and self.step % every == 0):
                    self._save_checkpoint(run)
            if not metrics and self.held_out:  # resumed at its end
                metrics = self.evaluate(progress)
            with atomic_folder(run.path / self.result) as folder:
                self._save_model(folder)
            if self.before and metrics:
                progress.note(f"Before training: {self._summary(self.before)}")
                progress.note(f"After training:  {self._summary(metrics)}")
            progress.note(f"The trained model is in {run.path / self.result}")
        return metrics

    def train_step(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer step on a mini-batch, accumulated over micro-batches to its exact mean."""
        started = time.perf_counter()
        learning_rate = self.learner.learning_rate
        found = self._backward(examples)
        self.step += 1
        found["grad_norm"] = self.learner.step()
        metrics = {f"{self.command}/{name}": float(value) for name, value in found.items()}
        seconds = time.perf_counter() - started
        return {
            **metrics,
            f"{self.command}/learning_rate": learning_rate,
            "tokens_per_second": sum(map(self._tokens, examples)) / seconds,
        }

    def mini_batch(self, step: int) -> list[Example]:
        """The examples of step 0, 1, …: each epoch is a fresh permutation, fixed by the seed."""
        epoch, place = divmod(step, self.steps_per_epoch)
        seed = f"{self.config.run.seed}/{epoch}"
        order = random.Random(seed).sample(range(len(self.training)), len(self.training))
        size = self.settings.batch_size
        return [self.training[i] for i in order[place * size : (place + 1) * size]]

    def _save_checkpoint(self, run: RunDirectory) -> None:
        with atomic_folder(run.checkpoint(self.step)) as folder:
            save_training_state(
                folder,
                {
                    "step": self.step,  # the data's position too: see `mini_batch`
                    "examples": self._digest(),
                    "before": self.before,
                    "model": self.learner.state_dict(),
                    "random": random_states(),
                },
            )

    def _restore(self, run: RunDirectory) -> None:
        newest = run.newest_checkpoint()
        if newest is None:
            run.rewind(-1)
            return
        state = load_training_state(newest[1], self.device)
        if state["examples"] != self._digest():
            raise UserError(
                f"The {self.unit} are not those of the run in {run.path}, so held-out ones may "
                "have been trained on: resume it with the same data, or start a new run."
            )
        self.learner.load_state_dict(state["model"])
        restore_random_states(state["random"])
        self.step, self.before = state["step"], state["before"]
        run.rewind(self.step)

    def _digest(self) -> str:
        """Hash of all examples, and of which are held out."""
        digest = hashlib.sha256()
        for examples in (self.training, self.held_out):
            digest.update(f"{len(examples)} examples".encode())
            for example in examples:
                digest.update(repr(example).encode())
        return digest.hexdigest()

    def _split(self, source: Any) -> tuple[list[Row], list[Row]]:
        """The rows to train on, and those held out."""
        data = self.config.data
        rows = self._limit(self._read_noting(source))
        if data.eval_path is not None:
            return rows, self._read_noting(data.eval_path)
        return split_by_prompt(rows, data.eval_fraction, self.config.run.seed, self.unit)

    def _limit(self, rows: list[Row]) -> list[Row]:
        """As many of the rows as the settings ask for."""
        return rows

    def _read_noting(self, source: Any) -> list[Row]:
        rows, skipped = self._read(source)
        if skipped.total:
            self.notes.append(f"{self.unit.capitalize()}: {skipped}.")
        return rows


def mean_by_cluster(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """The mean of all observations, and its standard error where those of a cluster (the pairs of
    one prompt, the tokens of its responses) depend on each other; NaN where there is but one.

    `sums`, `counts`: `[clusters]`, of each one's observations; those without any are no clusters.
    The error of G of them is that of a ratio, sqrt(G/(G-1) sum (s - mean n)^2) / sum n (Cochran
    1977, section 2.11; Liang and Zeger 1986).
    """
    sums, counts = sums.double(), counts.double()
    mean = sums.sum() / counts.sum()
    clusters = (counts > 0).sum()
    squares = (sums - mean * counts).square().sum() * clusters / (clusters - 1)
    error = squares.sqrt() / counts.sum() if clusters > 1 else counts.new_tensor(math.nan)
    return mean.item(), error.item()
