"""What a model does with the same tokens in another place, in another mode, or twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ppo_engine.errors import UserError
from ppo_engine.models.experts import unrouted
from ppo_engine.pretrained import architecture

_TOKENS = 12  # of the probe's text, where the model's context has room for it and its padding
# A smaller share is rounding, also that of half precision and of experts whose products have other
# shapes. Of what unmasked padding does, masked padding does 0.3 in RecurrentGemma and all in RWKV;
# a wrong cache changes about as much as there is of the logits.
_ROUNDING = 0.05
# The same with weights in bf16: SmolLM2's logits are 2 to 8 % of their size off those in fp32, and
# 2 to 4 % off its own where a norm is rounded once instead of twice.
ROUNDING_IN_HALF = 0.15
_CONTINUED = 3  # tokens, all but the first of them from the cache


@torch.no_grad()
def heeds_padding(model: Any) -> bool:
    """Whether padding before a text changes nothing in it, as its mask asks for."""
    ids = probe_ids(model)
    text, padding = ids[:, ids.shape[1] // 3 :], ids[:, : ids.shape[1] // 3]
    padded = torch.cat((padding, text), 1)
    masked = torch.cat((torch.zeros_like(padding), torch.ones_like(text)), 1)
    alone = _read(model, text, torch.ones_like(text))

    def change(mask: Tensor) -> float:
        found = _read(model, padded, mask)[:, padding.shape[1] :]
        return (found - alone).norm().item()

    return change(masked) <= _ROUNDING * change(torch.ones_like(masked))


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raise a UserError unless later tokens change nothing in earlier ones: log-probs would be
    those of tokens that the model has already read, and padding behind a text would count."""
    ids = probe_ids(model)
    third = ids.shape[1] // 3
    past, text = ids[:, :third], ids[:, third : 2 * third]
    other = ids.flip(1)[:, :third]

    def read(before: Tensor, *behind: Tensor) -> Tensor:
        found = torch.cat((before, text, *behind), 1)
        return _read(model, found, torch.ones_like(found))[:, third : 2 * third]

    found = read(past)
    if (read(past, other) - found).norm() > _ROUNDING * (read(other) - found).norm():
        raise UserError(
            f"{type(architecture.unwrap(model)).__name__} is no causal language model: what it "
            "makes of a token depends on those behind it. Give a decoder; families of encoders "
            "need is_decoder: true in config.json."
        )


@torch.no_grad()
def continues_from_cache(model: Any) -> bool:
    """Whether what the model keeps of the tokens that it has read stands for them where it writes:
    not in every family (RWKV's mixes the rows of a batch, xLSTM's may have another shape)."""
    ids = probe_ids(model)[:, :-_CONTINUED]
    ids = torch.cat((ids, ids.flip(1)))
    of_model = architecture.unwrap(model)
    shipped, of_model.generation_config = of_model.generation_config, GenerationConfig()
    try:
        written = of_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_CONTINUED,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            **unrouted(of_model),
        )
    except (ValueError, RuntimeError, IndexError):  # the library's own, of states that do not fit
        return False
    finally:
        of_model.generation_config = shipped
    found = torch.stack(written.logits, 1)
    sequences = written.sequences[:, :-1]
    expected = of_model(input_ids=sequences, use_cache=False).logits[:, ids.shape[1] - 1 :]
    # What is added to all of a token's logits changes nothing, and may be large.
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    limit = _ROUNDING if expected.dtype == torch.float32 else ROUNDING_IN_HALF
    return bool((found - expected).norm() <= limit * expected.norm())


@torch.no_grad()
def check_repeatable(model: Any) -> None:
    """Raise a UserError unless two passes in training mode, and one in evaluation, give the same:
    the ratio of PPO would not start at 1. Leaves the model in evaluation mode."""
    ids = probe_ids(model)
    mask = torch.ones_like(ids)
    model.train()
    first, second = _read(model, ids, mask), _read(model, ids, mask)
    model.eval()
    expected = _read(model, ids, mask)
    # Kernels for training may round otherwise: half of the digits are to be the same.
    limit = torch.finfo(expected.dtype).eps ** 0.5 * expected.norm()
    for found, what in ((second, "again in training mode"), (expected, "in evaluation mode")):
        if (found - first).norm() > limit:
            raise UserError(
                f"{type(architecture.unwrap(model)).__name__} cannot be trained: the same tokens "
                f"give other hidden states {what}. It has noise that could not be switched off; "
                "look for a rate of dropout or jitter in its config.json, and set it to 0."
            )


def probe_ids(model: Any) -> Tensor:
    """Tokens `[1, L]` that differ from each other, where there are as many, from all over the
    vocabulary: the first ones are often special and hardly trained, and what a model makes of them
    in bf16 may have nothing to do with what it makes of them in fp32."""
    embedding = architecture.unwrap(model).get_input_embeddings()
    count = max(_CONTINUED + 2, min(_TOKENS * 3 // 2, architecture.context_length(model)))
    places = torch.arange(count, device=embedding.weight.device)[None]
    return (2 * places + 1) * len(embedding.weight) // (2 * count)


def _read(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The base model's last hidden states; its logits, where it gives no hidden states."""
    base = architecture.unwrap(model).base_model
    return architecture.states_of(base(**architecture.base_inputs(base, ids, mask)))
