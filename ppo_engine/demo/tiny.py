"""A tiny random language model over a few dozen words, for the smoke demo: made in milliseconds.

Some of the words carry a sentiment, so every stage of the demo has something to measure.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppo_engine.demo.model import CHAT_TEMPLATE

_SPECIAL = ("<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
_WORDS = (
    "user assistant write one sentence about the a is was with and of in on near very quite "
    "rain chair river house road coffee door window bread clock "
    "good happy lovely wonderful great bad sad awful terrible angry"
)


def save_tiny_model(folder: Path, seed: int) -> None:
    """Write a random two-layer Llama and its word-level tokenizer into `folder`."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_WORDS.split()))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
