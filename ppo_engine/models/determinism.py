"""Runs that come out the same to the bit, whatever the machine has to spare at the time.

Our kernels add in one order whatever the number of threads is. Some of torch's matrix products (of
few rows, on a Zen 3), its sums and the gradients of its norms are divided by it, and round
otherwise. So do passes, chunks of logits and the rows that are sampled together, which are as large
as the free memory allows.
"""

from __future__ import annotations

import os

import torch


def compute_deterministically() -> None:
    """For the rest of the process: one thread, only such operations of torch as are deterministic,
    and nothing that depends on how much memory is free (`is_deterministic`)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS' first product
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)


def is_deterministic() -> bool:
    """Whether that was asked for."""
    return torch.are_deterministic_algorithms_enabled()
