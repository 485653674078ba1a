"""Models that score text: the reward model (one score for a sequence) and the critic (a value
at each of its tokens).

Both are sequence classifiers with one label (`pretrained.classifier`). They pool their
logits at the last token that is not padding; here the head is applied to the base model's hidden
states directly, at every token that is asked for. `check_value_head` proves on a probe batch that
the two agree, and whatever is saved loads elsewhere with `from_pretrained`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.models import freezing
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import TokenRows, scored, stack
from ppo_engine.pretrained import adapters, architecture, loading, masters, storage
from ppo_engine.pretrained.architecture import SCORE_HEADS
from ppo_engine.pretrained.classifier import value_model_class
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.pretrained.weights import read_checkpoint, refuse_missing
from ppo_engine.settings.schema import ModelConfig

_PROBE = ("A short one.", "A longer text, so that the two are not equally long.")
_PROBE_TOLERANCE = 1e-3
# Ends of the names of classes that have an output layer in the place of a score head.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_value_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A sequence-classification model with one label from `path` (folder or name), in fp32, or as
    `options` (`loading.load_options`) say.

    A checkpoint without a head (a causal language model) gets a new one, made from `seed`. One with
    another number of labels, or from which no per-token values can be made, is a UserError.
    """
    model = read_value_model(path, seed=seed, options=options)
    return ready_value_model(model, tokenizer, device)


def read_value_model(
    path: str,
    *,
    seed: int = 0,
    require_head: bool = False,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """What `load_value_model` loads, for `ready_value_model`, which checks it. With `require_head`
    (a model that is to score without being trained), one without a head is a UserError."""
    path = loading.resolve(path)
    options = options or {"dtype": torch.float32}
    config = loading.load_model_config(path, trust=options.get("trust_remote_code", False))
    _check_labels(path, config)
    checkpoint = read_checkpoint(value_model_class(config), path, {"num_labels": 1, **options})
    head_name, head = _find_head(checkpoint.model)
    of_head = {name for name in checkpoint.missing if name.startswith(f"{head_name}.")}
    # Only a language model has none.
    may_lack = set() if architecture.is_classifier(config) else of_head
    refuse_missing(path, checkpoint.missing - may_lack, checkpoint.unused)
    if of_head:
        if require_head:
            raise _no_head(path)
        init_head(head, seed)
    return checkpoint.model


def check_scores(path: str, *, trust: bool = False) -> None:
    """A UserError where the configuration at `path`, a folder or name, already says that the model
    cannot score responses: the weights may say so too (`read_value_model`)."""
    path = loading.resolve(path)
    config = loading.load_model_config(path, trust=trust)
    _check_labels(path, config)
    if any(name.endswith(_LANGUAGE_MODELS) for name in config.architectures or ()):
        raise _no_head(path)


def _check_labels(path: str, config: Any) -> None:
    if architecture.is_classifier(config) and config.num_labels != 1:
        raise UserError(
            f"{path!r} is a classifier with {config.num_labels} labels; a reward model or critic "
            "has exactly one (num_labels=1)."
        )


def _no_head(path: str) -> UserError:
    return UserError(
        f"{path!r} has no score head, so it cannot score responses: train a reward model "
        "from it first (`ppo-engine reward`)."
    )


def ready_value_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """A model on its device, without dropout, padding as `tokenizer` does, its head checked."""
    loading.resize_embeddings(model, tokenizer)
    architecture.make_repeatable(model)
    model.to(device)
    with masters.computing_in_fp32(model):
        check_value_head(model, tokenizer)
    return cast(PreTrainedModel, model.eval())


def make_critic(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    dtype: torch.dtype,
    policy: PreTrainedModel,
    reward_model: PreTrainedModel | None = None,
    seed: int = 0,
) -> Any:
    """The critic, ready to be trained: from its own path, else a copy of the reward model (head
    included, as it computes: in bf16 rounded), else the policy's weights with a new head.

    `tokenizer` is the policy's, whose tokens the critic reads: pass a reward model only where
    it shares them (`text.tokenizer.same_tokenizer`).
    """
    if config.path:
        options = loading.load_options(config, device, dtype)
        critic = load_value_model(config.path, tokenizer, device=device, seed=seed, options=options)
    elif reward_model is not None:
        critic = storage.in_fp32(copy.deepcopy(reward_model)).requires_grad_(True)
    else:
        critic = value_model_from_policy(policy, tokenizer, seed)
    return freezing.prepare_for_training(critic, config, "SEQ_CLS", dtype)


def value_model_from_policy(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The policy's transformer, copied (adapters merged), under a new head."""
    device, policy = policy.device, adapters.merged(policy)  # merged, it is on the CPU
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with quiet_transformers():
        model = value_model_class(config)._from_config(config, dtype=torch.float32)
    model = storage.in_fp32(model, storage.stored_dtype(policy))
    source = getattr(policy, model.base_model_prefix)  # of a few families not their base_model
    try:
        state = source.state_dict(keep_vars=True)
        model.base_model.load_state_dict({name: masters.master(x) for name, x in state.items()})
    except RuntimeError as error:  # Bart's reads with an encoder, Bert's has a pooler
        raise UserError(
            f"No critic can be made from {type(policy).__name__}: {type(model).__name__} has other "
            "weights. Give another model, or choose an estimator without a critic, such as "
            "ppo.estimator=grpo or reinforce_pp."
        ) from error
    init_head(_find_head(model)[1], seed)
    return ready_value_model(model, tokenizer, device)


def init_head(head: nn.Linear, seed: int) -> None:
    """Weights from a normal distribution with standard deviation 1/sqrt(H+1), bias 0.

    As in Stiennon et al. 2020 (arXiv:2009.01325): scores start small, with unit-scale inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    std = 1 / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(
            torch.randn(head.weight.shape, dtype=torch.float32, generator=generator) * std
        )
        if head.bias is not None:
            head.bias.zero_()


def score_head(model: Any) -> nn.Linear:
    """The linear layer from hidden states to the one score."""
    return _find_head(architecture.unwrap(model))[1]


def read_values(model: Any, reader: Reader, rows: TokenRows) -> Tensor:
    """The value at each place of `rows` whose state is wanted: `[places]` fp32, differentiable. It
    has seen that token and those before it."""
    hidden = rows.wanted(reader.read(rows).last_hidden_state)
    # In fp32: bf16 has 8 bits, too few for scores whose differences are the signal.
    head = score_head(model)
    return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def check_value_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError unless `read_values` at a text's end are the model's own pooled logits."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    # With EOS, as responses end: a pooling that takes it for padding is detected.
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROBE]
    rows = [[*text[: architecture.context_length(model) - 1], eos] for text in texts]
    # Padded for both, so that in bf16 nothing but the head can differ.
    padded = stack([scored(row) for row in rows], pad=pad, device=model.device, packed=False)
    with torch.no_grad():
        own = model(input_ids=padded.ids, attention_mask=padded.mask.long()).logits
        own = own.squeeze(-1).float()
        ours = read_values(model, Reader(model), padded)
    # `own` has another shape where the model does not pool at the last token.
    if own.shape != ours.shape or not torch.allclose(own, ours, _PROBE_TOLERANCE, _PROBE_TOLERANCE):
        raise UserError(
            f"Per-token values cannot be made from {type(model).__name__}: its score is not a "
            "linear layer on the last token's hidden state. Use a decoder model, such as a causal "
            "language model."
        )


def _find_head(model: PreTrainedModel) -> tuple[str, Any]:
    for name in SCORE_HEADS:
        head = getattr(model, name, None)
        if getattr(head, "out_features", None) == 1:
            return name, head
    raise UserError(
        f"Per-token values cannot be made from {type(model).__name__}: it has no linear layer "
        f"named {' or '.join(SCORE_HEADS)} with one output."
    )
