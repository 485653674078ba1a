"""The folder of a run: settings, metrics, samples, checkpoints, the result.

config.yaml            resolved settings
metrics.jsonl          one line per step
samples.jsonl          some responses of some steps (PPO)
critic.jsonl           the critic's values on held-out responses, and their scores
rollouts/step-…/       some steps as they were, token by token (PPO; `rollout_record`)
checkpoints/step-…/    what a resumed run continues from
policy/, critic/ or reward_model/   the result, Hugging Face format
best/                  the policy with the best held-out score so far
report.png             the curves
report.html            all of it, to look at in a browser
profile/               a step's time by phase, with a trace (profile=true)
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from ppo_engine.errors import MachineError, UserError
from ppo_engine.messages import first_line, nearest_path, unwritten
from ppo_engine.run.lock import Lock
from ppo_engine.run.row_file import as_line
from ppo_engine.sealed import seal, sync
from ppo_engine.settings.describe import dump_config
from ppo_engine.settings.files import as_dict, changed_settings, load_config
from ppo_engine.settings.schema import resolved

Config = TypeVar("Config", bound=Any)

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"

# A resumed run may differ in these: how long it runs, where it is, and what it shows.
_FREE_KEYS = {
    "steps",
    "profile",
    "run.resume",
    "run.output_dir",
    "run.device",
    "run.offload",
    "run.save_dtype",
    "run.on_bad_numbers",
    "run.checkpoint_every",
    "run.checkpoint_minutes",
    "run.keep_checkpoints",
    "run.sample_every",
    "run.record_rollouts",
    "run.report_every",
    "run.trackers",
    "evaluation.patience",
    # What one changes after a run that was out of memory, or whose endpoint was too slow.
    "ppo.micro_batch_size",
    "ppo.micro_batch_tokens",
    "reward.micro_batch_size",
    "reward.micro_batch_tokens",
    "sft.micro_batch_size",
    "sft.micro_batch_tokens",
    "reward.http.timeout",
    "reward.http.batch_size",
    "reward.http.token_env",
    "ppo.stop_at_kl",
    "ppo.stop_at_entropy",
}


_RUNS = Path("runs")  # where runs are that are given no folder


class RunDirectory:
    """Creates the folder of a new run, or opens that of a run to resume, for one process at a time:
    until `close`, another is refused.

    Everything is checked before anything is written. An empty `path` means
    `runs/<command>-<time>`.
    """

    def __init__(
        self, path: str | Path, config: Any, resume: bool = False, *, command: str = "run"
    ) -> None:
        if resume:
            settings_file(path)
        self.path = Path(path).expanduser() if str(path) else _default_path(command)
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.critic_file = self.path / "critic.jsonl"
        if resume:
            check_resumable(self.path, config)
        else:
            _check_free(self.path, "run.output_dir" if hasattr(config, "run") else "output_dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / ".lock", f"Run folder {self.path}", "run.output_dir")
            self._note = None if self._lock.held else _without_locks(self.path)
            write_atomically(self.path / CONFIG, dump_config(config))
        except OSError as error:
            raise unwritten(f"Run folder {self.path}", error) from error

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release()

    def take_note(self) -> str | None:
        """What is to be said of the folder, once."""
        note, self._note = self._note, None
        return note

    def checkpoint(self, step: int) -> Path:
        return folder_of_step(self.path / CHECKPOINTS, step)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and folders of all complete checkpoints, the newest first."""
        return [*reversed(steps_in(self.path / CHECKPOINTS).items())]

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        _append(self.metrics_file, [{"step": step, **metrics}])

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        _append(self.samples_file, [{"step": step, **sample} for sample in samples])

    def log_critic(self, step: int, points: Mapping[str, Any]) -> None:
        _append(self.critic_file, [{"step": step, **points}])

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step`, and one that a crash left unfinished."""
        self._each_log(lambda file: write_atomically(file, "".join(_lines_until(file, step))))

    def sync(self) -> None:
        """Wait until the lines that were appended are on the disk."""
        self._each_log(sync)

    def _each_log(self, do: Callable[[Path], None]) -> None:
        for file in (self.metrics_file, self.samples_file, self.critic_file):
            if file.exists():
                try:
                    do(file)
                except OSError as error:
                    raise _broken(file, error) from error


def folder_of_step(parent: Path, step: int) -> Path:
    return parent / f"step-{step:06d}"


def steps_in(parent: Path) -> dict[int, Path]:
    """The complete folders of steps in `parent`, the first first."""
    names = ((x.name.removeprefix("step-"), x) for x in parent.glob("step-[0-9]*"))
    return dict(sorted((int(name), folder) for name, folder in names if name.isdecimal()))


def check_resumable(path: str | Path, config: Any) -> None:
    """Raise a UserError where no run is in the folder `path`, or one of other settings."""
    file = settings_file(path)
    then, now = (as_dict(resolved(x)) for x in (load_config(type(config), str(file)), config))
    changed = changed_settings(then, now, _FREE_KEYS)
    if changed:
        raise UserError(
            f"The run in {file.parent} was made with other settings; resume it with the same "
            "ones, or start a new run:\n" + "\n".join(f"  - {line}" for line in changed)
        )


def settings_file(path: str | Path) -> Path:
    """The settings of the run in the folder `path`; a UserError where no run is there."""
    if not str(path):
        raise UserError("run.resume needs run.output_dir: the folder of the run to resume.")
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        near = "" if folder.is_dir() else nearest_path(folder)
        raise UserError(
            f"{folder} has no run to resume ({CONFIG} is missing): fix run.output_dir, or start "
            f"a new run with run.resume=false.{near}"
        )
    return folder / CONFIG


def dated(config: Config) -> Config:
    """`config` with the date of its run in `run.date`: the day on which it began, in a resumed run
    too, so that chat templates which show the date render what they rendered then."""
    run = config.run
    if run.date is not None:
        return config
    date = datetime.date.today()
    began = Path(run.output_dir).expanduser() / CONFIG
    if run.resume and run.output_dir and began.is_file():
        date = load_config(type(config), str(began)).run.date or date
    return replace(config, run=replace(run, date=date))


def check_output(path: str | Path, resume: bool = False, setting: str = "run.output_dir") -> None:
    """Raise a `UserError`, before any work, for a folder that a new run could not be written to, or
    that has no run to `resume`; `setting` names it."""
    folder = Path(path).expanduser()
    if resume:
        settings_file(path)
        return
    if not str(path):
        folder = _RUNS
    else:
        _check_free(folder, setting)
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        choose = "" if str(path) else f" Choose a folder: {setting}."
        raise UserError(
            f"Run folder {folder} cannot be written: {parent} is not a folder to write to.{choose}"
        )


def _check_free(path: Path, setting: str) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"Run folder {path} is a file; choose another {setting}.")
    # A run that was killed before it wrote its settings leaves no more than hidden files.
    if path.is_dir() and any(not inside.name.startswith(".") for inside in path.iterdir()):
        resumable = (path / CONFIG).exists() and setting == "run.output_dir"  # no demo is
        hint = "resume that run (run.resume=true), " if resumable else ""
        raise UserError(
            f"Run folder {path} is not empty: {hint}choose another {setting}, or remove the folder."
        )


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears at `path` complete or not at all, replacing what was there.

    Yields an empty sibling to write into; on success it is sealed (see `sealed`) and renamed, on
    failure removed. It is on the disk when this returns.
    """
    path = Path(path)
    if path.is_symlink():  # which stays: what it leads to is replaced
        path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        seal(partial)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        partial.rename(path)
        sync(path.parent)
    except BaseException as error:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        if isinstance(error, OSError | SafetensorError):
            raise _broken(path, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def replacing(path: str | Path, mark: str, what: str) -> Iterator[Path]:
    """As `atomic_folder`, for a folder that a user names: it may be free, or hold `what` it is to
    replace, of which it has the file `mark`. A UserError where anything else would be lost."""
    path = Path(path).expanduser()
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not free and not (path / mark).is_file():
        raise UserError(f"{path} is no {what} to replace: choose a folder of its own for it.")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {parent} is not a folder to write to.")
    with atomic_folder(path) as folder:
        yield folder


def _default_path(command: str) -> Path:
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return _RUNS / f"{command}-{started}"


def _without_locks(path: Path) -> str:
    return (
        f"The file system of {path} has no locks, so nothing keeps a second run from writing "
        "there, which would spoil both: see to it that there is one."
    )


def _broken(path: Path, error: Exception) -> MachineError:
    """In the middle of a run: by a full disk, one that is read-only, a folder that somebody
    removed, and the like."""
    return MachineError(
        f"{path} could not be written: {getattr(error, 'strerror', None) or first_line(error)}."
    )


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        with open(file, "a", encoding="utf-8", newline="\n") as out:
            out.write("".join(map(as_line, rows)))
    except OSError as error:
        raise _broken(file, error) from error


def _lines_until(file: Path, step: int) -> Iterator[str]:
    with open(file, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    yield line
            except (ValueError, KeyError, TypeError):
                continue


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is there, on the disk, whole or as it was."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)
