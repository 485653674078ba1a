"""Training on given examples: the loop that the reward model and supervised fine-tuning share.

examples ─▶ mini-batch ─▶ gradient, summed over micro-batches ─▶ optimizer step ─▶ metrics

A trainer says what an example is, what its loss is and what is measured on held-out ones.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.data.digest import describe_rows
from ppo_engine.data.forms import text_note
from ppo_engine.data.rows import SkippedLines
from ppo_engine.data.split import overlap, split_by_prompt
from ppo_engine.errors import UserError, entry_point
from ppo_engine.memory import peak_memory, release_freed_memory
from ppo_engine.messages import counted
from ppo_engine.models import precision
from ppo_engine.models.budget import Budget
from ppo_engine.models.determinism import compute_deterministically
from ppo_engine.models.finite import Losses, NotFiniteError, Skips
from ppo_engine.models.optimizer import Learner
from ppo_engine.models.reader import Reader
from ppo_engine.pages.report.live import LivePage
from ppo_engine.pretrained import loading
from ppo_engine.pretrained.adapters import check_saving
from ppo_engine.run.checkpoint import Checkpoints, restore_random_states
from ppo_engine.run.directory import RunDirectory, atomic_folder, dated
from ppo_engine.run.progress import Progress
from ppo_engine.run.report import write_curves
from ppo_engine.run.signs import Watch, supervised_signs
from ppo_engine.run.trackers import Trackers, check_trackers
from ppo_engine.settings.files import as_dict, flatten
from ppo_engine.settings.schema import (
    RewardModelConfig,
    RewardModelSettings,
    SFTConfig,
    SFTSettings,
    resolved,
)
from ppo_engine.training import fit
from ppo_engine.training.batch_notes import few_steps_note
from ppo_engine.training.meter import Meter
from ppo_engine.training.order import epoch_order
from ppo_engine.training.summary import logged_rows, trained_weights, where

Row = TypeVar("Row", bound=Any)  # a row of the data, checked
Example = TypeVar("Example")  # the same as token ids


class SupervisedTrainer(ABC, Generic[Row, Example]):
    """Everything is loaded and checked when a trainer is made; `train` is the first to write."""

    command: ClassVar[str]  # the command, and the prefix of its metrics
    title: ClassVar[str]
    unit: ClassVar[str]  # what examples are called
    result: ClassVar[str]  # the trained model's folder within the run's

    config: RewardModelConfig | SFTConfig
    budget: Budget  # of passes, made with the model
    reader: Reader  # of it, as this

    def __init__(
        self,
        model: str | Path | PreTrainedModel | None,
        source: str | Path | Iterable[Any] | None,
        config: RewardModelConfig | SFTConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        console: Console | None,
    ) -> None:
        # The run's config.yaml names what is trained, and on what, however it was given, and
        # nothing where it was given as an object: a run is not to be resumed with another.
        given = loading.given_model(model)
        if given is not None:
            path = given if isinstance(given, str) else ""
            config = replace(cast(Any, config), model=replace(cast(Any, config.model), path=path))
        if source is not None:
            path = str(source) if isinstance(source, str | Path) else ""
            config = replace(cast(Any, config), data=replace(cast(Any, config.data), path=path))
        self.config = config = dated(config)
        as_dict(config)  # or a UserError: it will be written down
        self.console = console
        check_trackers(config.run.trackers)
        if config.run.offload:
            raise UserError(
                f"run.offload would have no effect: `{self.command}` has no frozen models. It is "
                "for `ppo` and `grpo`: leave it empty."
            )
        if config.run.deterministic:
            compute_deterministically()
        self.device = precision.choose_device(config.run.device)
        self.dtype = precision.choose_dtype(config.run.dtype, self.device)
        torch.manual_seed(config.run.seed)
        self.tokenizer = loading.open_tokenizer(given, config.model, tokenizer)
        self.notes: list[str] = []
        training, held_out = self._split(config.data.path if source is None else source)
        self.notes += text_note([*training, *held_out], self.tokenizer, self.unit)
        place = fit.place_of(config)  # before anything is loaded
        self.model = self._load_model(given)
        if config.run.save_adapters:
            check_saving(self.model)
        self.training = self._encode(training, "training")
        lengths = fit.text_lengths(cast(Any, self.training))
        fitted = fit.settled(config, lengths, place)
        self.notes += fit.note(fitted, lengths, place)
        self.notes += fit.checkpoint(config, fitted, {"model": self.reader})
        self.held_out = self._encode(held_out, "held-out")
        self.steps_per_epoch = math.ceil(len(self.training) / self.settings.batch_size)
        self.total_steps = self.steps_per_epoch * self.settings.epochs
        self.notes += few_steps_note(
            self.command,
            self.total_steps,
            len(self.training),
            self.settings.batch_size,
            self.unit,
        )
        optimizer = resolved(config).model.optimizer
        self.learner = Learner(self.model, optimizer, self.total_steps, "the model")
        self.skips = Skips(config.run.on_bad_numbers)
        self._meter = Meter(self.device, self.dtype)
        self.step = 0
        self.before: dict[str, float] = {}  # held-out metrics of the untrained model
        # Of a step that has trained and is not yet evaluated and logged.
        self._unreported: dict[str, float] | None = None
        data = {
            "training": describe_rows(training),
            "held out": describe_rows(held_out),
            "examples made of the training rows": str(len(self.training)),  # their order's length
        }
        self.checkpoints = Checkpoints(config.run, self._state, [self.learner], data, self.unit)
        release_freed_memory()  # of weights that were loaded in fp32

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
    def _backward(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Losses]:
        """Add the gradient of the mini-batch's mean loss; returns the metrics to log, and each
        pass's loss."""

    @abstractmethod
    def _tokens(self, example: Example) -> int:
        """The tokens that the model reads of an example."""

    @abstractmethod
    def _save_model(self, folder: Path) -> None: ...

    @abstractmethod
    def _summary(self, metrics: dict[str, float]) -> str:
        """Held-out metrics as a sentence."""

    @entry_point
    def train(self) -> dict[str, float]:
        """Train to the end, or from the newest checkpoint on; returns the last step's metrics.

        Where it fails, the last finished step is kept in a checkpoint, if its weights are still
        there, and the exception's notes say so. Writes the run's folder, with the model in Hugging
        Face format. Held-out metrics are `eval/…` after training and `eval_before/…` before it.
        """
        config = self.config.run
        run = RunDirectory(config.output_dir, self.config, config.resume, command=self.command)
        self.checkpoints.run = run
        with self.checkpoints.kept():
            if config.resume:
                self._restore(run)
            settings = flatten(as_dict(resolved(self.config)))
            logged = self.step - (self._unreported is not None)
            with closing(Trackers(config.trackers, run.path, settings, logged)) as trackers:
                metrics = self._train(run, trackers)
        write_curves(run.path, run.path / "report.png", self.title)
        before = {name.replace("eval/", "eval_before/"): x for name, x in self.before.items()}
        return {**metrics, **before}

    def _train(self, run: RunDirectory, trackers: Trackers) -> dict[str, float]:
        """All that `train` does between creating the run's folder and drawing the curves."""
        if not self.before and self.held_out:
            # With a progress of its own: the training's estimate of the time left stays right.
            title = f"Held-out {self.unit} before training"
            with Progress(1, title, moment="before training", console=self.console) as progress:
                self.before = self.evaluate(progress)
                run.log_metrics(0, self.before)
                trackers.log(0, self.before)
                progress.step(1, self.before)
        metrics: dict[str, float] = {}
        counts = f"{len(self.training)} {self.unit}, {len(self.held_out)} held out"
        title = f"{self.title}, {counts}"
        with Progress(self.total_steps, title, start=self.step, console=self.console) as progress:
            for note in (*filter(None, [run.take_note()]), *self.notes, self._size()):
                progress.note(note)
            rate = self.learner.config.learning_rate
            watch = Watch(supervised_signs(self.command, rate, self.before))
            page = LivePage(self.config.run.report_every, progress.note)
            self.checkpoints.mark()
            while self._unreported is not None or self.step < self.total_steps:
                if self._unreported is None:
                    with self.checkpoints.changing(steps=1):
                        with progress.phase("update"):
                            metrics = self._measured_step(self.mini_batch(self.step))
                        self._unreported = metrics | progress.times
                        self.checkpoints.mark()
                metrics = dict(self._unreported)
                last = self.step == self.total_steps
                if last and self.held_out:
                    with progress.phase("evaluate"):
                        metrics |= self.evaluate(progress)
                metrics["memory/peak"] = peak_memory(self.device)
                metrics |= progress.times
                run.log_metrics(self.step, metrics)
                trackers.log(self.step, metrics)
                progress.step(self.step, metrics)
                signs = watch.look({"step": self.step, **metrics})
                smaller = self.budget.take_note()
                for note in filter(None, (*self.skips.take_notes(), smaller, *signs)):
                    progress.note(note)
                self._unreported = None
                self.checkpoints.mark()
                self.checkpoints.save_if_due(last=last)
                page.write_if_due(run.path, self.step)
            if not metrics:  # resumed at its end
                metrics = next(reversed(logged_rows(run)), {})
                metrics.pop("step", None)
            with atomic_folder(run.path / self.result) as folder:
                self._save_model(folder)
            for note in watch.summary([row for row in logged_rows(run) if row["step"] > 0]):
                progress.note(note)
            if self.before and metrics:
                progress.note(f"Before training: {self._summary(self.before)}")
                progress.note(f"After training:  {self._summary(metrics)}")
            progress.note(f"The trained model is in {run.path / self.result}")
            page.write(run.path)
        return metrics

    def train_step(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer step on a mini-batch, accumulated over micro-batches to its exact mean."""
        started = time.perf_counter()
        learning_rate = self.learner.learning_rate
        found, losses = self._backward(examples)
        self.step += 1
        measured: dict[str, Tensor] = {}
        with self.skips.left_out(partial(self._named, examples=examples)):
            measured = {"grad_norm": self.learner.step(losses), **found}
        self.learner.refuse_bad_weights(self.step)
        metrics = {f"{self.command}/{name}": float(value) for name, value in measured.items()}
        seconds = time.perf_counter() - started
        return {
            **metrics,
            **self.skips.end_step(),
            f"{self.command}/learning_rate": learning_rate,
            "memory/pass_tokens": self.budget.limit.tokens,
            "tokens_per_second": sum(map(self._tokens, examples)) / seconds,
        }

    def _named(self, error: NotFiniteError, examples: Sequence[Example]) -> NotFiniteError:
        """With the step, and where in the data its examples are."""
        return error.at(self.step, lambda number: cast(Any, examples[number]).place)

    def _measured_step(self, examples: Sequence[Example]) -> dict[str, float]:
        """`train_step`, with what it achieves (`training.meter`)."""
        started = time.perf_counter()
        with self._meter.phase("update"):
            metrics = self.train_step(examples)
        tokens = sum(map(self._tokens, examples))
        return metrics | self._meter.metrics(tokens, time.perf_counter() - started)

    def mini_batch(self, step: int) -> list[Example]:
        """The examples of step 0, 1, …; the last of an epoch may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.config.run.seed, epoch, len(self.training))
        size = self.settings.batch_size
        return [self.training[i] for i in order[place * size : (place + 1) * size]]

    def _size(self) -> str:
        """What decides how long the run takes."""
        each = min(self.settings.batch_size, len(self.training))
        return (
            f"{counted(self.total_steps, 'step')} of {each} {self.unit}, the longest "
            f"of {max(map(self._tokens, self.training)):,} tokens; "
            f"{where(self.device, self.dtype)}; weights that are trained: "
            f"{trained_weights(self.model)}."
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,  # the data's position too: see `mini_batch`
            "before": self.before,
            "unreported": self._unreported,
            "model": self.learner.state_dict(),
        }

    def _restore(self, run: RunDirectory) -> None:
        state = self.checkpoints.load(self.device)
        self.notes += self.checkpoints.notes
        if state is None:
            self.notes.append(f"{run.path} has no checkpoint: the run starts from the beginning.")
            run.rewind(-1)
            return
        self.learner.load_state_dict(state["model"])
        restore_random_states(state["random"])
        self.step, self.before = state["step"], state["before"]
        self._unreported = state["unreported"]
        self.notes.insert(0, self.checkpoints.note_on_resuming(self.step, self.total_steps))
        run.rewind(self.step - (self._unreported is not None))

    def _split(self, source: Any) -> tuple[list[Row], list[Row]]:
        """The rows to train on, and those held out."""
        data = self.config.data
        rows, left_out = self._read(source)
        rows = self._limit(rows)
        if data.eval_path is None:
            seed = self.config.run.seed
            rows, held_out = split_by_prompt(rows, data.eval_fraction, seed, self.unit)
        else:
            held_out, of_held_out = self._read(data.eval_path)
            left_out += of_held_out
            self.notes += overlap(rows, held_out, "data.eval_path")
        self.notes += left_out.notes(self.unit.capitalize())
        return rows, held_out

    def _limit(self, rows: list[Row]) -> list[Row]:
        """As many of the rows as the settings ask for."""
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
