"""Which passes a reader plans, which families it packs, and that packed texts read as alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from families import of_family
from tiny import tiny_model

from ppo_engine.models import reader as module
from ppo_engine.models.reader import Limit, Reader, plan
from ppo_engine.models.token_rows import Row, TokenRows, predicting, scored, stack
from ppo_engine.pretrained.architecture import checkpoint_gradients
from ppo_engine.settings.schema import PPOSettings

CPU = torch.device("cpu")
LENGTHS = [
    [5],
    [40] * 3,
    [30, 20, *[1] * 5],
    [3] * 40,
    [64, 1, 1, 63, 2],
    [*range(1, 65)],
    [200, 7, 90, 3],
    [80] * 5,
]
PACKED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "olmo2", "granite", "smollm3", "gpt_oss", "mixtral",
]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_plan_holds_every_row_once_within_its_limits(lengths, rows, packed):
    passes = plan(lengths, Limit(64, rows), packed=packed)
    assert sorted(i for indices in passes for i in indices) == [*range(len(lengths))]
    for indices in passes:
        of_pass = [lengths[i] for i in indices]
        assert of_pass == sorted(of_pass, reverse=True) and len(of_pass) <= (rows or 99)
        tokens = sum(of_pass) if packed else len(of_pass) * of_pass[0]
        assert tokens <= 64 or len(of_pass) == 1
    if packed:
        assert len(plan(lengths, Limit(sum(lengths)), packed=True)) == 1


@pytest.mark.parametrize("rows", [None, 8])
def test_packed_passes_are_few_and_even_and_the_largest_comes_first(rows):
    lengths = torch.randint(1, 33, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    passes = plan(lengths, Limit(256, rows), packed=True)
    tokens = [sum(lengths[i] for i in indices) for indices in passes]
    least = max(-(-sum(lengths) // 256), 300 // (rows or 300))
    assert least <= len(passes) <= least + 1
    assert max(tokens) - min(tokens) <= max(lengths)
    assert tokens == sorted(tokens, reverse=True) != [tokens[0]] * len(tokens)


@pytest.mark.parametrize("packed", [True, False])
def test_a_plan_of_many_rows_takes_no_time(packed):
    started = time.process_time()
    assert len(plan([64] * 20_000, Limit(64), packed=packed)) == 20_000
    assert time.process_time() - started < 2  # where every pass is looked at for each: 10 and more


def test_a_row_ends_where_nothing_more_is_wanted():
    row = predicting([5, 6, 7, 8, 9], [False, False, True, True, False])
    assert row == Row([5, 6, 7], [1, 2], [7, 8])
    assert predicting([5, 6], [False, False]) == Row([5], [], [])
    assert scored([5, 6]) == Row([5, 6], [1], [0])


def test_the_tensors_of_packed_and_padded_rows():
    rows = [Row([5, 6, 7], [1, 2], [7, 8]), Row([9], [], []), Row([3, 4], [1], [0])]
    packed, padded = (stack(rows, pad=256, device=CPU, packed=p) for p in (True, False))
    assert packed.ids.tolist() == [[5, 6, 7, 9, 3, 4]] and packed.mask.all()
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed.segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert padded.ids.tolist() == [[5, 6, 7], [9, 256, 256], [3, 4, 256]]
    assert padded.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert padded.positions.tolist() == [[0, 1, 2]] * 3 and padded.segments is None
    for found in (packed, padded):
        assert found.ids.flatten()[found.places].tolist() == [6, 7, 4]
        assert found.targets.tolist() == [7, 8, 0] and found.counts == [2, 0, 1]
        x = torch.randn(*found.ids.shape, 2, dtype=torch.double, requires_grad=True)
        torch.autograd.gradcheck(lambda x, found=found: found.wanted(x), x)


@pytest.mark.parametrize(
    ("family", "expected"),
    [*((name, True) for name in PACKED),
     *((name, False) for name in ("bloom", "falcon", "mamba", "rwkv", "llama4_text"))],
)  # fmt: skip
def test_families_that_are_packed_read_as_alone(family, expected):
    reader = Reader(of_family(family))
    assert reader.packs == expected
    if expected:
        assert_as_alone(reader, [40, 7, 1, 23])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_windows_that_texts_exceed_are_kept(family):
    reader = Reader(of_family(family, sliding_window=8))
    assert reader.packs
    assert_as_alone(reader, [40, 9, 8, 23])


def test_a_model_that_hides_its_window_from_the_attention_is_not_packed():
    """Though the probe is too short for it to show."""
    model = of_family("mistral", sliding_window=200)
    assert Reader(model).packs
    model.model.layers[1].self_attn.config = Hiding(model.config)
    assert not Reader(model).packs


class Hiding:
    """A configuration without a window."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return None if name == "sliding_window" else getattr(self.config, name)


def test_layers_that_run_again_for_their_gradients_see_the_same_texts():
    found = []
    for checkpointing in (False, True):
        model = of_family("qwen3")
        if checkpointing:
            checkpoint_gradients(model)
        reader = Reader(model.train())
        runs: list[int] = []
        assert reader.packs
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        states(reader, texts([12, 5, 30])).square().sum().backward()
        assert len(runs) == 1 + checkpointing
        found.append([p.grad for p in model.model.parameters()])
    torch.testing.assert_close(*found)


def test_the_automatic_limit_falls_with_free_memory(monkeypatch):
    found = []
    for free in (1e12, 4e8, 1e5):
        monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        found.append(Limit.automatic(wide_model()))
    assert found[0] == Limit(2048) and 256 < found[1].tokens < 2048 and found[2] == Limit(256)
    settings = PPOSettings(micro_batch_tokens=100, micro_batch_size=3)
    assert Limit.of(settings, tiny_model()) == Limit(100, 3)
    assert Limit.of(PPOSettings(), wide_model()) == found[2]


def wide_model() -> Any:
    return of_family("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)


def texts(lengths: list[int]) -> list[Row]:
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]
    return [Row(text, [*range(len(text))], [0] * len(text)) for text in ids]


def states(reader: Reader, rows: list[Row]) -> torch.Tensor:
    part: TokenRows = reader.stack(rows)
    assert part.segments is not None
    return part.wanted(reader.read(part).last_hidden_state)


def assert_as_alone(reader: Reader, lengths: list[int]) -> None:
    rows, base = texts(lengths), reader._model.base_model
    before = reader._model.config._attn_implementation
    with torch.no_grad():
        together = states(reader, rows).split(lengths)
        for row, found in zip(rows, together, strict=True):
            alone = base(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert reader._model.config._attn_implementation == before
