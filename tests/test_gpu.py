"""The kernels on a GPU: random cases of every op, and what only a GPU shows."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ops
import pytest
import torch
from families import of_family
from fuzz.cases import CASES, Case, make_case
from fuzz.check import Failure, check
from test_adamw import Model, after, equal, gradients
from test_decode_attention import BF16, F16, F32, F64, OPTIONS, SHAPES
from test_decode_attention import arguments as attention_arguments
from test_rms_norm import DTYPES as NORM_DTYPES
from test_rms_norm import SHAPES as NORM_SHAPES
from test_rms_norm import arguments as norm_arguments
from test_rotary_embedding import SHAPES as ROTARY_SHAPES
from test_rotary_embedding import arguments as rotary_arguments
from test_swiglu import SHAPES as SWIGLU_SHAPES
from test_swiglu import arguments as swiglu_arguments
from torch import Tensor

import ppo_kernels
from ppo_engine.models.budget import Budget
from ppo_engine.models.offload import Offloaded
from ppo_engine.models.reader import Limit, Reader
from ppo_engine.models.token_rows import scored, stack
from ppo_engine.models.work import Work, counting, passing
from ppo_kernels import dispatch, head, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand"),
]
CASES_OF_EACH_OP = 20  # nearly each is of other dtypes and arguments, and compiled anew


def to_gpu(x: Any) -> Any:
    """The same view of the same memory, garbage around it included, on the GPU."""
    if not isinstance(x, Tensor):
        return x
    storage = x.detach().untyped_storage().cuda()
    moved = torch.empty(0, dtype=x.dtype, device="cuda").set_(
        storage, x.storage_offset(), x.shape, x.stride()
    )
    return moved.requires_grad_(x.requires_grad)


def implementations(op: str) -> list[str]:
    """Those of a GPU, whether they can run here or not."""
    return ["triton"] + ["cuda"] * (op in dispatch.WITH_CUDA)


BOTH = [(op, impl) for op in CASES for impl in implementations(op)]


def on_gpu(op: str, impl: str) -> Callable[..., Any]:
    """The op on the GPU, for CPU tensors, through which gradients flow back."""

    def run(**arguments: Any) -> Any:
        class Moved(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return to_gpu(x.detach())

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad.cpu()

        moved = {
            name: Moved.apply(x) if isinstance(x, Tensor) and x.requires_grad else to_gpu(x)
            for name, x in arguments.items()
        }
        result = partial(getattr(ppo_kernels, op), impl=impl)(**moved)
        return torch.utils._pytree.tree_map(lambda x: x.cpu(), result)

    return run


def tokens(count: int, *shape: int) -> list[Tensor]:
    return list(torch.randn(count, *shape, device="cuda").unbind())


@pytest.mark.parametrize("impl", implementations("gae"))
def test_rows_beyond_the_limit_of_a_grids_second_dimension(impl: str) -> None:
    rewards, values = tokens(2, 70_000, 3)
    a = ppo_kernels.gae(rewards, values, impl=impl)
    b = reference.gae(rewards, values)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", implementations("kl_shaped_gae"))
@pytest.mark.parametrize("shape", [(3, 200_000), (200, 20_000), (600, 5_000), (3000, 700)])
def test_long_rows(shape: tuple[int, int], impl: str) -> None:
    """In chunks, and walked through; against the C++ kernel."""
    logprobs, ref_logprobs, values = (x.cpu() for x in tokens(3, *shape))
    given = {"scores": torch.randn(shape[0]), "logprobs": logprobs, "values": values}
    given |= {"ref_logprobs": ref_logprobs, "kl_coef": 0.1, "mask": torch.rand(shape) < 0.9}
    a = on_gpu("kl_shaped_gae", impl)(**given)
    torch.testing.assert_close(a, ppo_kernels.kl_shaped_gae(**given), rtol=1e-5, atol=1e-4)


def test_more_logits_than_an_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("takes 12 GiB of GPU memory")
    rows, vocab = 20_000, 120_000
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(vocab)
    targets = torch.full((rows,), vocab - 1, device="cuda")
    expected = torch.log_softmax(logits[-1].double(), 0)
    logits.requires_grad_()
    found = ppo_kernels.token_logprobs(logits, targets)
    torch.testing.assert_close(found[-1].double(), expected[-1], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found[-1], logits)
    wanted = -expected.exp()
    wanted[-1] += 1
    torch.testing.assert_close(gradient[-1].double(), wanted, rtol=1e-2, atol=1e-6)
    assert not gradient[0].any()


def everything(seed: int = 0) -> Callable[[], list[Tensor]]:
    """All ops, forward and backward, on tensors of the GPU."""
    torch.manual_seed(seed)
    rows, length, vocab = 8, 70, 500
    logprobs, old, ref, values, returns = tokens(5, rows, length)
    mask = torch.rand(rows, length, device="cuda") < 0.8
    scores, bootstrap = tokens(2, rows)
    kl_coef, normalizer = torch.tensor(0.1, device="cuda"), torch.tensor(50.0, device="cuda")
    logits = torch.randn(rows, length, vocab, device="cuda")
    targets = torch.randint(vocab, (rows, length), device="cuda")
    long = tokens(3, 2, 20_000)
    query, slots = (
        torch.randn(8, 6, 64, device="cuda"),
        torch.randn(2, 8, 2, 700, 64, device="cuda"),
    )
    lengths = torch.randint(701, (8,), device="cuda")
    norm_weight = torch.randn(vocab, device="cuda")
    turned = torch.randn(2, 8, 6, length, 64, device="cuda").requires_grad_()
    angles = tokens(2, 1, length, 32)
    trained = (logprobs, values, logits, scores, norm_weight)
    for x in trained:
        x.requires_grad_()

    def run() -> list[Tensor]:
        shapeds = [
            ppo_kernels.kl_shaped_gae(
                scores.detach(), logprobs.detach(), ref, values.detach(), kl_coef=kl_coef,
                mask=mask, bootstrap=bootstrap, impl=impl,
            )
            for impl in implementations("kl_shaped_gae")
        ]  # fmt: skip
        in_chunks = ppo_kernels.kl_shaped_gae(scores[:2].detach(), *long, kl_coef=kl_coef)
        shaped = shapeds[0]
        attended = [
            ppo_kernels.decode_attention(query.to(x), *slots.to(x), lengths, scale=0.2)
            for x in (torch.float32, torch.bfloat16)
        ]
        rotated = ppo_kernels.rotary_embedding(*turned, *angles)
        found = ppo_kernels.token_logprobs(logits, targets, return_entropy=True)
        policy, stats = ppo_kernels.ppo_policy_loss(
            logprobs, old, shaped.advantages, mask=mask, moments=shaped.moments, ref_logprobs=ref,
            kl_coef=0.1, normalizer=normalizer,
        )  # fmt: skip
        value, _ = ppo_kernels.ppo_value_loss(values, old, returns, mask=mask)
        pairs, _ = ppo_kernels.pairwise_loss(scores, bootstrap)
        normed = ppo_kernels.rms_norm(logits, norm_weight, eps=1e-5)
        gated = ppo_kernels.swiglu(*logits.chunk(2, -1))
        total = policy + 2 * value + pairs
        total = total + sum(x.sum() for x in (*found, *rotated, normed, gated))
        gradients = torch.autograd.grad(total, (*trained, turned))
        results = [x for found in (*shapeds, in_chunks) for x in found]
        return [*results, *attended, *stats, total.detach(), *gradients]

    return run


def test_nothing_waits_for_the_gpu() -> None:
    run = everything()
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_of_all_ops() -> None:
    run = everything()
    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(2):
        graph.replay()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_same_bits_every_time() -> None:
    run = everything()
    expected = run()
    for _ in range(20):
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)


def test_another_stream() -> None:
    expected = everything()()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = everything()()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtypes", NORM_DTYPES, ids=str)
def test_rms_norm(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    """Rows of all kinds of tiles, one of them beyond what the registers hold; many programs."""
    for shape in (*NORM_SHAPES, (5000, 576), (300, 4096), (40, 20_000)):
        op = on_gpu("rms_norm", "triton")
        given = norm_arguments(shape, dtypes)
        ops.assert_error_rule(op, reference.rms_norm, given, ("x", "weight"))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    """One row and rows of their own; many programs."""
    op = on_gpu("swiglu", "triton")
    for shape in (*SWIGLU_SHAPES[4:], (2000, 1536), (30, 8960)):
        for together in (False, True):
            given = swiglu_arguments(shape, dtype, together)
            ops.assert_error_rule(op, reference.swiglu, given, ("gate", "up"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_passes(family: str) -> None:
    """In bf16, as each text alone in fp32; Mistral has windows here, Gemma-2 a softcap."""
    settings = {"sliding_window": 16} if family == "mistral" else {}
    model = of_family(family, hidden_size=256, **settings).to("cuda")
    with torch.no_grad():  # else what each layer adds is so large that bf16 rounds all away
        for parameter in model.parameters():
            parameter *= 0.2 if parameter.ndim == 2 else 1
    readers = Reader(model), Reader(copy.deepcopy(model).bfloat16())
    rows = [scored([*range(5, 5 + length)]) for length in (60, 17, 9)]
    found = []
    for reader, packed in zip(readers, (False, True), strict=True):
        assert reader.packs
        part = stack(rows, pad=0, device=torch.device("cuda"), packed=packed)
        states = part.wanted(reader.read(part).last_hidden_state).float()
        (
            states * torch.linspace(-1, 1, states.numel(), device="cuda").view_as(states)
        ).sum().backward()
        gradient = reader._model.get_input_embeddings().weight.grad
        found.append((states.detach(), gradient.float()))
    for expected, got in zip(*found, strict=True):
        assert (got - expected).norm() < 0.1 * expected.norm()


def test_weights_come_for_their_use_and_leave_no_memory() -> None:
    model = of_family("llama").cuda().requires_grad_(False)
    ids = torch.arange(12, device="cuda")[None]
    expected, before = model(ids).logits, torch.cuda.memory_allocated()
    offloaded = Offloaded(model, torch.device("cuda"), set())
    away = torch.cuda.memory_allocated()
    assert all(x.device.type == "cpu" and x.is_pinned() for x in model.parameters())
    assert before - away >= sum(x.nbytes for x in {*model.parameters()})
    for _ in range(2):
        with offloaded.on_device():
            assert torch.equal(model(ids).logits, expected)
        assert torch.cuda.memory_allocated() == away


def test_a_pass_without_memory_leaves_none_behind() -> None:
    held = []

    def attempt(passes: list[list[int]]) -> int:
        states = torch.empty(2**26, device="cuda", requires_grad=True).exp()
        held.append(torch.cuda.memory_reserved())
        if len(passes) == 1:
            torch.empty(2**50, device="cuda") * states
        return len(passes)

    torch.cuda.empty_cache()
    assert Budget(Limit(100)).run([10, 10], attempt, packed=True) == 2
    assert held[1] <= held[0]


def test_passes_are_timed_by_the_stream() -> None:
    """Without waiting, though the host is done with them long before."""
    x, work = torch.randn(4096, 4096, device="cuda"), Work(torch.device("cuda"))
    torch.cuda.synchronize()
    started = time.perf_counter()
    with counting(work), passing():
        for _ in range(50):
            x @ x
    told = time.perf_counter() - started
    torch.cuda.synchronize()
    assert told < work.seconds <= time.perf_counter() - started


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)], ids=str)
def test_decode_attention(dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, Any]) -> None:
    """Whole slots, and parts of them that are merged."""
    for shape in SHAPES:
        given = attention_arguments(shape, dtypes, **options)
        op = on_gpu("decode_attention", "triton")
        ops.assert_error_rule(op, reference.decode_attention, given)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F64)], ids=str)
def test_new_keys_are_written_first(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """To the bit what comes of slots in which they were written before, and these themselves."""
    for shape, options in itertools.product(SHAPES, OPTIONS):
        given = attention_arguments(shape, (dtypes[0], dtypes[0]), **options)
        given = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in given.items()}
        before = given | {name: given[name].clone() for name in ("keys", "values")}
        new = {
            name: torch.randn(5, shape[1], before[name].shape[3], device="cuda", dtype=dtypes[1])
            for name in ("keys", "values")
        }
        stale = {name: before[name].clone() for name in new}
        for name, x in new.items():
            reference.write_last(before[name], given["lengths"], x)
        for _ in range(20):
            for name in new:
                given[name].copy_(stale[name])
            found = ppo_kernels.decode_attention(
                **given, **{f"new_{name}": x for name, x in new.items()}
            )
            assert torch.equal(found, ppo_kernels.decode_attention(**before))
            for name in new:
                torch.testing.assert_close(
                    given[name], before[name], rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_rotary_embedding(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for shape in ROTARY_SHAPES:
        for shared in (False, True):
            given = rotary_arguments(shape, dtypes, shared)
            op = on_gpu("rotary_embedding", "triton")
            ops.assert_error_rule(op, reference.rotary_embedding, given, ("query", "key"))


def test_a_graph_of_attention_is_right_for_other_lengths() -> None:
    """A decode step is captured once for lengths that grow; nothing on the host looks at them."""
    query, slots = (
        torch.randn(4, 6, 64, device="cuda"),
        torch.randn(2, 4, 2, 900, 64, device="cuda"),
    )
    lengths = torch.zeros(4, dtype=torch.int64, device="cuda")
    call = partial(ppo_kernels.decode_attention, query, *slots, lengths, scale=0.2, window=800)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for grown in ([1, 2, 3, 4], [900, 0, 799, 129], [512, 900, 900, 801]):
        lengths.copy_(torch.tensor(grown))
        graph.replay()
        assert torch.equal(found, call())
        torch.testing.assert_close(found, call(impl="reference"))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_adamw_has_the_bits_of_a_cpu(dtype: torch.dtype, halves: bool, bits: int) -> None:
    """With numbers, and with numbers in the GPU's memory, without waiting for it."""
    settings: dict[str, Any] = {"weight_decay": 0.1, "grad_scale": 0.37}
    expected = after(5, dtype, bits=bits, **settings, impl="reference").tensors()
    for in_memory in (False, True):
        model = Model(halves, device="cuda", bits=bits)
        for number in range(1, 6):
            grads = [g.cuda() for g in gradients(number, dtype)]
            step: Any = number
            if in_memory:
                step = torch.tensor(number, device="cuda")
                settings["grad_scale"] = torch.tensor(0.37, device="cuda")
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model.step(step, grads, **settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert equal([x.cpu() for x in model.tensors()], expected), in_memory


def test_a_graph_of_adamw_goes_on() -> None:
    """With the step, learning rate and clip factor that are in memory when it is replayed."""
    expected, model = Model(True, device="cuda"), Model(True, device="cuda")
    grads = [g.cuda() for g in gradients(1)]
    step = torch.ones((), dtype=torch.int64, device="cuda")
    rate, scale = torch.zeros(2, device="cuda").unbind()
    call = partial(model.step, step, grads, learning_rate=rate, grad_scale=scale)
    graph = torch.cuda.CUDAGraph()
    unseen = pytest.raises(RuntimeError, match="call it once on the same tensors")
    with unseen, torch.cuda.graph(graph):
        call()
    call()  # a rate and a scale of 0: nothing changes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for number in range(1, 4):
        for x, value in ((step, number), (rate, 0.1 / number), (scale, 0.5**number)):
            x.fill_(value)
        graph.replay()
        numbers = {"learning_rate": rate.clone(), "grad_scale": scale.clone()}
        expected.step(step.clone(), grads, **numbers)
        assert equal(model.tensors(), expected.tensors())


def head_inputs(dtype: torch.dtype, tokens: int = 300) -> dict[str, Any]:
    """Arguments of `linear_ppo_loss` on the GPU; some tokens are masked, with NaN for a state."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 64), torch.randn(1003, 64) / 4
    mask = torch.rand(tokens) < 0.8
    hidden[~mask] = float("nan")
    found = {
        "hidden": hidden.to(dtype), "weight": weight.to(dtype),
        "bias": torch.randn(1003).to(dtype), "targets": torch.randint(1003, (tokens,)),
        "old_logprobs": torch.randn(tokens) - 7, "advantages": torch.randn(tokens), "mask": mask,
    }  # fmt: skip
    given = {name: x.cuda() for name, x in found.items()}
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_()
    return given | {"temperature": 0.8, "softcap": 9.0, "entropy_coef": 0.01}


def linear_ops(given: dict[str, Any]) -> list[Tensor]:
    """Loss, log-probs and entropies, and what both make of the gradients."""
    trained = [given[name] for name in ("hidden", "weight", "bias")]
    loss, stats = ppo_kernels.linear_ppo_loss(**given)
    of_loss = torch.autograd.grad(loss, trained)
    shared = {name: given[name] for name in ("hidden", "weight", "bias", "temperature", "softcap")}
    targets = given["targets"].masked_fill(~given["mask"], -100)
    logprobs, entropy = ppo_kernels.linear_logprobs(**shared, targets=targets, return_entropy=True)
    of_logprobs = torch.autograd.grad((logprobs + entropy).sum(), trained)
    # Attached, they would keep nodes of autograd that run on the stream of this pass.
    found = [logprobs.detach(), entropy.detach()]
    return [loss.detach(), *stats, *found, *of_loss, *of_logprobs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_ops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_TOKENS", {"cuda": 128})  # several chunks
    given = {n: x.detach().cpu() if isinstance(x, Tensor) else x
             for n, x in head_inputs(dtype).items()}  # fmt: skip
    trained = ("hidden", "weight", "bias")
    ops.assert_products_rule(
        on_gpu("linear_ppo_loss", "triton"), reference.linear_ppo_loss, given, trained
    )
    of_head = {name: given[name] for name in (*trained, "temperature", "softcap")}
    of_head |= {"targets": given["targets"].masked_fill(~given["mask"], -100)}
    ops.assert_products_rule(
        on_gpu("linear_logprobs", "triton"), reference.linear_logprobs,
        of_head | {"return_entropy": True}, trained,
    )  # fmt: skip


def test_linear_ops_do_not_wait_for_the_gpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = head_inputs(dtype)
        linear_ops(given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_ops(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_linear_ops_in_a_cuda_graph() -> None:
    given = head_inputs(torch.bfloat16)
    expected = linear_ops(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear_ops(given)
    graph.replay()
    torch.testing.assert_close(found, expected)


def test_a_cuda_graph_draws_anew() -> None:
    """Seed and counters are read on the device, without a wait; the tokens are the reference's."""
    logits, seed = torch.randn(6, 50_257, device="cuda"), torch.tensor(0, device="cuda")
    offset = torch.zeros(6, dtype=torch.int64, device="cuda")

    def draw() -> tuple[Tensor, Tensor]:
        return ppo_kernels.sample(logits, top_p=0.9, seed=seed, offset=offset)

    draw()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = draw()
    for step in range(3):
        seed.fill_(2**40 + step)
        offset.copy_(100 * step + torch.arange(6).flip(0))
        graph.replay()
        expected, of_expected = ppo_kernels.sample(
            logits.cpu(), top_p=0.9, seed=2**40 + step, offset=offset.cpu(), impl="reference"
        )
        assert torch.equal(tokens.cpu(), expected)
        torch.testing.assert_close(logprobs.cpu(), of_expected, rtol=1e-4, atol=1e-4)


def test_linear_loss_takes_the_memory_of_a_chunk() -> None:
    """Beside the gradients, here 16,384 tokens of which 4,096 at a time have logits."""
    width, vocab, tokens = 256, 32_000, 16_384
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device="cuda")
    advantages = torch.randn(tokens, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ppo_kernels.linear_ppo_loss(hidden, weight, targets, None, advantages)[0].backward()
    extra = torch.cuda.max_memory_allocated() - before
    sums = 4 * width * (tokens + vocab)
    assert extra < 2 * 4096 * vocab + 2 * sums < 2 * tokens * vocab


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_another_device() -> None:
    rewards, values = (x.to("cuda:1") for x in tokens(2, 4, 9))
    advantages, _ = ppo_kernels.gae(rewards, values)
    assert advantages.device == rewards.device
    torch.testing.assert_close(advantages, reference.gae(rewards, values)[0])


def test_new_lengths_and_coefficients_compile_nothing() -> None:
    kernels = dispatch.triton_kernels("gae")

    def call(rows: int, length: int, gamma: float, coef: float) -> None:
        logprobs, ref, values = tokens(3, rows, length)
        (scores,) = tokens(1, rows)
        ppo_kernels.kl_shaped_gae(
            scores, logprobs, ref, values, kl_coef=coef, gamma=gamma, impl="triton"
        )

    def compiled() -> int:
        caches = (kernels.walk.device_caches, kernels.merge.device_caches)
        return sum(len(cache[0]) for of in caches for cache in of.values())

    call(7, 300, 0.9, 0.1)
    before = compiled()
    for i in range(8):
        call(7 + i, 304 + 13 * i, 0.9 + 0.01 * i, 0.1 * i)
    assert compiled() == before


def test_gradients_of_a_graph_that_is_kept() -> None:
    """A factor is multiplied in place only where what was saved is not needed again."""
    logprobs, old, advantages = tokens(3, 4, 9)
    logprobs.requires_grad_()
    loss, _ = ppo_kernels.ppo_policy_loss(logprobs, old, advantages)
    (once,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, logprobs, retain_graph=True)
    (again,) = torch.autograd.grad(2 * loss, logprobs)
    ops.assert_same_bits({"": thrice}, {"": 3 * once})
    ops.assert_same_bits({"": again}, {"": 2 * once})


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    logprobs, ref_logprobs, values = tokens(3, 6, 100)
    (scores,) = tokens(1, 6)
    logits, targets = torch.randn(6, 100, device="cuda"), torch.arange(6, device="cuda")

    def step(kl_coef: float | Tensor) -> tuple[Tensor, ...]:
        shaped = ppo_kernels.kl_shaped_gae(scores, logprobs, ref_logprobs, values, kl_coef=kl_coef)
        found = ppo_kernels.token_logprobs(logits, targets)
        loss, _ = ppo_kernels.ppo_policy_loss(logprobs, values, shaped.advantages, normalizer=7.0)
        return *shaped, found, loss

    for kl_coef in (0.1, torch.tensor(0.1), torch.tensor(0.1, device="cuda")):
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(kl_coef)
        torch.testing.assert_close(found, step(kl_coef))


def test_a_coefficient_on_the_cpu() -> None:
    """Or in a tensor there: it is read, not handed on."""
    logprobs, ref_logprobs, values = tokens(3, 6, 100)
    (scores,) = tokens(1, 6)
    a, b = (
        ppo_kernels.kl_shaped_gae(scores, logprobs, ref_logprobs, values, kl_coef=kl_coef)
        for kl_coef in (0.1, torch.tensor(0.1, dtype=torch.float64))
    )
    assert torch.equal(a.advantages, b.advantages)


@pytest.mark.parametrize(("op", "impl"), BOTH)
def test_random_cases(op: str, impl: str) -> None:
    messages = []
    for seed in range(CASES_OF_EACH_OP):
        case: Case = make_case(op, seed)
        try:
            check(case, on_gpu(op, impl), guarded=False)
        except Failure as failure:
            messages.append(f"seed {seed}: {failure}")
    assert not messages, "\n".join(messages[:5])
