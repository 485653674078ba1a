"""Settings for all tests: one thread, and the same random numbers in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed torch before each test. One thread, whatever the last test set: two tests run at once,
    and tiny tensors gain nothing from more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
