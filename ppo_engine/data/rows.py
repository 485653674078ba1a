"""Rows of data files, each with the place it came from: JSONL and JSON arrays, gzipped or not, and
data sets.

`json.loads` alone accepts NaN, Infinity, duplicate keys and lone surrogates; each of them
fails later and elsewhere, so here they are errors that name the file and the line.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from ppo_engine.errors import UserError
from ppo_engine.messages import counted, first_line, nearest_path

OnBadLine = Literal["error", "skip"]
Row = dict[str, Any]
MAX_EXAMPLES = 3
_OTHER_FORMATS = (
    ".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".zip", ".zst", ".bz2", ".xz", ".tar", ".tar.gz",
)  # fmt: skip
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class SkippedLines:
    """What was left out of the data, and why; its `str` is a one-line summary of the lines."""

    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    # Of lines that are used: what of them is not, and columns that the loader did not need.
    remarks: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, reason: str, detail: str = "") -> None:
        self.total += 1
        self.reasons[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{place}: {reason}{detail}")

    def __iadd__(self, other: SkippedLines) -> SkippedLines:
        """With what was left out of another file of the same run."""
        self.total += other.total
        self.reasons += other.reasons
        self.examples = [*self.examples, *other.examples][:MAX_EXAMPLES]
        self.remarks += other.remarks
        self.unread += other.unread
        return self

    def notes(self, name: str, reads: Callable[[str], bool] | None = None) -> list[str]:
        """What a run says of its `name`; `reads` tells of columns that something else reads."""
        found = [f"{name}: {self}."] if self.total else []
        found += [
            f"{name}: {remark} ({counted(count, 'row')})." for remark, count in self.remarks.items()
        ]
        columns = [
            f"{column!r} ({counted(count, 'row')})"
            for column, count in self.unread.items()
            if not (reads and reads(column))
        ]
        if columns:
            found.append(f"{name}: nothing reads these columns: {', '.join(columns)}.")
        return found

    def __str__(self) -> str:
        if not self.total:
            return "no lines skipped"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.total} skipped ({reasons}), for instance {'; '.join(self.examples)}"


class BadLines:
    """What to do with a line that cannot be used: stop at it, or count it and continue."""

    def __init__(
        self,
        on_bad_line: OnBadLine,
        remedy: str = "Fix it, or skip such lines with data.on_bad_line=skip.",
    ) -> None:
        self.skip = on_bad_line == "skip"
        self.remedy = remedy
        self.skipped = SkippedLines()

    def add(self, place: str, reason: str, detail: str = "", hint: str = "") -> None:
        if not self.skip:
            raise UserError(f"{place}: {reason}{detail}. {hint or self.remedy}")
        self.skipped.add(place, reason, detail)


class BadLineError(Exception):
    """One line's problem: `reason` is the same for all lines with it, `detail` is this line's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason
        self.detail = detail


def read_jsonl(path: str | Path, bad_lines: BadLines | None = None) -> Iterator[tuple[int, Row]]:
    """`(line number, object)` of each line of a .jsonl or .jsonl.gz file, streamed.

    Blank lines are skipped. A line that is not one JSON object goes to `bad_lines`, by default a
    `UserError` that names `file:line`. A file that cannot be read or is empty is a `UserError` too.
    """
    bad_lines = bad_lines or BadLines("error")
    found = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        found = True
        try:
            row = _parse(line)
        except BadLineError as error:
            bad_lines.add(f"{path}:{number}", error.reason, error.detail)
            continue
        yield number, row
    if not found:
        raise UserError(f"{path} is empty: it has no lines of data.")


def read_json_array(
    path: str | Path, bad_lines: BadLines | None = None
) -> Iterator[tuple[int, Row]]:
    """`(index, object)` of each element of a .json or .json.gz file that is one array.

    As strict as `read_jsonl`, element by element. An array with broken syntax cannot be read on:
    a `UserError` names the line, or the element.
    """
    bad_lines = bad_lines or BadLines("error")
    try:
        text = b"".join(_lines(path)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start + 1}).") from None
    index, position = 0, _skip(text, text.index("[") + 1)
    if text.startswith("]", position):
        raise UserError(f"{path} is empty: its array has no elements.")
    while True:
        try:
            row, end = _element(text, position)
        except json.JSONDecodeError as error:
            raise _broken_array(path, text, error.pos, error.msg) from None
        except BadLineError as error:
            end = _end_of_element(f"{path}[{index}]", text, position, error)
            bad_lines.add(f"{path}[{index}]", error.reason, error.detail)
        else:
            yield index, row
        position = _skip(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise _broken_array(path, text, position, "expecting ',' or ']'")
        index, position = index + 1, _skip(text, position + 1)
    if text[position + 1 :].strip():
        raise _broken_array(path, text, _skip(text, position + 1), "extra data after the array")


def read_rows(
    source: str | Path | Iterable[Any], name: str, bad_lines: BadLines
) -> Iterator[tuple[str, Any]]:
    """`(place, row)` of a file (JSONL, JSON, parquet), a saved data set's folder, or a sequence.

    A place is `file:line`, or `file[index]` in a JSON array, or `name[index]` where rows come from
    Python.
    """
    if not isinstance(source, str | Path):
        for index, row in enumerate(rows_of(source, name)):
            yield f"{name}[{index}]", row
        return
    if not str(source):
        raise UserError(f"No {name} were given: set data.path to a JSONL file.")
    path = data_file(source)
    name = path.name.lower()
    other = next((ending for ending in _OTHER_FORMATS if name.endswith(ending)), None)
    if other is not None and not path.is_dir():
        raise UserError(
            f"{path}: {other} files are not read: give JSONL, JSON (either may be gzipped) "
            "or parquet. The package datasets converts most others: "
            "load_dataset(…)['train'].to_json('data.jsonl')."
        )
    if path.is_dir() or name.endswith(".parquet"):
        for index, row in enumerate(_open_data_set(path)):
            yield f"{path} row {index}", row
        return
    if _is_json_array(path):
        for index, row in read_json_array(path, bad_lines):
            yield f"{path}[{index}]", row
        return
    for number, row in read_jsonl(path, bad_lines):
        yield f"{path}:{number}", row


def rows_of(source: Iterable[Any], name: str) -> Iterable[Any]:
    """What is given from Python, as it is; a UserError where its items would be no rows, but the
    names of columns or of splits."""
    if hasattr(source, "iterrows"):
        raise UserError(f"The {name} are a DataFrame: give its rows, frame.to_dict('records').")
    if isinstance(source, Mapping):
        names = ", ".join(str(key) for key in source)
        raise UserError(
            f"The {name} are a dictionary ({names}): give a list of rows, [{{column: value, …}}, "
            "…]; of a data set with several splits, one of them, such as data['train']."
        )
    return source


def data_file(source: str | Path) -> Path:
    """The path of a file or folder of data; a UserError where nothing is there."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist.{nearest_path(path)}")
    return path


def has_lone_surrogate(value: Any) -> bool:
    """Whether text, or one in lists and mappings, has half of a surrogate pair: it is valid JSON,
    but no tokenizer and no file can take it."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return any(map(has_lone_surrogate, value))
    try:
        if isinstance(value, str):
            value.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _lines(path: str | Path) -> Iterator[bytes]:
    """Lines split at newlines only: text may hold U+2028, which `str.splitlines` would split at."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; a JSONL file was expected.")
    try:
        with _open(path) as file:
            for number, line in enumerate(file):
                yield line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error}); create or fetch it again.") from error
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _open(path: str | Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if str(path).lower().endswith(".gz") else open(path, "rb")


def _is_json_array(path: Path) -> bool:
    """By name and content: a file of one object a line is often called .json as well."""
    if not path.name.lower().endswith((".json", ".json.gz")):
        return False
    return next((line for line in _lines(path) if line.strip()), b"").lstrip().startswith(b"[")


def _parse(line: bytes) -> Row:
    try:
        # Where the JSON ends too soon, the error is at its end, not at the next line's beginning.
        text = line.decode("utf-8").rstrip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise BadLineError("not valid UTF-8", f" (byte {error.start + 1})") from None
    try:
        return _check_row(_strictly(lambda: _STRICT.decode(text)), text)
    except json.JSONDecodeError as error:
        raise BadLineError("not valid JSON", f" ({error.msg} at column {error.colno})") from None


def _element(text: str, position: int) -> tuple[Row, int]:
    """The object that starts at `position`, and where it ends."""
    row, end = _strictly(lambda: _STRICT.raw_decode(text, position))
    return _check_row(row, text[position:end]), end


def _strictly(decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except RecursionError:
        raise BadLineError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # such as an integer of thousands of digits
        raise BadLineError("not valid JSON", f" ({error})") from None


def _check_row(row: Any, text: str) -> Row:
    try:
        if "\\u" in text and has_lone_surrogate(row):
            raise BadLineError("lone surrogate in the text (half of an emoji or the like)")
    except RecursionError:
        raise BadLineError("nested too deeply") from None
    if not isinstance(row, dict):
        raise BadLineError("not a JSON object", f" but {type(row).__name__}")
    return row


def _end_of_element(place: str, text: str, position: int, problem: BadLineError) -> int:
    """Where a rejected element ends, so that the next one can be read."""
    try:
        return _LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        raise UserError(f"{place}: {problem}, and what follows cannot be read.") from None


def _skip(text: str, position: int) -> int:
    """The next position that is not white space, as JSON has it."""
    match = _WHITE_SPACE.match(text, position)
    return match.end() if match else position


def _broken_array(path: str | Path, text: str, position: int, problem: str) -> UserError:
    line = text.count("\n", 0, position) + 1
    return UserError(f"{path}:{line}: not valid JSON ({problem}); fix the file or export it again.")


def _object(pairs: Sequence[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadLineError("duplicate key", f" {twice!r}")
    return row


def _refuse_constant(name: str) -> Any:
    raise BadLineError("number that is not finite", f" ({name})")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadLineError("number that is not finite", f" ({text[:20]})")
    return number


_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
)
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def _open_data_set(path: Path) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: parquet files and saved data sets need the package datasets: "
            "pip install 'ppo-engine[data]'; or convert the data to JSONL."
        ) from None
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow and datasets have no common class of their own
        raise UserError(f"{path} cannot be read as a data set: {first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(
                f"{path} holds the splits {', '.join(loaded)}, and no 'train'; give the folder of "
                "one split."
            )
        loaded = loaded["train"]
    if len(loaded) == 0:
        raise UserError(f"{path} is empty: it has no rows.")
    return loaded
