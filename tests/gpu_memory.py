"""A small call of every op on the GPU, for compute-sanitizer: `python tests/gpu_memory.py [plant]`.

`plant` adds a kernel that writes beside its tensor.
"""

from __future__ import annotations

import os
import sys

# Torch would hand out parts of large blocks, where a write beside a tensor goes unnoticed.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from test_adamw import Model, gradients
from test_gpu import everything, implementations

import ppo_kernels
from ppo_kernels import dispatch


def main() -> None:
    everything()()
    logits = torch.randn(3, 1000, device="cuda")
    ppo_kernels.sample(logits, top_k=9, top_p=0.9, seed=1, offset=0)
    offset = torch.arange(3, device="cuda")
    ppo_kernels.sample(logits, seed=torch.tensor(1, device="cuda"), offset=offset)
    ppo_kernels.ranking_loss(logits[:, :5], torch.randint(-1, 4, (3, 5), device="cuda"))
    query, slots = (
        torch.randn(3, 6, 24, device="cuda"),
        torch.randn(2, 3, 2, 300, 24, device="cuda"),
    )
    lengths = torch.tensor([0, 300, 129], device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        new = dict(zip(("new_keys", "new_values"), slots[:, :, :, 0], strict=True))
        ppo_kernels.decode_attention(query.to(dtype), *slots.to(dtype), lengths, scale=0.2)
        ppo_kernels.decode_attention(query.to(dtype), *slots.to(dtype), lengths, scale=0.2, **new)
    rows = torch.randn(3, 300, device="cuda", requires_grad=True)
    weight = torch.randn(300, device="cuda", requires_grad=True)
    ppo_kernels.rms_norm(rows, weight, eps=1e-6).sum().backward()
    ppo_kernels.swiglu(*rows.view(3, 2, 150).unbind(1)).sum().backward()
    angles = torch.randn(2, 1, 300, 18, device="cuda")
    ppo_kernels.rotary_embedding(slots[0].requires_grad_(), slots[1], *angles)[0].sum().backward()
    for bits in (32, 8):
        Model(True, device="cuda", bits=bits).step(1, [g.cuda() for g in gradients(1)])
    long = torch.randn(2, 2, 9000, device="cuda")
    for impl in implementations("gae"):
        ppo_kernels.gae(*long, impl=impl)
    if "plant" in sys.argv[1:]:
        # The gradient is said to be longer than its memory.
        short = torch.ones(1024, device="cuda")
        kernel = dispatch.triton_kernels("fused_loss")
        kernel._scale[(1,)](short, torch.tensor(2.0, device="cuda"), 4096, kernel.TILE)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
