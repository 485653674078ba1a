"""States of texts that are kept: which are found again, and reading on from them."""

from __future__ import annotations

import random

import pytest
import torch
from families import of_family

from ppo_engine.models.flop import Span
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import Row
from ppo_engine.models.trunk import Kept, Level, Trunk
from ppo_engine.models.work import Work, counting
from ppo_engine.pretrained.architecture import decoder_layers

TEXTS = [[*range(5, 25)], [*range(5, 25), 3], [70, 200, 1], [9], [*range(40, 52)]]


def test_texts_and_what_they_begin_with_are_found():
    drawn = random.Random(0)
    texts = [[drawn.randrange(3) for _ in range(drawn.randrange(1, 9))] for _ in range(40)]
    kept, states = Kept(), [torch.randn(len(text), 2) for text in texts]
    # All of a text's states say its tokens, so that it does not matter whose they are.
    for text, found in zip(texts, states, strict=True):
        found[:, 0] = torch.tensor(text)
    kept.add(texts, states)
    for _ in range(400):
        text = [drawn.randrange(3) for _ in range(drawn.randrange(1, 9))]
        found = kept.find([texts[0], text])
        assert (found is not None) == any(x[: len(text)] == text for x in texts)
        if found is not None:
            assert [x[:, 0].tolist() for x in found] == [texts[0], text]
    kept.clear()
    assert kept.find(texts[:1]) is None


def test_a_text_is_kept_once():
    kept = Kept()
    kept.add([[1, 2, 3]], [torch.zeros(3, 1)])
    kept.add([[1, 2], [1, 2, 3]], [torch.ones(2, 1), torch.ones(3, 1)])
    assert not kept.find([[1, 2]])[0].any()


@pytest.mark.parametrize("packed", [(True, True), (True, False), (False, True), (False, False)])
def test_reading_from_the_middle_gives_the_same(packed):
    """Whatever the passes are: other texts together, the beginnings of texts, packed or padded."""
    model = of_family("llama", num_hidden_layers=3)
    layers = decoder_layers(model)
    for layer in layers[:2]:
        layer.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    reader = Reader(model)
    ran = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: ran.append(1))

    def read(texts, packed, trunk=None):
        reader.packs, reader.trunk = packed, trunk
        ran.clear()
        rows = reader.stack([Row(text, [len(text) - 1], [0]) for text in texts])
        work = Work(reader.device)
        with counting(work):
            states = reader.read(rows).last_hidden_state[rows.mask]
        spans, share = [Span(0, len(text)) for text in texts], len(ran) / 3
        done = reader.costs.flop(spans, len(texts), gradients=True, layers=share)
        assert work.flop == pytest.approx(done)
        model.zero_grad()
        states.square().sum().backward()
        return states.detach(), [
            p.grad.clone() for p in model.model.parameters() if p.requires_grad
        ]

    one, two = Level(1, Kept()), Level(2, Kept())
    read(TEXTS, packed[0], Trunk(layers, [one]))
    assert len(ran) == 3
    for levels, expected in (([one, two], 2), ([one, two], 1), ([one], 2)):
        texts = [TEXTS[3], TEXTS[0], TEXTS[4][:-1]]
        found = read(texts, packed[1], Trunk(layers, levels))
        assert len(ran) == expected
        torch.testing.assert_close(found, read(texts, packed[1]), rtol=1e-4, atol=1e-5)
        assert len(ran) == 3
    read([TEXTS[0], [8, 8]], packed[1], Trunk(layers, [one, two]))
    assert len(ran) == 3  # one of them is not known
