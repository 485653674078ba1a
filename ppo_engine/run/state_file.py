"""A trainer's state in two kinds of files: tensors in safetensors, all else in `state.json`. No
file of a checkpoint can hold code, as a pickled one can.

JSON has no tuples and no keys but strings: a container is written as an object with one key, which
says what it is (`_written`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppo_engine.sealed import Damaged, check

STATE = "state.json"
_SHARD = 4 << 30  # bytes; of a GPU's tensors, so much is copied to the CPU at once
_STRANGE = "it was cut short, damaged, or not written by a run of this version"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of these) into an existing folder."""
    tensors: dict[str, Tensor] = {}
    skeleton = _written(state, "", tensors)
    size, shards = 0, list[dict[str, Tensor]]()
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > _SHARD:
            shards.append({})
            size = 0
        size += tensor.nbytes
        shards[-1][name] = tensor
    for number, shard in enumerate(shards, start=1):
        save_file(shard, folder / f"tensors-{number:05d}.safetensors")
    text = json.dumps(skeleton, separators=(",", ":"))
    (folder / STATE).write_text(text, encoding="utf-8")


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """What `save_state` wrote, its tensors on `device`. Raises `Damaged` where it is not that."""
    check(folder)
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("tensors-*.safetensors")):
            with safe_open(file, "pt", device=str(device)) as content:
                tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        state = _read(json.loads((folder / STATE).read_text(encoding="utf-8")), tensors)
    except OSError as error:
        reason = _STRANGE if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise _unreadable(folder, reason) from error
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _unreadable(folder, _STRANGE) from error
    if not isinstance(state, dict):
        raise _unreadable(folder, _STRANGE)
    return state


def _unreadable(folder: Path, reason: str) -> Damaged:
    return Damaged(f"{folder / STATE}, or the tensors beside it, cannot be read: {reason}.")


def _written(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` for JSON. Its tensors are put into `tensors`, under where they stand in it."""
    if isinstance(value, Tensor):
        name = path if path not in tensors else f"{path}~{len(tensors)}"
        tensors[name] = _own(value.detach(), tensors.values())
        return {"tensor": name}
    if isinstance(value, dict):
        under = f"{path}/" if path else ""
        parts = {key: _written(x, f"{under}{key}", tensors) for key, x in value.items()}
        if all(isinstance(key, str) for key in parts):
            return {"dict": parts}
        return {"pairs": [[key, part] for key, part in parts.items()]}
    if isinstance(value, list | tuple):
        items = [_written(x, f"{path}/{index}", tensors) for index, x in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a checkpoint cannot hold a {type(value).__name__}")


def _own(x: Tensor, others: Any) -> Tensor:
    """With a storage of its own, all of which it is: the format has no views."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    if whole and all(x.data_ptr() != other.data_ptr() for other in others):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _read(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"dict": dict(parts)}:
            return {key: _read(x, tensors) for key, x in parts.items()}
        case {"pairs": list(pairs)}:
            return {key: _read(x, tensors) for key, x in pairs}
        case {"list": list(items)}:
            return [_read(x, tensors) for x in items]
        case {"tuple": list(items)}:
            return tuple(_read(x, tensors) for x in items)
        case dict() | list():
            raise ValueError("no container of a checkpoint")
    return value
