"""`decode_attention`, against torch's attention with a mask, its keys shared by a group's heads
(`enable_gqa`) or repeated for each, as transformers' `sdpa` and its slots make them; and with a new
key and value for each row, against writing these before."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import decode_attention

# (size, rows, query heads, key/value heads, width, length of a slot, dtype)
_Shape = tuple[Size, int, int, int, int, int, torch.dtype]
_SMOLLM2: list[tuple[Size, int, int]] = [
    ("medium", 16, 64), ("medium", 64, 128), ("large", 16, 512), ("large", 64, 512),
]  # fmt: skip
_SHAPES: dict[str, list[_Shape]] = {
    "cpu": [
        ("small", 1, 9, 3, 64, 32, torch.float32),
        *(
            (size, rows, 9, 3, 64, longest, dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for size, rows, longest in _SMOLLM2
        ),
    ],
    "cuda": [
        ("small", 1, 12, 2, 128, 64, torch.bfloat16),
        ("medium", 64, 12, 2, 128, 256, torch.bfloat16),  # Qwen2.5-1.5B
        ("large", 64, 28, 4, 128, 1024, torch.bfloat16),  # Qwen2.5-7B
    ],
}


def cases(device: str) -> list[Case]:
    variants = ("", "ragged", "new keys")
    return [_case(device, *shape, variant) for shape in _SHAPES[device] for variant in variants]


def _case(
    device: str, size: Size, rows: int, heads: int, kv_heads: int, width: int, longest: int,
    dtype: torch.dtype, variant: str,
) -> Case:  # fmt: skip
    # From a quarter of a slot to all of it, half a row's on average: prompts and answers of any
    # length, in a bucket that the longest fits.
    lengths = torch.full((rows,), longest)
    if variant:
        lengths = torch.linspace(longest // 4, longest, rows).long().flip(0)
    scale = width**-0.5

    def inputs(on: torch.device) -> Inputs:
        wide = (rows, kv_heads, longest + 64, width)  # of a larger slot

        all_keys, all_values = (normal(*wide, device=on, dtype=dtype, seed=s) for s in (2, 3))
        new = (normal(rows, kv_heads, width, device=on, dtype=dtype, seed=s) for s in (4, 5))
        first = torch.arange(rows * kv_heads).view(rows, kv_heads) * wide[2]
        written = {
            **dict(zip(("new_keys", "new_values"), new, strict=True)),
            "all_keys": all_keys.view(-1, width),
            "all_values": all_values.view(-1, width),
            "places": (first + lengths[:, None] - 1).flatten().to(on),
        }
        return (written if variant == "new keys" else {}) | {
            "query": normal(rows, heads, width, device=on, dtype=dtype, seed=1),
            "keys": all_keys[:, :, :longest],
            "values": all_values[:, :, :longest],
            "lengths": lengths.to(on),
            "mask": (torch.arange(longest) < lengths[:, None])[:, None, None].to(on),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        given = (x["query"], x["keys"], x["values"], x["lengths"])
        new_keys, new_values = x.get("new_keys"), x.get("new_values")
        found = decode_attention(
            *given, scale=scale, new_keys=new_keys, new_values=new_values, impl=impl
        )
        return (found,)

    def written_before(x: Inputs) -> Outputs:
        for name in ("keys", "values"):
            new = x[f"new_{name}"].view(-1, width)
            x[f"all_{name}"].index_copy_(0, x["places"], new)
        given = (x["query"], x["keys"], x["values"], x["lengths"])
        return (decode_attention(*given, scale=scale),)

    def torchs(x: Inputs, keys: torch.Tensor, values: torch.Tensor, grouped: bool) -> Outputs:
        found = F.scaled_dot_product_attention(
            x["query"][:, :, None], keys, values, x["mask"], scale=scale, enable_gqa=grouped
        )
        return (found[:, :, 0],)

    def of_groups(x: Inputs) -> Outputs:
        return torchs(x, x["keys"], x["values"], True)

    def repeated(x: Inputs) -> Outputs:
        keys, values = (
            x[name].repeat_interleave(heads // kv_heads, 1) for name in ("keys", "values")
        )
        return torchs(x, keys, values, False)

    read = 2 * int(lengths.sum()) * kv_heads * width * dtype.itemsize
    others = 2 * rows * heads * width * dtype.itemsize
    if variant == "new keys":
        others += 2 * rows * kv_heads * width * dtype.itemsize
    return Case(
        op="decode_attention",
        variant=variant,
        size=size,
        shape=f"{rows}x{heads}/{kv_heads}x{longest}x{width}",
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={"index_copy_ before": written_before}
        if variant == "new keys"
        else {
            "SDPA, grouped": of_groups,
            "SDPA, keys repeated": repeated,
            "SDPA, keys repeated, compiled": compiled(repeated),
        },
        costs={"fwd": Cost(read, others, 4 * int(lengths.sum()) * heads * width)},
    )
