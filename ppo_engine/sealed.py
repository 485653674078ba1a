"""Folders that show whether a bit of them has changed: they hold the SHA-256 of each of their
files, in the format of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks them anywhere.

Neither torch nor safetensors notices one flipped bit.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from ppo_engine.errors import UserError
from ppo_engine.messages import counted

SUMS = "SHA256SUMS"
_CHANGED_ON_PURPOSE = f"If it was changed on purpose, remove {SUMS} there"


class Damaged(UserError):
    """A file that is not what was written."""


def seal(folder: Path) -> None:
    """Write the sums of all files below `folder`, make these readable as the umask says (some
    libraries write weights for their owner alone), and see all of it onto the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    names = [file.relative_to(folder).as_posix() for file in files]
    # A comment to sha256sum; the lines that follow must be as many.
    lines = [f"# {counted(len(files), 'file')}"]
    lines += [f"{_sum(file)}  {name}" for file, name in zip(files, names, strict=True)]
    sums = folder / SUMS
    sums.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    mode = sums.stat().st_mode & 0o666
    for file in (*files, sums):
        os.chmod(file, file.stat().st_mode | mode)
        sync(file)
    for inner in {file.parent for file in (*files, sums)}:
        sync(inner)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(folder: str | Path) -> None:
    """Raise `Damaged` where a file of a sealed folder is missing or has changed; any other folder
    passes. What was checked is checked again only where a file's size or time has changed."""
    folder = Path(folder)
    if (folder / SUMS).is_file():
        _check(folder, _look(folder))


@functools.lru_cache(maxsize=64)
def _check(folder: Path, look: tuple[tuple[str, int, int], ...]) -> None:
    for name, expected in _read(folder).items():
        try:
            found = _sum(folder / name)
        except FileNotFoundError:
            raise Damaged(f"{folder / name} is missing. {_CHANGED_ON_PURPOSE}.") from None
        except OSError as error:
            raise Damaged(f"{folder / name} cannot be read: {error.strerror}.") from error
        if found != expected:
            raise Damaged(
                f"{folder / name} is damaged: it is not what was written there (its SHA-256 has "
                f"changed). {_CHANGED_ON_PURPOSE}."
            )


def _look(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What would tell of a change without reading: of what `check` has seen, whether it still
    holds."""
    stats = ((str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _read(folder: Path) -> dict[str, str]:
    """The sums by the names of the files."""
    text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    head, *lines = text.split("\n")
    parts = [line.partition("  ") for line in lines if "  " in line]
    sums = {name: found for found, _, name in parts}
    if head != f"# {counted(len(sums), 'file')}" or text[-1:] != "\n":
        raise Damaged(
            f"{folder / SUMS} is damaged, so it is not known whether the files beside it are "
            "whole. Remove it to use them all the same."
        )
    return sums


def _sum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
