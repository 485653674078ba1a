"""A file of rows: complete or called `.partial`, and taken up where it was left."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from ppo_engine.errors import UserError
from ppo_engine.run.row_file import RowFile, as_line

ROWS = [{"n": n, "text": "ü\u2028\n"} for n in range(5)]


def made(folder: Path, *, resume: bool = False, left: int = 5, data: str = "5 rows") -> Path:
    """A file of `ROWS` in batches of two, which fails when `left` are written."""
    file = RowFile(
        str(folder / "rows.jsonl"), {"seed": 0, "out": str(folder)}, ["out"], resume=resume
    )
    with file.open(data, 2) as append:
        for start in range(len(file.rows), 5, 2):
            if start >= left:
                raise RuntimeError("the power went off")
            append(ROWS[start : start + 2])
    return file.path


def test_a_file_is_there_when_it_is_complete(tmp_path: Path) -> None:
    text = made(tmp_path / "deep").read_bytes()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]
    assert text.count(b"\n") == 5
    with pytest.raises(UserError, match="exists; remove it"):
        made(tmp_path / "deep")
    with pytest.raises(UserError, match="is complete: nothing is left"):
        made(tmp_path / "deep", resume=True)


@pytest.mark.parametrize(
    "torn", [b"", b'{"n": 4, "te' + b"x" * 500, b'{"n": 4, "text": ""}\n{"n": 5']
)
@pytest.mark.parametrize("left", [2, 4])
def test_what_was_written_is_taken_up(tmp_path: Path, left: int, torn: bytes) -> None:
    """Without the half of a line, or of a batch, that a kill leaves."""
    expected = made(tmp_path / "whole").read_bytes()
    with pytest.raises(RuntimeError) as caught:
        made(tmp_path / "cut", left=left)
    assert caught.value.__notes__[0].startswith(f"{left} rows in {tmp_path}/cut/rows.jsonl.partial")
    with open(tmp_path / "cut/rows.jsonl.partial", "ab") as file:
        file.write(torn)
    assert made(tmp_path / "cut", resume=True).read_bytes() == expected


def test_what_is_not_finite_is_null() -> None:
    nan, inf = float("nan"), float("inf")
    row = {"a": nan, "b": [1.5, -inf, {"c": inf}], "text": "NaN ü", "file": Path("x")}
    expected = {"a": None, "b": [1.5, None, {"c": None}], "text": "NaN ü", "file": "x"}
    assert json.loads(as_line(row), parse_constant=pytest.fail) == expected
    assert "ü" in as_line(row)


def test_a_file_is_on_the_disk_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr("ppo_engine.run.row_file.os.fsync", lambda file: done.append("rows"))
    monkeypatch.setattr("ppo_engine.run.row_file.sync", lambda path: done.append(path.name))
    made(tmp_path / "deep")
    assert done == ["rows", "deep"]


def test_a_full_disk_keeps_what_fits(tmp_path: Path) -> None:
    expected = made(tmp_path / "whole").read_bytes()
    file = RowFile(str(tmp_path / "rows.jsonl"), {"seed": 0, "out": ""}, ["out"], resume=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(UserError, match=r"rows\.jsonl\.partial cannot be written: ") as caught,
        file.open("5 rows", 2) as append,
    ):
        append(ROWS[:2])
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.partial.stat().st_size + 5, limits[1]))
            append(ROWS[2:4])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.__notes__[0].startswith("2 rows in ")
    assert made(tmp_path, resume=True).read_bytes() == expected


def test_a_failure_before_the_first_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        made(tmp_path, left=0)
    assert not hasattr(caught.value, "__notes__") and not list(tmp_path.iterdir())


def test_what_it_was_made_of_must_be_there_and_the_same(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        made(tmp_path, left=2)
    kept = (tmp_path / "rows.jsonl.partial").read_bytes()
    with pytest.raises(UserError, match="go on from there with --resume, or remove it"):
        made(tmp_path)
    with pytest.raises(UserError, match="made of other prompts"):
        made(tmp_path, resume=True, data="6 rows")
    with pytest.raises(UserError, match="seed: 0 then, 1 now"):
        RowFile(str(tmp_path / "rows.jsonl"), {"seed": 1, "out": ""}, ["out"], resume=True)
    (tmp_path / "rows.jsonl.partial.json").write_text("{")
    with pytest.raises(UserError, match="missing or damaged"):
        made(tmp_path, resume=True)
    assert (tmp_path / "rows.jsonl.partial").read_bytes() == kept


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"rows\.jsonl cannot be written"):
        made(tmp_path / "file")
