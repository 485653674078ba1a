"""Whether the decode loop gives what the model gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ppo_engine.messages import first_line
from ppo_engine.models import probes
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.windows import Unsupported
from ppo_engine.pretrained import architecture
from ppo_engine.rollout.decoder import Decoder, Draw, Seat
from ppo_engine.rollout.graphs import Graphs

_STEPS = 3
# No token is -1, so no row ends.
_GREEDY = Draw(temperature=1.0, top_k=0, top_p=1.0, greedy=True, ends=(-1,), min_new_tokens=0)
# Of the logits' size. A wrong mask, place or weight changes about as much as there is of them.
_OF_FP32 = 1e-3


def probed_decoder(policy: LanguageModel) -> tuple[Decoder | None, str]:
    """A decoder that was seen to give the model's own logits, or None; and what a user should know
    of it, where that is something."""
    name = type(architecture.unwrap(policy.model)).__name__
    on_gpu = policy.device.type == "cuda"
    note = ""
    for graphs in (True, False) if on_gpu else (False,):
        try:
            with architecture.evaluating(policy.model):
                decoder = Decoder(policy, Graphs() if graphs else None)
                _check(decoder, policy)
            return decoder, note
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model of an unknown family raises
            if graphs:
                note = (
                    f"Sampling launches every kernel by itself, not a CUDA graph of each step: "
                    f"{name} could not be captured ({first_line(error)}). More time, but the same "
                    "results."
                )
            else:
                note = (
                    "Responses are sampled by transformers' own generate, not by the decode loop, "
                    f"which cannot run {name}: {first_line(error)}. More time, but the same "
                    "results."
                )
    return None, note


@torch.no_grad()
def _check(decoder: Decoder, policy: LanguageModel) -> None:
    """Raise `Unsupported` unless two rows of unlike lengths, one of them read in two parts, get the
    logits of a pass over the whole row, and with a CUDA graph the tokens that go with them."""
    ids = probes.probe_ids(policy.model)[0].tolist()[:-_STEPS]
    rows = [ids, ids[: len(ids) // 2 + 1]]
    found, tokens = _write(decoder, rows)
    if not torch.equal(tokens, found.argmax(-1)):
        raise Unsupported("captured as a CUDA graph, a step draws other tokens")
    for row, logits, new in zip(rows, found.float(), tokens.tolist(), strict=True):
        whole = torch.tensor([[*row, *new[:-1]]], device=decoder.device)
        expected = architecture.unwrap(policy.model)(whole, use_cache=False).logits
        expected = expected[0, len(row) - 1 :].float()
        if not expected.isfinite().all():
            raise Unsupported("in a probe, its own logits are not finite")
        # What is added to all of a token's logits changes nothing, and may be large.
        logits, expected = (x - x.mean(-1, keepdim=True) for x in (logits, expected))
        error = ((logits - expected).norm() / expected.norm()).item()
        if not error <= (_OF_FP32 if policy.dtype == torch.float32 else probes.ROUNDING_IN_HALF):
            raise Unsupported(f"in a probe, its logits were off by {error:.1%} of their size")


def _write(decoder: Decoder, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The logits `[rows, steps, V]` behind each of the `rows`, and the tokens written."""
    decoder.reserve(len(rows), len(rows[0]) + _STEPS + 1)
    found, tokens = [], []
    with decoder.session(seed=0), decoder.working():
        half = len(rows[0]) // 2
        decoder.read([(rows[0][:half], [0]), (rows[1][:-1], [1])])
        if rows[0][half:-1]:
            decoder.read_more([(rows[0][half:-1], 0, half)])
        decoder.seat([Seat(i, row[-1], len(row) - 1, 0, _STEPS + 1) for i, row in enumerate(rows)])
        for _ in range(_STEPS):
            found.append(decoder.next_logits(len(rows)).clone())
            tokens.append(decoder.write(len(rows), 1, _GREEDY).tokens[0])
        sampled = decoder.write(len(rows), 1, replace(_GREEDY, greedy=False))
        sampled.on_host()  # after all of them, on a GPU
    decoder.release()
    return torch.stack(found, 1), torch.stack(tokens, 1).to(decoder.device)
