"""Metrics and samples to TensorBoard, Weights & Biases and trackio, where `run.trackers` asks.

They only show a run: `metrics.jsonl` and `samples.jsonl` are written in any case, and a tracker
that fails is switched off for the rest of the run.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line
from ppo_engine.settings.files import flatten
from ppo_engine.text.prompt import show_prompt

_PROJECT = "ppo-engine"
_log = logging.getLogger(__name__)

Cell = str | int | float | bool | None
Table = tuple[list[str], list[list[Cell]]]


class Tracker(Protocol):
    """What a tracker does; it raises whatever its package raises."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_samples(self, step: int, columns: list[str], rows: list[list[Cell]]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. A resumed run hides the points of the steps it repeats."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # From the start too: a run resumed without a checkpoint repeats all, step 0 included.
        purge = start + 1 if start else 0
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # by default it buffers two minutes, which a crash loses

    def log_samples(self, step: int, columns: list[str], rows: list[list[Cell]]) -> None:
        self._writer.add_text("samples", _markdown(columns, rows), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of its own for each start, in a group named after the folder: its steps only go up,
    so a resumed run could not repeat those after its checkpoint."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], start: int) -> None:
        import wandb

        self._table: Any = wandb.Table
        self._run: Any = wandb.init(
            project=_PROJECT,
            name=_run_name(folder, start),
            group=folder.name,
            dir=str(folder),
            config=dict(settings),
            reinit="create_new",  # never one that a failed run, or the user, has open
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, columns: list[str], rows: list[list[Cell]]) -> None:
        table = self._table(columns=columns, data=rows, allow_mixed_types=True)
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(WandB):
    """As `WandB`: trackio adds what a resumed run repeats to what is there, so it is another run.

    Local (`trackio show --project ppo-engine`), or where trackio's environment variables say.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], start: int) -> None:
        import trackio

        self._table: Any = trackio.Table
        self._run: Any = trackio.init(
            project=_PROJECT,
            name=_run_name(folder, start),
            group=folder.name,
            config=dict(settings),
        )

    def log_samples(self, step: int, columns: list[str], rows: list[list[Cell]]) -> None:
        self._run.log({"samples": self._table(columns=columns, data=rows)}, step=step)


_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `UserError` for a tracker whose package is missing; call it before training."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of that name in the working directory (wandb leaves one) is no package.
        if spec is None or spec.origin is None:
            raise UserError(
                f"run.trackers names {name!r}, but its package is not installed: "
                f"pip install 'ppo-engine[{name}]', or leave it out."
            )


class Trackers:
    """Every tracker in `names`, for the run in `folder` from after step `start` on.

    One that fails, at its start or later, is switched off, and a warning (logger
    `ppo_engine.run.trackers`, so on stderr) says so once; the others and the run continue.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], start: int = 0
    ) -> None:
        check_trackers(names)
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            try:
                self._trackers[name] = _TRACKERS[name](folder, settings, start)
            except Exception as error:  # each package has errors of its own
                _warn(name, error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step."""
        self._each(lambda tracker: tracker.log(step, metrics))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """The rows of a step that go to samples.jsonl, as a table; of a chat its last message."""
        columns, rows = _as_table(step, samples)
        self._each(lambda tracker: tracker.log_samples(step, columns, rows))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # as above
                del self._trackers[name]
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    reason = first_line(error) or "no reason given"
    _log.warning(
        "The tracker %r failed (%s: %s) and is off for the rest of this run. Nothing is lost: "
        "metrics.jsonl and samples.jsonl are complete.",
        name,
        type(error).__name__,
        reason,
    )


def _run_name(folder: Path, start: int) -> str:
    return f"{folder.name} from step {start + 1}" if start else folder.name


def _as_table(step: int, samples: Sequence[Mapping[str, Any]]) -> Table:
    samples = [flatten(dict(sample)) for sample in samples]  # a column for each reward
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    rows = [[step, *(_cell(sample.get(name)) for name in columns)] for sample in samples]
    return ["step", *columns], rows


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | int | float):
        return value
    try:
        return str(show_prompt(value))
    except (LookupError, TypeError):  # no chat
        return str(value)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_literal(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _literal(cell: Cell) -> str:
    """Text as the model wrote it: nothing in it is markup, and a newline does not end the row."""
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    plain = (c if c.isalnum() or c in " \n" else f"&#{ord(c)};" for c in text)
    return "".join(plain).replace("\n", "<br>")
