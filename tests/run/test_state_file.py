"""The state of a run goes through its files unchanged, and code does not."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_engine.run import state_file
from ppo_engine.run.state_file import load_state, save_state
from ppo_engine.sealed import Damaged

CPU = torch.device("cpu")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_everything_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "_SHARD", 100)
    x = torch.randn(4, 6)
    state = {
        "tensors": [x, x.bfloat16(), torch.tensor(3), torch.zeros(0, 2), torch.tensor([True])],
        "shared": (x, x[1:3], x.t()),
        "numbers": [1, -(2**70), 0.1, 1e-320, math.inf, math.nan, True, None],
        "text": ["", "\u2028 \ud800 é", '"tensor"'],
        "keys": {0: {"step": 1}, "0": {}, "a/b": {"c": torch.ones(1)}, "a": {"b/c": torch.ones(2)}},
        "tensor": {"tensor": "tensors/0"},
    }
    save_state(tmp_path, state)
    assert len([*tmp_path.glob("tensors-*")]) > 2
    assert same(load_state(tmp_path, CPU), state)


def test_a_view_does_not_bring_all_of_its_storage(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.zeros(1 << 20)[:10]})
    assert (tmp_path / "tensors-00001.safetensors").stat().st_size < 1000
    x = torch.randn(4, 6)
    state = {"x": x, "rows": x[1:3], "row": x[3]}  # of one file, which has no views
    save_state(tmp_path, state)
    assert same(load_state(tmp_path, CPU), state)


def test_what_has_no_form_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="engine/x: a checkpoint cannot hold a PosixPath"):
        save_state(tmp_path, {"engine": {"x": tmp_path}})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"dict": 3}', b'{"tensor": "x"}', b'{"code": 1}', b"\xff",
     b"[" * 10**5, pickle.dumps({"a": 1})],
)  # fmt: skip
def test_another_content_is_refused(tmp_path: Path, content: bytes) -> None:
    save_state(tmp_path, {"step": 1})
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(Damaged):
        load_state(tmp_path, CPU)
