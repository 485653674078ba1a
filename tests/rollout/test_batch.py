"""A rollout: its rows as a model reads them, and what a selection keeps and trims."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rollouts import PAD, ROWS, TOKENIZER, Row, rollout_of, tokens_of

from ppo_engine.rollout.batch import Rollout


def with_logprobs(rollout: Rollout) -> Rollout:
    numbers = torch.arange(1.0, rollout.mask.numel() + 1).view_as(rollout.mask.float())
    return dataclasses.replace(rollout, logprobs=-numbers * rollout.mask, greedy=rollout)


def test_sequences_are_prompt_and_response_with_the_padding_outside():
    rollout = rollout_of()
    ids, real = rollout.sequences()
    assert ids.shape == real.shape == (6, 15 + 15)
    for b, row in enumerate(ROWS):
        expected = TOKENIZER(row.prompt)["input_ids"] + tokens_of(row)[0]
        assert ids[b][real[b]].tolist() == expected
        assert (ids[b][~real[b]] == PAD).all()
        # Every response starts in the same column.
        assert real[b].nonzero()[0].item() == 15 - len(TOKENIZER(row.prompt)["input_ids"])
    assert rollout.lengths.tolist() == [sum(tokens_of(row)[1]) for row in ROWS]
    alone = dataclasses.replace(rollout, environment_mask=None)
    assert torch.equal(alone.response_mask, rollout.mask)


@pytest.mark.parametrize("rows", [[2, 0], [1], [5, 1], [4, 4, 3], [0, 1, 2, 3, 4, 5]], ids=str)
def test_a_selection_is_the_batch_of_its_rows(rows):
    """Every field as if these rows alone had been padded together, and no token lost, whoever
    wrote it."""
    whole = with_logprobs(rollout_of())
    found = whole.select(torch.tensor(rows))
    expected = rollout_of([ROWS[row] for row in rows])
    width = expected.mask.shape[1]
    for field in dataclasses.fields(Rollout):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "logprobs":
            assert torch.equal(one, whole.logprobs[rows, :width])
        elif field.name == "columns":
            assert one == {"row": rows}
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:  # `greedy` is of the whole
            assert one == other, field.name
    assert len(found) == len(rows)


def test_a_selection_keeps_the_environments_last_turn():
    rows = (Row("Hi", ("a", "the environment has the last word")), Row("Hi", ("bc",)))
    found = rollout_of(rows).select(torch.tensor([1, 0]))
    ids, real = found.sequences()
    assert TOKENIZER.decode(ids[1][real[1]]).endswith(
        "a<|im_end|>the environment has the last word"
    )
    assert found.lengths.tolist() == [3, 2]
