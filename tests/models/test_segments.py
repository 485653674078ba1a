"""Packed texts in buckets of about one length, and back."""

from __future__ import annotations

import pytest
import torch

from ppo_engine.models.segments import Segments

CPU = torch.device("cpu")
LENGTHS = [
    [1],
    [7],
    [4] * 5,
    [9, 8, 8, 3, 1, 1],
    [1, 2, 30, 29, 1],
    [3, 50, 2, 49, 4],
    [*range(1, 20)],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_buckets_take_they_give_back(lengths):
    segments = Segments(lengths, CPU)
    sizes = [bucket.tokens for bucket in segments.buckets]
    assert sum(sizes) == sum(lengths) and sum(b.rows for b in segments.buckets) == len(lengths)
    for bucket in segments.buckets:
        assert bucket.rows == 1 or bucket.rows * bucket.width <= 1.15 * bucket.tokens
    x = torch.randn(sum(lengths), 2, 3, dtype=torch.double, requires_grad=True)
    start = 0
    for bucket, part in zip(segments.buckets, x.split(sizes), strict=True):
        rows = bucket.take(part)
        assert rows.shape == (bucket.rows, bucket.width, 2, 3)
        assert torch.equal(bucket.give(rows), part)
        for row, found in enumerate(rows):
            length = lengths[start + row]
            assert (found[length:] == found[length - 1]).all()
        start += bucket.rows
    back = torch.cat(
        [b.give(b.take(p)) for b, p in zip(segments.buckets, x.split(sizes), strict=True)]
    )
    weights = torch.randn_like(back)
    back.backward(weights)
    assert torch.equal(x.grad, weights)


def test_copies_have_no_gradient():
    [bucket] = Segments([20, 19, 18], CPU).buckets
    x = torch.randn(57, 1, requires_grad=True)
    rows = bucket.take(x)
    rows.retain_grad()
    bucket.give(rows).sum().backward()
    assert (
        rows.grad.sum() == 57 and (rows.grad[1, 19:] == 0).all() and (rows.grad[2, 18:] == 0).all()
    )


def test_where_texts_begin():
    segments = Segments([2, 3, 1], CPU)
    assert segments.cu_seqlens.tolist() == [0, 2, 5, 6] and segments.cu_seqlens.dtype == torch.int32
    assert segments.positions.tolist() == [[0, 1, 0, 1, 2, 0]] and segments.longest == 3
    assert [segments.window(tokens) for tokens in (None, 2, 3, 9)] == [None, 2, None, None]
