"""`ppo-engine rank`: from its options to the last decision."""

from __future__ import annotations

import sys
from pathlib import Path

from ppo_engine.data.rows import data_file
from ppo_engine.errors import Stopped, UserError
from ppo_engine.messages import counted
from ppo_engine.pages.ranking.app import RankingPage
from ppo_engine.pages.ranking.candidates import load_candidates
from ppo_engine.pages.ranking.decision import person
from ppo_engine.pages.ranking.work import Work
from ppo_engine.pages.serving import serve

_OTHER_FORMATS = (".gz", ".parquet")  # by their names, for whoever reads them


def rank(
    candidates: str,
    out: str,
    *,
    annotator: str,
    guidelines: str | None,
    seed: int,
    host: str,
    port: int,
    browser: bool,
) -> None:
    """Serve the ranking page until Ctrl-C, and say then how much was ranked, and where it is.

    Raises a UserError, before anything is served, for files that cannot be read or written, and
    where another process serves the same `out`.
    """
    source, target = data_file(candidates), Path(out).expanduser()
    if target.exists() and target.samefile(source):
        raise UserError(f"--out {out} is the file of candidates: choose another.")
    if target.suffix in _OTHER_FORMATS:
        raise UserError(
            f"--out {out}: rankings are lines of JSON, and would be read as {target.suffix}. Take "
            "a name such as rankings.jsonl."
        )
    name = person(annotator) if annotator else ""
    text = _read(guidelines) if guidelines else ""
    found, notes = load_candidates(source)
    work = Work(found, target, seed)
    try:
        for note in notes:
            print(note, file=sys.stderr)
        page = RankingPage(work, name, text)
        what = f"Rank {counted(len(found), 'prompt')}, until Ctrl-C, at"
        try:
            serve(page.app, what, host=host, port=port, browser=browser)
        except Stopped as error:
            error.add_note(work.summary())
            raise
        print(work.summary())
    finally:
        work.close()


def _read(guidelines: str) -> str:
    try:
        return data_file(guidelines).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--guidelines {guidelines} cannot be read: {error.strerror}.") from error
