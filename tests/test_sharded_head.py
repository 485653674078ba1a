"""A head whose weight is sharded over two processes: gathered once, its gradient put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ops import Watch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ppo_kernels import head, linear_logprobs, linear_ppo_loss

RANKS, TOKENS, WIDTH, VOCAB = 2, 40, 8, 61


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, targets, advantages and weight, the same in every process."""
    torch.manual_seed(0)
    hidden, advantages = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS)
    return hidden, torch.randint(VOCAB, (TOKENS,)), advantages, torch.randn(VOCAB, WIDTH)


class LogprobHead(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_logprobs(hidden, self.weight, targets)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    head._TOKENS = {"cpu": 16}  # several chunks
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, targets, advantages, weight = batch()
    mine = slice(rank * TOKENS // RANKS, (rank + 1) * TOKENS // RANKS)

    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    part = hidden[mine].clone().requires_grad_()
    gathers = []
    for _ in range(2):  # the first also sets up
        sharded.grad = part.grad = None
        with Watch() as watch:
            loss, _ = linear_ppo_loss(
                part, sharded, targets[mine], None, advantages[mine], normalizer=TOKENS
            )
        loss.backward()
        gathers.append(watch.gathers)
    assert isinstance(sharded.grad, DTensor)
    found = {"sharded": sharded.grad.full_tensor(), "hidden": part.grad, "gathers": gathers}

    module = LogprobHead(weight.clone())
    fully_shard(module, mesh=mesh)
    module(hidden[mine], targets[mine]).mean().backward()
    found["fsdp"] = module.weight.grad.full_tensor()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_a_sharded_weight(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    hidden, targets, advantages, weight = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, _ = linear_ppo_loss(hidden, weight, targets, None, advantages, normalizer=TOKENS)
    loss.backward()
    of_mean = torch.autograd.grad(linear_logprobs(hidden, weight, targets).mean(), weight)[0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    torch.testing.assert_close(torch.cat([part["hidden"] for part in parts]), hidden.grad)
    for part in parts:
        torch.testing.assert_close(part["sharded"], weight.grad)
        torch.testing.assert_close(part["fsdp"], of_mean)  # FSDP averages over the ranks
        assert part["gathers"][-1] == 1
