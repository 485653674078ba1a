"""What a user should know of how a language model is trained and sampled from."""

from __future__ import annotations

from ppo_engine.models.language_model import LanguageModel


def training_notes(model: LanguageModel) -> list[str]:
    """Where its log-probs cost more than they need to, and what is added to its loss."""
    notes = [model.balance.note] if model.balance.note else []
    if model.uses_own_logits:
        notes.append(
            "Logits are the model's own, for every position: its output layer could not be "
            "reproduced from its hidden states. More memory and time, but the same results."
        )
    elif model.makes_logits:
        notes.append(
            "Logits are made for every response token, as the output layer has adapters or is "
            "quantized. More memory and time, but the same results."
        )
    if not model.reader.packs:
        notes.append(
            "Texts are padded, not packed: in a probe of this model, packed texts saw each other, "
            "or its attention was not told where they begin. More time, but the same results."
        )
    return notes


def sampling_notes(model: LanguageModel) -> list[str]:
    """Where its family cannot be sampled from as others are."""
    notes = []
    if not model.heeds_padding:
        notes.append(
            "Only prompts of the same length are sampled together: in a probe, this model read the "
            "padding before shorter ones. More time, but the same results."
        )
    if not model.continues_from_cache:
        notes.append(
            "Each token is sampled from all those before it, without a cache: in a probe, the "
            "model's own cache gave other logits. More time, but the same results."
        )
    return notes
