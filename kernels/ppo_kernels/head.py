"""The matrix products of a language model's head, a chunk of tokens at a time.

Hidden states become logits, and the logits' gradient those of hidden states, weight and bias. Every
chunk's logits overwrite the last one's, so no tensor of [tokens, vocab] ever exists. The products
are torch's; here is which of them, in what dtype, and how many tokens at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppo_kernels import dispatch, onednn
from ppo_kernels.reference import IGNORED_TARGET

# Tokens per chunk. Each chunk reads the whole weight, and adds to its whole gradient: just enough
# that this costs a few percent of the products (bench/notes/cpu.md, gpu.md). A CPU takes twice as
# many in 16 bits: as many bytes, for products that take a fraction of the time.
_TOKENS = {"cpu": 256, "cuda": 4096}
# The same for logits in tiles of classes, small enough to be used while in the cache.
_TOKENS_OF_TILES, _BYTES_OF_TILES = 1024, 4 * 2**20
_FEWEST_TOKENS = 32  # however little memory there is
_MULTIPLE = 16  # of tokens per chunk, for fast products
_ASK_FROM = 64 * 2**20  # bytes of logits from which on the free memory is checked
_SHARE = 1 / 4  # of the free memory that they may take
_TILE_BYTES = 4 * 2**20  # of the weight or its gradient, converted to another dtype on a CPU
_MEMORY = Path("/proc/meminfo")  # Linux's


class Head:
    """logits = hidden @ weight.T + bias, of the tokens whose target is not -100, and its gradients.

    Args:
        hidden: `[..., H]`. weight: `[V, H]`. bias: `[V]` or None. targets: `[...]`.
        dtype: what autocast wants the products in, or the dtype of all three.
        want: whether gradients of hidden, weight and bias are to be made.
        tiled: whether a chunk's logits come by `logit_tiles`, not all at once.

    On a CPU, tokens with target -100 are skipped. To count them the host would have to wait for a
    GPU: there they stay, and get a gradient of 0 whatever their hidden states are.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        want: Sequence[bool] = (False, False, False),
        *,
        tiled: bool = False,
    ) -> None:
        self._leaves_out = leaves_out(hidden.device)
        self.dtype = dtype if multiplies(dtype, hidden.device) else torch.float32
        self.shape = targets.shape
        self._hidden = hidden.reshape(targets.numel(), hidden.shape[-1])
        self._weight = _factor(weight)
        if hidden.device.type != "cpu":  # at once: a tile at a time would take a launch for each
            self._weight = self._weight.to(self.dtype)
        self._bias = None if bias is None else bias.to(self.dtype)
        self._ignored = targets.reshape(-1) == IGNORED_TARGET
        rows = (~self._ignored).nonzero().squeeze(1) if self._leaves_out else None
        self._rows = None if rows is None or len(rows) == len(self._hidden) else rows
        self.targets = self.pick(targets).to(torch.int64).contiguous()

        count, self.vocab = len(self.targets), len(weight)
        self.tiled = tiled
        self._classes = self.vocab  # of a tile
        if tiled:
            self._chunk = min(count, _TOKENS_OF_TILES)
            fit = _BYTES_OF_TILES // (max(self._chunk, 1) * self.dtype.itemsize)
            self._classes = min(self.vocab, fit)
        else:
            self._chunk = chunk_tokens(count, self.vocab, self.dtype, hidden.device)
        self._logits = hidden.new_empty(self._chunk, self._classes, dtype=self.dtype)
        sums = dispatch.accumulator(self.dtype)

        self._of_weight = weight_gradient_dtype(weight, dtype)
        # Two chunks may be summed in bfloat16: the sum is rounded once, as one of float32 would be.
        of_weight = self._of_weight if count <= 2 * self._chunk else sums

        def room(x: Tensor, filled: bool, dtype: torch.dtype = sums) -> Tensor:
            return (x.new_empty if filled else x.new_zeros)(x.shape, dtype=dtype)

        self._grad_hidden = (
            room(self._hidden, self._rows is None and self.vocab > 0) if want[0] else None
        )
        self._grad_weight = room(weight, count > 0, of_weight) if want[1] else None
        self._grad_bias = room(bias, False) if bias is not None and want[2] else None
        self._hidden_shape = hidden.shape

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens, in the order of `targets`."""
        for first in range(0, len(self.targets), max(self._chunk, 1)):
            yield slice(first, min(first + self._chunk, len(self.targets)))

    def pick(self, x: Tensor) -> Tensor:
        """`[n]`: the values of `x` `[...]` at the tokens that are not skipped."""
        x = x.reshape(-1)
        return x if self._rows is None else x[self._rows]

    def spread(self, x: Tensor) -> Tensor:
        """`[...]`, the inverse of `pick`: 0 where a token was skipped. No view for autograd, as
        what an op returns may be written to."""
        if self._rows is not None:
            x = x.new_zeros(len(self._hidden)).index_copy(0, self._rows, x)
        return x.view(self.shape).detach()

    def states(self, place: slice) -> Tensor:
        """The chunk's hidden states `[n, H]`."""
        hidden = self._hidden[place if self._rows is None else self._rows[place]]
        return hidden.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, V]` from a chunk's hidden states, overwriting the last chunk's."""
        logits = self._logits[: len(hidden)]
        for classes, weight in self._tiles():
            self._product(hidden, classes, weight, logits[:, classes])
        return logits

    def logit_tiles(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """From a chunk's hidden states, the first of some classes and their logits `[n, …]`; each
        tile overwrites the last."""
        for classes, weight in self._tiles():
            logits = self._logits[: len(hidden), : len(weight)]
            self._product(hidden, classes, weight, logits)
            yield classes.start, logits

    def _product(self, hidden: Tensor, classes: slice, weight: Tensor, logits: Tensor) -> None:
        bias = None if self._bias is None else self._bias[classes]
        if onednn.pays(hidden):
            # It has no place for them, so a tile at a time.
            step = max(1, _TILE_BYTES // max(logits[:, :1].nbytes, 1))
            for first in range(0, len(weight), step):
                part = slice(first, first + step)
                of_part = None if bias is None else bias[part]
                logits[:, part] = onednn.product(hidden, weight[part], of_part)
        elif bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)

    def add_gradients(self, place: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add a chunk's part to the gradients that are wanted."""
        if self._grad_hidden is not None:
            into = self._grad_hidden[place]
            if self._rows is not None:
                into = into.new_empty(hidden.shape)
            for classes, weight in self._tiles():
                part, fresh = grad_logits[:, classes], classes.start == 0
                if onednn.pays(part):
                    product = onednn.product(part, weight.t())
                    into.copy_(product) if fresh else into.add_(product)
                else:
                    _add_product(into, part, weight, fresh=fresh)
            if self._rows is not None:
                self._grad_hidden[self._rows[place]] = into
        if self._grad_weight is not None:
            if not self._leaves_out:  # 0 times NaN is NaN
                hidden = hidden.masked_fill(self._ignored[place, None], 0)
            _add_product(self._grad_weight, grad_logits.t(), hidden, fresh=place.start == 0)
        if self._grad_bias is not None:
            self._grad_bias += grad_logits.sum(0, dtype=self._grad_bias.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, None where not wanted: float32, or float64 for float64; of
        the weight in its `weight_gradient_dtype`. No chunk may follow."""
        del self._logits  # before a sum that is converted is there twice
        of_hidden, of_weight = self._grad_hidden, self._grad_weight
        if of_hidden is not None:
            of_hidden = of_hidden.view(self._hidden_shape)
        if of_weight is not None:
            of_weight = of_weight.to(self._of_weight)
        return of_hidden, of_weight, self._grad_bias

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Classes, and their rows of the weight in the dtype of the products."""
        vocab, width = self._weight.shape
        same = self._weight.dtype is self.dtype
        step = self._classes
        if not same:
            step = min(step, max(1, _TILE_BYTES // max(width * self.dtype.itemsize, 1)))
        room = None if same else self._weight.new_empty(step, width, dtype=self.dtype)
        for first in range(0, vocab, max(step, 1)):
            classes = slice(first, min(first + step, vocab))
            weight = self._weight[classes]
            yield classes, weight if room is None else room[: len(weight)].copy_(weight)


def chunk_tokens(
    count: int, vocab: int, dtype: torch.dtype, device: torch.device, free: float | None = None
) -> int:
    """Tokens per chunk for `count` tokens, with `vocab` logits of `dtype` each, where so many bytes
    are `free`; None: those that are now."""
    most, token_bytes = _TOKENS[device.type], vocab * dtype.itemsize
    if device.type == "cpu" and dtype.itemsize == 2:
        most *= 2
    if min(most, count) * token_bytes > _ASK_FROM:
        free = _free_bytes(device) if free is None else free
        fit = min(_SHARE * free / token_bytes, most)
        most = max(_FEWEST_TOKENS, int(fit) // _MULTIPLE * _MULTIPLE)
    chunks = math.ceil(count / most)
    even = math.ceil(count / max(chunks, 1))
    return min(count, math.ceil(even / _MULTIPLE) * _MULTIPLE)


def weight_gradient_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of the weight's gradient as `Head.gradients` returns it, with `dtype` as for `Head`.

    That of the weight where a CPU multiplies bfloat16: half the memory until backward, and nothing
    to convert there. float16 might lose what scaling restores.
    """
    if weight.device.type == "cpu" and weight.dtype is dtype is torch.bfloat16:
        return dtype if multiplies(dtype, weight.device) else torch.float32
    return dispatch.accumulator(dtype)


def leaves_out(device: torch.device) -> bool:
    """Whether tokens that need no logits are skipped, for which the host has to count them."""
    return device.type == "cpu"


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of that dtype natively. A CPU that does not takes
    many times as long as in float32."""
    if device.type != "cpu" or dtype.itemsize > 2:
        return True
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _free_bytes(device: torch.device) -> float:
    """Free memory for tensors, in bytes; infinite where it is unknown, or is not to change what
    other chunks would round otherwise."""
    if torch.are_deterministic_algorithms_enabled():
        return math.inf
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return math.inf
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        [line] = [x for x in _MEMORY.read_text().splitlines() if x.startswith("MemAvailable:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return math.inf


def _factor(x: Tensor) -> Tensor:
    """A matrix that BLAS takes as it is, row-major or column-major; a copy of any other."""
    (rows, columns), (down, right) = x.shape, x.stride()
    return (
        x if (right == 1 and down >= columns) or (down == 1 and right >= rows) else x.contiguous()
    )


def _add_product(into: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """into = a @ b where `fresh`, then into += a @ b; `into` may have the wider dtype."""
    if a.dtype is into.dtype:
        into.addmm_(a, b, beta=0 if fresh else 1)
    elif a.device.type == "cuda":  # without a product in the narrow dtype between
        torch.addmm(into, a, b, beta=0 if fresh else 1, out_dtype=into.dtype, out=into)
    else:  # a tile at a time: whole, the product and what it is widened to go through memory
        step = max(1, _TILE_BYTES // max(into[:1].nbytes, 1))
        room = a.new_empty(min(step, len(into)), into.shape[1])
        for first in range(0, len(into), step):
            part = into[first : first + step]
            product = torch.mm(a[first : first + step], b, out=room[: len(part)])
            part.copy_(product) if fresh else part.add_(product)
