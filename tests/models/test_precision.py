"""A device that cannot be used says why, and what can."""

from __future__ import annotations

import pytest
import torch

from ppo_engine.errors import UserError
from ppo_engine.models.precision import choose_device


@pytest.mark.parametrize(
    ("name", "built", "reason"),
    [
        ("cuda", False, f"this is torch {torch.__version__}, built without CUDA."),
        ("cuda:1", True, "finds no GPU, or no driver for it"),
        ("gpu", False, "Expected one of cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, name: str, built: bool, reason: str
) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "empty", nothing)
    with pytest.raises(UserError) as caught:
        choose_device(name)
    assert f"Device {name!r} cannot be used: " in str(caught.value)
    assert reason in str(caught.value) and "'auto' is a GPU where there is one" in str(caught.value)
