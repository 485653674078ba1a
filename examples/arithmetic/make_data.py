"""Sums of two numbers from 1 to 20, as prompts: `python examples/arithmetic/make_data.py FOLDER`.

Writes `train.jsonl` and `held_out.jsonl`: rows of
`{"prompt": [{"role": "user", "content": "What is 7 + 8?"}], "answer": "15"}`. Of the 210 unordered
pairs of numbers 100 are held out, in one order each; the other 110 are trained on in both orders.
So where 7 + 8 is held out, 8 + 7 is not trained on either.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

LARGEST = 20
HELD_OUT = 100  # unordered pairs


def make_data(folder: Path) -> tuple[Path, Path]:
    """Write both files into `folder`, the same every time: `(training, held out)`."""
    numbers = random.Random(0)
    pairs = list(itertools.combinations_with_replacement(range(1, LARGEST + 1), 2))
    numbers.shuffle(pairs)
    held_out = [numbers.sample(pair, 2) for pair in pairs[:HELD_OUT]]
    training = [order for a, b in pairs[HELD_OUT:] for order in sorted({(a, b), (b, a)})]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, sums in zip(files, (training, held_out), strict=True):
        rows = "".join(json.dumps(_row(a, b)) + "\n" for a, b in sums)
        file.write_text(rows, encoding="utf-8")
    return files


def _row(a: int, b: int) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}


if __name__ == "__main__":
    print(*make_data(Path(sys.argv[1])), sep="\n")
