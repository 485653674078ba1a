"""How values, counts and errors of libraries are worded in messages."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ppo_engine.errors import MachineError, UserError

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def shown(value: Any) -> str:
    """A value in an error message: its repr, shortened, and its type."""
    return f"{shortened(value)} ({type(value).__name__})"


def shortened(value: Any) -> str:
    """The beginning of its repr; an ellipsis where it has none, as an int of 5,000 digits."""
    try:
        text = repr(value)
    except Exception:
        return "…"
    return text if len(text) <= 60 else text[:57] + "..."


def counted(number: int, noun: str) -> str:
    """Such as "1 pair" and "3 pairs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def reason(error: Exception) -> str:
    """What a library says of a file that it could not read; of what it did not expect, with the
    kind of the error, as a bare `'dtype'` or `list index out of range` says nothing."""
    if "weights_only" in str(error):  # torch's words advise to run whatever code a file holds
        return (
            "a .bin file of it is damaged, or holds more than tensors, and that is not read: it "
            "could run any code. Take the weights as safetensors."
        )
    said = first_line(error)[:500]
    expected = isinstance(error, OSError | ValueError | RuntimeError)
    return said if expected and said else f"{type(error).__name__}: {said}"


def unwritten(what: str, error: OSError) -> UserError:
    """Of a place that somebody has chosen to write to: their mistake, or the machine's, where the
    disk is full or broken."""
    kind = MachineError if error.errno in _OF_DISKS else UserError
    return kind(f"{what} cannot be written: {error.strerror or first_line(error)}.")


def untrusted(error: Exception) -> str:
    """A sentence, after a space, where transformers refused to run code that a model brings."""
    if "trust_remote_code" not in str(error):
        return ""
    return (
        " This code is not run. Where you have read it and trust it, set trust_remote_code=true "
        "beside the model's path (policy.trust_remote_code, model.trust_remote_code, of rewards "
        "reward.trust_remote_code, of `generate` trust_remote_code alone)."
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence, after a space, that names the nearest of `known`; nothing where none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def nearest_path(path: str | Path) -> str:
    """The same for a file or folder that is not there: with the nearest name in the folder that
    its path leads to, as far as that goes."""
    path = Path(path).expanduser()
    if path.exists():
        return ""
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    try:
        there = [entry.name for entry in missing.parent.iterdir()]
    except OSError:  # not a folder, or not ours to read
        return ""
    for name in difflib.get_close_matches(missing.name, there):
        meant = missing.with_name(name) / path.relative_to(missing)
        if meant.exists():
            return f" Did you mean {str(meant)!r}?"
    return "" if missing == path else f" There is no folder {str(missing)!r}."
