"""The order in which a run reads its data."""

from __future__ import annotations

import random
from functools import lru_cache


# A batch may begin in one epoch and end in the next.
@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, total: int) -> tuple[int, ...]:
    """The places 0 to `total` - 1 of all rows, as epoch 0, 1, … reads them: a permutation of its
    own, fixed by the seed of the run."""
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(total), total))
