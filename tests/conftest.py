"""Settings for all tests: one thread, the same random numbers in every run, and Triton's kernels in
its interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read where the kernels are imported, which comes later.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed torch before each test. One thread, whatever the last test set: two tests run at once,
    and tiny tensors gain nothing from more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
