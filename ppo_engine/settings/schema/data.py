"""Settings of data: prompts, preferences and demonstrations; docs/dataset.md says what rows may
be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ppo_engine.settings.schema.base import PositiveInt, settings

# Variables of the chat template, such as {enable_thinking: false}, wherever it is rendered.
ChatTemplateArguments = dict[str, Any]


@settings
class PromptDataConfig:
    """Prompts, text or chat messages; other columns reach the reward."""

    path: str = ""
    """JSONL, parquet or a saved data set; see docs/dataset.md."""
    as_chat: bool = False
    """Text prompts become a user's message, which the chat template wraps."""
    max_prompt_tokens: PositiveInt = 1024
    """Tokens of the longest prompt; a longer one is an error, or left out (on_bad_line)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our names of columns and the file's, such as {prompt: question}."""
    system_prompt: str = ""
    """First message of every chat that has no system message; also of text, as a chat."""
    on_bad_line: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out and say so."""
    chat_template_kwargs: ChatTemplateArguments = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}."""


@settings
class PreferenceDataConfig:
    """Preference pairs or rankings; a share of the prompts is held out to measure accuracy."""

    path: str = ""
    """JSONL, parquet or a saved data set; see docs/dataset.md."""
    eval_path: str | None = None
    """Held-out data of their own, instead of a share of path; null: the share."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the prompts that is held out."""
    max_tokens: PositiveInt = 1024
    """Of prompt and response together; the prompt is truncated first."""
    max_pairs: PositiveInt | None = None
    """Train on a sample of so many pairs (a ranking of K has up to K(K-1)/2); null: all."""
    as_chat: bool = False
    """Text becomes a user's and the assistant's message, which the chat template wraps."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our names of columns and the file's, such as {prompt: question}."""
    system_prompt: str = ""
    """First message of every chat that has no system message; also of text, as a chat."""
    on_bad_line: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out and say so."""
    chat_template_kwargs: ChatTemplateArguments = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}."""


@settings
class DemonstrationDataConfig:
    """Prompts with responses, or chat messages; a share of the prompts is held out."""

    path: str = ""
    """JSONL, parquet or a saved data set; see docs/dataset.md."""
    eval_path: str | None = None
    """Held-out data of their own, instead of a share of path; null: the share."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the prompts that is held out."""
    max_tokens: Annotated[int, Field(ge=2)] = 1024
    """Of an example, prompt and response together; a longer one is truncated."""
    as_chat: bool = False
    """Text becomes a user's and the assistant's message, which the chat template wraps."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our names of columns and the file's, such as {prompt: question}."""
    system_prompt: str = ""
    """First message of every chat that has no system message; also of text, as a chat."""
    on_bad_line: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out and say so."""
    chat_template_kwargs: ChatTemplateArguments = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}."""
