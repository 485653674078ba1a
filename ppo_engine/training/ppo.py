"""The PPO training loop: prompts in, a trained policy and its critic in a folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.data.digest import describe_rows
from ppo_engine.data.forms import reading, text_note
from ppo_engine.data.prompts import (
    PromptExample,
    column_names,
    columns_of,
    limit_prompts,
    load_prompts,
    prompts_from_sequence,
)
from ppo_engine.data.rows import SkippedLines
from ppo_engine.data.split import overlap
from ppo_engine.errors import UserError, entry_point
from ppo_engine.memory import peak_memory
from ppo_engine.messages import counted
from ppo_engine.models.notes import training_notes
from ppo_engine.pages.report.live import LivePage
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.estimators import TITLES
from ppo_engine.ppo.roles import optimizer_steps
from ppo_engine.pretrained import loading
from ppo_engine.rewards.sources import with_rewards
from ppo_engine.rewards.weighted import RewardsLike, reward_metrics
from ppo_engine.rollout.batch import Rollout
from ppo_engine.rollout.environment import Environment
from ppo_engine.rollout.generation import room_for_prompts
from ppo_engine.run.checkpoint import Checkpoints, restore_random_states, seeded
from ppo_engine.run.directory import RunDirectory, check_output, dated
from ppo_engine.run.progress import Progress
from ppo_engine.run.report import write_curves
from ppo_engine.run.signs import Watch, ppo_signs, refuse_collapse
from ppo_engine.run.trackers import Trackers, check_trackers
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.files import as_dict, flatten, shown_settings
from ppo_engine.settings.schema import PPOConfig, resolved, settings_of
from ppo_engine.training import anatomy, fit
from ppo_engine.training.batch_notes import batch_notes
from ppo_engine.training.evaluation import Evaluator, hold_out
from ppo_engine.training.meter import Meter
from ppo_engine.training.order import epoch_order
from ppo_engine.training.recording import Recorder, discard_records
from ppo_engine.training.samples import sample_rows, show_samples
from ppo_engine.training.summary import logged_rows, size_of_ppo, tell_outcome


class PPOTrainer:
    """Runs `PPOEngine` over a set of prompts.

    Models, reward and prompts are loaded and checked here; `train` writes nothing before the first
    responses have been scored.
    """

    @entry_point
    def __init__(
        self,
        policy: str | Path | PreTrainedModel = "",
        reward: RewardsLike | None = None,
        prompts: str | Path | Iterable[Any] | None = None,
        *,
        config: PPOConfig | Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        environment: Callable[..., Any] | Environment | None = None,
        console: Console | None = None,
    ) -> None:
        """`prompts` is a file, or texts, lists of chat messages, or dictionaries as
        `data.prompts.load_prompts` takes them; all else is as `PPOEngine` takes it. What is not
        given comes from `config`. Progress goes to `console`, by default the terminal."""
        config = settings_of(PPOConfig, config)
        # The run's config.yaml names what is trained, however it was given, and nothing where it
        # was given as an object: a run is not to be resumed with another.
        given = loading.given_model(policy)
        if not (given is None or given == ""):
            path = given if isinstance(given, str) else ""
            config = replace(config, policy=replace(config.policy, path=path))
        if reward is not None:
            config = replace(config, reward=with_rewards(config.reward, reward))
        if prompts is not None:
            path = str(prompts) if isinstance(prompts, str | Path) else ""
            config = replace(config, data=replace(config.data, path=path))
        self.config = config = dated(config)
        as_dict(config)  # or a UserError: it will be written down
        self.console = console
        check_trackers(config.run.trackers)
        check_settings(config)
        check_output(config.run.output_dir, config.run.resume)
        self.notes: list[str] = []
        tokenizer = loading.open_tokenizer(given, config.policy, tokenizer)
        examples, left_out = self._read(config.data.path if prompts is None else prompts, tokenizer)
        held_out: list[PromptExample] = []
        if config.evaluation.path:
            held_out, of_held_out = self._read(config.evaluation.path, tokenizer)
            left_out += of_held_out
        self.notes += text_note([*examples, *held_out], tokenizer, "prompts")
        place = fit.place_of(config)  # before anything is loaded
        self.engine = PPOEngine(
            policy, reward, config=config, tokenizer=tokenizer, environment=environment
        )
        self.notes += left_out.notes("Prompts", self._reads)
        self.examples = self._limited(examples)
        if config.evaluation.prompts:
            self.examples, held_out = hold_out(
                self.examples, config.evaluation.prompts, config.run.seed
            )
        elif held_out:
            held_out = self._limited(held_out)
            self.notes += overlap(self.examples, held_out, "evaluation.path")
        for examples in filter(None, (self.examples, held_out)):
            self.engine.check_columns(column_names(examples))
            self.engine.rewards.check_prompts(examples)
            self.engine.rewards.check_rows(examples)
        with seeded(f"{config.run.seed}/trial"):
            self.engine.rewards.try_functions(
                self.examples,
                config.ppo.group_size,
                several_turns=self.engine.environment is not None,
            )
        self.notes += batch_notes(config.ppo, len(self.examples))
        lengths = fit.prompt_lengths(self.examples, self.engine.policy.renderer)
        fitted = fit.settled(config, lengths, place)
        self.notes += fit.note(fitted, lengths, place)
        trained = {"policy": self.engine.policy, "critic": self.engine.critic}
        self.notes += fit.checkpoint(config, fitted, {n: x.reader for n, x in trained.items() if x})
        self.evaluator = Evaluator(self.engine, held_out)
        self.notes += training_notes(self.engine.policy) + self.engine.sampler.notes
        self._meter = Meter(self.engine.device, self.engine.dtype)
        self._watch = Watch(ppo_signs(config))
        self._recorder = Recorder(self.engine)
        self.step = 0
        # Metrics and samples of a step that has trained and is not yet evaluated and logged.
        self._unreported: dict[str, Any] | None = None
        data = {"training": describe_rows(self.examples), "held out": describe_rows(held_out)}
        self.checkpoints = Checkpoints(
            config.run, self._state, self.engine.learners, data, "prompts"
        )
        self._trackers: Trackers | None = None
        self._closing = ExitStack()

    @entry_point
    def train(self) -> dict[str, float]:
        """Train to the end, or from the newest checkpoint on; returns the last step's metrics.

        Writes the run's folder: the policy in `policy/`, the critic in `critic/`, both in Hugging
        Face format, with curves in `report.png` and all of it in `report.html`. With
        `config.profile`, the second step from here, or the only one, is profiled (the first warms
        up): see `anatomy`. With held-out prompts (`config.evaluation`) it may stop early, and
        `best/` holds the best policy. Where it fails, the last finished step is kept in a
        checkpoint, if its weights are still there, and the exception's notes say so.
        """
        with self._closing, self.checkpoints.kept():  # trackers are closed, whatever happens
            return self._train()

    def _train(self) -> dict[str, float]:
        config = self.config.run
        metrics: dict[str, float] = {}
        self.checkpoints.run = self._trackers = None
        if config.resume:
            self._restore(self._open_run())
        if self.step == 0 and self.evaluator.due(0):
            self._evaluate_untrained()
        profiled = min(self.step + 2, self.config.steps) if self.config.profile else None
        held_out = len(self.evaluator.examples)
        title = f"{self.title}, {counted(len(self.examples), 'prompt')}"
        title += f", {held_out} held out" * bool(held_out)
        with Progress(self.config.steps, title, start=self.step, console=self.console) as progress:
            for note in (*self.notes, size_of_ppo(self.engine)):
                progress.note(note)
            page = LivePage(self.config.run.report_every, progress.note)
            self.checkpoints.mark()
            while self._unreported is not None or not self._done():
                if self._unreported is None:
                    self._take_step(progress, profile=self.step + 1 == profiled)
                metrics = self._report(progress)
                self.checkpoints.mark()
                refuse_collapse(self.config.ppo, {"step": self.step, **metrics})
                self.checkpoints.save_if_due(last=self._done())
                page.write_if_due(self._open_run().path, self.step)
            run = self._open_run()
            if not metrics:  # resumed at its end
                metrics = next(reversed(logged_rows(run)), {})
                metrics.pop("step", None)
            self.engine.save(run.path)
            tell_outcome(run, held_out, self._watch, progress)
            progress.note(f"The policy is in {run.path / 'policy'}")
            for note in self.evaluator.notes():
                progress.note(note)
            page.write(run.path)
        write_curves(run.path, run.path / "report.png", self.title)
        return metrics

    @property
    def title(self) -> str:
        """The method's name."""
        return TITLES[self.config.ppo.estimator]

    def batch(self, step: int) -> list[PromptExample]:
        """The prompts of step 0, 1, …; a batch that reaches the end of an epoch goes on in the
        next."""
        settings, total = self.config.ppo, len(self.examples)
        size = settings.rollout_batch_size // settings.group_size
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: epoch_order(self.config.run.seed, epoch, total)
            for epoch in {place // total for place in places}
        }
        return [self.examples[orders[place // total][place % total]] for place in places]

    def _take_step(self, progress: Progress, profile: bool) -> None:
        """Sample, score and learn; what there is to report of it waits in `_unreported`."""
        started = time.perf_counter()
        with ExitStack() as updating:
            with anatomy.recording(self.engine) if profile else nullcontext() as recorded:
                rollout, rewards = self._sample(progress)
                scores = self.engine.rewards.total(rewards)
                rounding = self.engine.rewards.rounding(rewards)
                # Only now: a reward that fails on its first responses leaves nothing behind.
                run = self._open_run()
                self._open_trackers(run)
                experience = begun = None
                with self._phase(progress, "advantages"), self.engine.skips.left_out():
                    experience = self.engine.estimate_advantages(rollout, scores, rounding)
                if experience is not None and self._recorder.is_due(run, self.step + 1):
                    with progress.phase("record"):
                        begun = self._recorder.begin(experience)
                steps = optimizer_steps(self.config) * len(self.engine.learners)
                updating.enter_context(self.checkpoints.changing(steps))
                with self._phase(progress, "update"):
                    if experience is not None:
                        metrics = self.engine.update(experience)
                    else:
                        metrics = self.engine.leave_out_step()
            of_update = dict(metrics)
            self.step += 1
            tokens = int(rollout.mask.sum())
            seconds = time.perf_counter() - started
            metrics["tokens_per_second"] = tokens / seconds
            metrics |= self._meter.metrics(tokens, seconds)
            metrics |= reward_metrics(rewards) | progress.times
            self._unreported = {"metrics": metrics, "samples": self._samples(rollout, rewards)}
            self.checkpoints.mark()
        if begun is not None:
            with progress.phase("record"):
                self._recorder.write(run, self.step, begun, rewards, of_update)
        if recorded is not None:
            self._write_profile(recorded, run, progress)

    def _report(self, progress: Progress) -> dict[str, float]:
        """Evaluate, log and show the step that was taken; returns its metrics."""
        assert self._unreported is not None
        run = self._open_run()
        trackers = self._open_trackers(run)
        metrics, samples = dict(self._unreported["metrics"]), list(self._unreported["samples"])
        if self.evaluator.due(self.step):
            evaluation = self.evaluator.evaluate(progress)
            self.evaluator.keep(self.step, evaluation, run)
            metrics |= evaluation.metrics
            samples += evaluation.samples
        metrics["memory/peak"] = peak_memory(self.engine.device)
        metrics["memory/pass_tokens"] = self.engine.budget.limit.tokens
        metrics |= progress.times
        run.log_metrics(self.step, metrics)
        trackers.log(self.step, metrics)
        progress.step(self.step, metrics)
        show_samples(self.step, samples, run, trackers, progress)
        signs = self._watch.look({"step": self.step, **metrics})
        notes = [*self.engine.take_notes(), *self._recorder.take_notes(), *signs]
        for note in (*filter(None, [run.take_note()]), *notes):
            progress.note(note)
        self._unreported = None
        return metrics

    def _sample(self, progress: Progress) -> tuple[Rollout, dict[str, Tensor]]:
        """The step's responses, and each reward's scores of them."""
        examples = self.batch(self.step)
        with self._phase(progress, "generate"):
            rollout = self.engine.generate([e.prompt for e in examples], columns_of(examples))
        with self._phase(progress, "score"):
            return rollout, self.engine.score_each(rollout)

    @contextmanager
    def _phase(self, progress: Progress, name: str) -> Iterator[None]:
        """Name, time and count what runs in the block."""
        with progress.phase(name), self._meter.phase(name):
            yield

    def _done(self) -> bool:
        return self.step >= self.config.steps or self.evaluator.out_of_patience

    def _evaluate_untrained(self) -> None:
        """Evaluate before the first step, with a progress of its own: the training's estimate of
        the time left stays right."""
        title = "Held-out prompts before training"
        with Progress(1, title, moment="before training", console=self.console) as progress:
            evaluation = self.evaluator.evaluate(progress)
            run = self._open_run()
            trackers = self._open_trackers(run)
            self.evaluator.keep(0, evaluation, run)
            run.log_metrics(0, evaluation.metrics)
            trackers.log(0, evaluation.metrics)
            progress.step(1, evaluation.metrics)
            show_samples(0, evaluation.samples, run, trackers, progress)

    def _samples(self, rollout: Rollout, rewards: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Rows for samples.jsonl, in the steps that log some."""
        every = self.config.run.sample_every
        if not every or (self.step - 1) % every:
            return []
        return sample_rows(rollout, rewards, self.engine.rewards.total(rewards))

    def _open_run(self) -> RunDirectory:
        """The run's folder, created or opened where it has not been."""
        config = self.config.run
        command = self.config.ppo.estimator if self.engine.critic is None else "ppo"
        self.checkpoints.run = self.checkpoints.run or RunDirectory(
            config.output_dir, self.config, config.resume, command=command
        )
        return self.checkpoints.run

    def _open_trackers(self, run: RunDirectory) -> Trackers:
        if self._trackers is not None:
            return self._trackers
        settings = flatten(shown_settings(as_dict(resolved(self.config))))
        logged = self.step - (self._unreported is not None)
        self._trackers = Trackers(self.config.run.trackers, run.path, settings, logged)
        self._closing.callback(self._trackers.close)
        return self._trackers

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,  # the data's position too: see `batch`
            "engine": self.engine.state_dict(),
            "evaluator": self.evaluator.state_dict(),
            "unreported": self._unreported,
        }

    def _write_profile(self, profile: Any, run: RunDirectory, progress: Progress) -> None:
        folder = run.path / "profile"
        with progress.phase("profile"):
            title = f"Anatomy of step {self.step}"
            progress.note(anatomy.write_profile(profile, folder, title))
        progress.note(f"Trace and table are in {folder}; the trace opens in ui.perfetto.dev.")

    def _restore(self, run: RunDirectory) -> None:
        state = self.checkpoints.load(self.engine.device)
        self.notes += self.checkpoints.notes
        if state is None:
            self.notes.append(f"{run.path} has no checkpoint: the run starts from the beginning.")
            run.rewind(-1)
            discard_records(run.path, after=0)
            return
        self.engine.load_state_dict(state["engine"])
        self.evaluator.load_state_dict(state["evaluator"], run)
        restore_random_states(state["random"])
        self.step, self._unreported = state["step"], state["unreported"]
        self.notes.insert(0, self.checkpoints.note_on_resuming(self.step, self.config.steps))
        run.rewind(self.step - (self._unreported is not None))
        discard_records(run.path, after=self.step)

    def _read(
        self, source: str | Path | Iterable[Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[PromptExample], SkippedLines]:
        if isinstance(source, str) and not source:
            raise UserError("No prompts were given: pass prompts=…, or set data.path.")
        data = self.config.data
        options = {"on_bad_line": data.on_bad_line, **reading(data)}
        if isinstance(source, str | Path):
            return load_prompts(source, tokenizer=tokenizer, **options)
        return prompts_from_sequence(source, tokenizer=tokenizer, **options)

    def _reads(self, column: str) -> bool:
        """Whether a reward or the environment asks for a column of the data."""
        environment = self.engine.environment
        asked = environment is not None and environment.accepts(column)
        return asked or self.engine.rewards.reads(column)

    def _limited(self, examples: Sequence[PromptExample]) -> list[PromptExample]:
        kept, skipped = limit_prompts(
            examples,
            self.engine.policy.renderer,
            self.config.data.max_prompt_tokens,
            room=room_for_prompts(self.engine.policy.model, self.config.generation),
            on_bad_line=self.config.data.on_bad_line,
        )
        self.notes += skipped.notes("Prompts")
        return kept
