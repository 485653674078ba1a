"""Tiny models for tests: a byte-level tokenizer and a random Llama, made in milliseconds.

Import as `from tiny import tiny_tokenizer, tiny_model_folder` (pytest puts `tests/` on the path).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte (any text round-trips), then `<|pad|>`, `<|im_start|>`, `<|im_end|>`.

    EOS is `<|im_end|>`, pad is `<|pad|>`, there is no BOS; 259 tokens in all.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None) -> LlamaForCausalLM:
    """A random Llama: 2 layers, hidden 32, 4 heads, fp32, and the vocabulary of `tokenizer`, by
    default `tiny_tokenizer`."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_model_folder(
    tmp_path: Path,
    chat_template: bool = True,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> str:
    """Save `tiny_model` and its tokenizer, by default `tiny_tokenizer`, under `tmp_path`; returns
    the folder."""
    folder = Path(tmp_path) / ("tiny-chat" if chat_template else "tiny-text")
    tokenizer = tokenizer or tiny_tokenizer(chat_template)
    tiny_model(seed, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
