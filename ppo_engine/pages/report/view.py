"""`ppo-engine view`: the page of one run or of several, written anew and opened."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from ppo_engine.errors import UserError
from ppo_engine.messages import nearest_path
from ppo_engine.pages.report.collect import METRICS
from ppo_engine.pages.report.page import MARK, NAME, write_page
from ppo_engine.run.rollout_record import recorded_steps


def view(runs: Sequence[str], out: str | None, *, browser: bool) -> Path:
    """Write the page of these run folders, to `out`, or else into the one run's folder, or, of
    several, into the folder where this runs; print its address, and open it in a `browser`."""
    folders = list(dict.fromkeys(Path(run).expanduser() for run in runs))
    for folder in folders:
        _check_run(folder)
    path = Path(out).expanduser() if out else (folders[0] if len(folders) == 1 else Path()) / NAME
    _check_free(path)
    try:
        write_page(folders, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. --out FILE.html writes it elsewhere."
        ) from error
    print(f"The page is {path}")
    if browser and not webbrowser.open(path.resolve().as_uri()):
        print("No browser was found to open it with.")
    return path


def _check_run(folder: Path) -> None:
    """Raise a UserError where there is nothing to see."""
    if not folder.is_dir():
        raise UserError(f"There is no run folder {str(folder)!r}.{nearest_path(folder)}")
    if (folder / METRICS).is_file() or recorded_steps(folder):
        return
    inside = [str(file.parent) for file in sorted(folder.glob(f"*/{METRICS}"))]
    hint = f" These have: {', '.join(inside)}." if inside else ""
    raise UserError(f"{folder} has no {METRICS}, so there is nothing of a run to see yet.{hint}")


def _check_free(path: Path) -> None:
    """Raise a UserError where something else than a page would be written over."""
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {str(path.parent)!r}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: --out takes the name of a file, such as {NAME}.")
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(2_000):
                raise UserError(f"{path} is no page of a run: --out FILE.html writes another file.")
