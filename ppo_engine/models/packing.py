"""Examples of many lengths as rows of tokens: several per row, without attending to each other.

A row of tensors holds examples end to end, the position ids restarting at each, and no attention
mask: from such positions transformers makes attention block-diagonal, for the models that can
(`can_pack` proves it). For others, a row is one example and padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.data.demonstrations import EncodedExample
from ppo_engine.models.token_rows import TokenRows
from ppo_engine.pretrained import architecture

_PROBE = ("The quick brown fox jumps over the lazy dog.", "Another text, in the same row.")
# Relative to how far one text affects another when they are joined: products whose shapes depend
# on the tokens, as those of experts do, round by less.
_ROUNDING = 1e-2


def plan(lengths: Sequence[int], room: int, rows: int, pack: bool) -> list[list[list[int]]]:
    """Forward passes of rows of indices into `lengths`: passes of at most `rows * room` tokens,
    padding included; rows of at most `room`, or of one example each.

    First-fit decreasing: the longest first, each into the first row that has room for it. What is
    planned together is a mini-batch, so that training batches stay as random as they were.
    """
    filled = _first_fit(lengths, room) if pack else [[index] for index in range(len(lengths))]
    used = [sum(lengths[index] for index in row) for row in filled]
    # Rows of similar length together; the first of a pass is its widest.
    passes: list[list[list[int]]] = []
    width = 0
    for row in sorted(range(len(filled)), key=lambda r: -used[r]):
        if not passes or (len(passes[-1]) + 1) * width > rows * room:
            passes.append([])
            width = used[row]
        passes[-1].append(filled[row])
    return passes


def _first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    shortest = min(lengths, default=0)
    filled: list[list[int]] = []
    unfilled: list[tuple[list[int], int]] = []  # the rows that another fits into, and its room
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = next((r for r, (_, left) in enumerate(unfilled) if length <= left), None)
        if place is None:
            place = len(unfilled)
            filled.append([])
            unfilled.append((filled[-1], room))
        row, left = unfilled[place]
        row.append(index)
        unfilled[place] = row, left - length
        if left - length < shortest:
            del unfilled[place]
    return filled


def stack_rows(
    examples: Sequence[EncodedExample],
    rows: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    pack: bool,
) -> TokenRows:
    """The tensors of one forward pass of `plan`; owners are the indices that `rows` holds."""
    width = max(sum(len(examples[i]) for i in row) for row in rows)
    ids, positions, trained, owners = [], [], [], []
    for row in rows:
        left = width - sum(len(examples[i]) for i in row)
        ids.append([t for i in row for t in examples[i].ids] + [pad] * left)
        trained.append([t for i in row for t in examples[i].trained] + [False] * left)
        owners.append([i for i in row for _ in examples[i].ids] + [-1] * left)
        # What is left is an example to itself.
        positions.append([t for n in (*(len(examples[i]) for i in row), left) for t in range(n)])
    return TokenRows(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device) if pack else None,
        trained=torch.tensor(trained, device=device),
        owners=torch.tensor(owners, device=device),
    )


@torch.no_grad()
def can_pack(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts in one row do not attend to each other: in a probe, a text's logits must not
    change with the text before it, in a pass of one row and of two.

    They are not compared with those of the text alone: how bf16 and 8-bit products round depends
    on the shape of the batch, by more than some texts affect each other.
    """
    if not architecture.takes_positions(model.base_model):
        return False
    texts = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROBE)
    room = architecture.context_length(model) // 2
    first, second = (torch.tensor(text[:room], device=model.device) for text in texts)
    other = torch.full_like(first, int(second[0]))

    def seen(positions: Tensor, rows: int) -> float:
        """How much the second text's logits depend on the text before it."""
        found = []
        for before in (first, other):
            ids = torch.cat((before, second)).expand(rows, -1)
            logits = model(
                input_ids=ids, position_ids=positions.expand(rows, -1), use_cache=False
            ).logits
            found.append(logits[:, len(before) :].float())
        return (found[0] - found[1]).abs().max().item()

    whole = torch.arange(len(first) + len(second), device=model.device)
    apart = torch.cat((whole[: len(first)], whole[: len(second)]))
    limit = _ROUNDING * seen(whole, rows=1)
    return all(seen(apart, rows) <= limit for rows in (1, 2))
