"""What scores a response: a reward model, or a Python function. Higher is better."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine import models
from ppo_engine.config import RewardConfig
from ppo_engine.errors import UserError
from ppo_engine.text import Prompt, encode_dialogue, pad_left
from ppo_engine.value_model import load_value_model, ready_value_model, sequence_scores

_PROBE_TEXT = "Is 2 + 2 = 4?\nYes, it is."


class RewardModel:
    """A frozen reward model with its own tokenizer and chat template."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int = 8,
        max_tokens: int | None = None,
    ) -> None:
        """`max_tokens` of prompt and response together; the model's own limit unless given."""
        self.model = ready_value_model(model, tokenizer, device).requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.micro_batch_size = micro_batch_size
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = min(x for x in (max_tokens, limit, sys.maxsize) if x is not None)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Scores `[B]`, fp32, of text as this model's tokenizer and chat template render it."""
        rows = [
            encode_dialogue(self.tokenizer, prompt, response, self.max_tokens, ended)
            for prompt, response, ended in zip(prompts, responses, finished, strict=True)
        ]
        return self._score(rows)

    def score_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores `[B]`, fp32, of token ids `[B, L]`, for a policy with the `same_tokenizer`."""
        ids, real = input_ids.cpu(), attention_mask.bool().cpu()
        rows = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
        return self._score([row[-self.max_tokens :] for row in rows])

    @torch.no_grad()
    def _score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        scores = torch.zeros(len(rows), device=self.device)
        # By length, so that short rows are not padded to the longest of all.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.micro_batch_size):
            picked = order[start : start + self.micro_batch_size]
            ids, mask = pad_left([rows[i] for i in picked], self.tokenizer.pad_token_id)
            with models.compute(self.device, self.dtype):
                scores[picked] = sequence_scores(
                    self.model,
                    torch.tensor(ids, device=self.device),
                    torch.tensor(mask, device=self.device),
                )
        return scores


class RewardFunction:
    """A user's `(prompts, responses, **columns) -> list[float]`, with its result checked.

    `prompts` are as the data has them: text, or lists of chat messages. Of the data's other
    columns the function gets those that its signature names, or all of them with `**columns`.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self._columns = _ColumnParameters(function)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Scores `[B]`, fp32, on the CPU; a UserError where the function fails or misbehaves."""
        absent = [name for name in self._columns.required if name not in columns]
        if absent:
            raise UserError(
                f"The reward function {self.name!r} asks for {_quoted(absent)}, but the prompts "
                f"have {_quoted(columns) if columns else 'no other columns'}. Add the column, or "
                "give the parameter a default."
            )
        passed = {k: list(v) for k, v in columns.items() if self._columns.accept(k)}
        try:
            result = self.function(list(prompts), list(responses), **passed)
        except Exception as error:
            raise UserError(
                f"The reward function {self.name!r} failed{_origin(error, self.function)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return self._checked(result, len(responses))

    def _checked(self, result: Any, count: int) -> Tensor:
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple):
            raise UserError(
                f"The reward function {self.name!r} returned {_shown(result)}; it must return a "
                f"list of {count} numbers, one for each response."
            )
        if len(values) != count:
            raise UserError(
                f"The reward function {self.name!r} returned {len(values)} scores for {count} "
                "responses; it must return one for each."
            )
        return torch.tensor([self._number(value, i) for i, value in enumerate(values)])

    def _number(self, value: Any, index: int) -> float:
        number = value.item() if getattr(value, "ndim", None) == 0 else value  # torch, numpy
        valid = isinstance(number, int | float) and math.isfinite(number)
        if not valid or abs(number) > torch.finfo(torch.float32).max:
            raise UserError(
                f"The reward function {self.name!r} returned {_shown(value)} for response {index} "
                "(counted from 0); every score must be a finite number."
            )
        return float(number)


class ScoreNormalizer:
    """Shifts and scales scores to mean 0 and deviation 1, as measured on the first rollouts.

    Statistics grow until `responses` scores have been seen and are then fixed, so that the reward
    does not move while the policy learns (Ziegler et al. 2019, arXiv:1909.08593, section 2.1).
    """

    def __init__(self, responses: int = 256) -> None:
        self.responses = responses
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def __call__(self, scores: Tensor, *, learn: bool = True) -> Tensor:
        """Normalized scores, shaped like `scores`; of an evaluation there is nothing to learn."""
        if learn and self.count < self.responses:
            self._add(scores.double())
        std = math.sqrt(self.m2 / max(self.count, 1))
        # Scores that are all equal have no scale to divide by.
        return (scores - self.mean) / (std if std > 1e-6 else 1.0)

    def _add(self, scores: Tensor) -> None:
        """Merge count, mean and sum of squared deviations (Chan et al. 1979)."""
        total = self.count + scores.numel()
        if not total:
            return
        shift = scores.mean().item() - self.mean
        self.m2 += scores.var(unbiased=False).item() * scores.numel()
        self.m2 += shift**2 * self.count * scores.numel() / total
        self.mean += shift * scores.numel() / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


def apply_missing_eos(scores: Tensor, finished: Tensor, config: RewardConfig) -> Tensor:
    """Scores `[B]` with those of unfinished responses replaced, or else lowered, as configured."""
    if config.missing_eos_score is not None:
        changed = torch.full_like(scores, config.missing_eos_score)
    else:
        changed = scores - config.missing_eos_penalty
    return torch.where(finished, scores, changed)


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether token ids made by one, special tokens included, mean the same to the other."""
    return a is b or (
        a.get_vocab() == b.get_vocab()
        and a.eos_token_id == b.eos_token_id
        and a.chat_template == b.chat_template
        and a(_PROBE_TEXT)["input_ids"] == b(_PROBE_TEXT)["input_ids"]
    )


def load_reward(
    spec: RewardConfig | str | Callable[..., Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch_size: int = 8,
) -> RewardModel | RewardFunction:
    """The reward that `spec` names: a configuration, "file.py:name", "package.module:name", the
    folder or name of a reward model, a function, or a `RewardModel` made already."""
    if isinstance(spec, RewardConfig):
        if (spec.path is None) == (spec.function is None):
            raise UserError(
                "Set either reward.path (a reward model) or reward.function (file.py:name): "
                f"{'neither is' if spec.path is None else 'both are'} set."
            )
        spec = str(spec.path or spec.function)
    if isinstance(spec, RewardModel | RewardFunction):
        return spec
    if not isinstance(spec, str):
        if not callable(spec):
            raise UserError(f"A reward must be a function or a name, but is {_shown(spec)}.")
        return RewardFunction(spec)
    if reward_config(spec, RewardConfig()).function:
        return RewardFunction(import_function(spec), spec)
    spec = models.resolve(spec)
    models.load_model_config(spec)
    tokenizer = models.load_tokenizer(spec)
    model = load_value_model(spec, tokenizer, device=device, require_head=True)
    return RewardModel(
        model, tokenizer, device=device, dtype=dtype, micro_batch_size=micro_batch_size
    )


def reward_config(spec: str, config: RewardConfig) -> RewardConfig:
    """`config` with the reward that `spec` names: "file.py:function", or a model's folder."""
    function = ":" in spec and not Path(spec).exists()
    return replace(config, path=None if function else spec, function=spec if function else None)


def import_function(spec: str) -> Callable[..., Any]:
    """The function that "file.py:name" or "package.module:name" names, or a UserError."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UserError(f"{spec!r} names no function: write file.py:name or module:name.")
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    found = getattr(module, name, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value)]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{source} has no function {name!r}.{hint}")
    if not callable(found):
        raise UserError(f"{name!r} in {source} is not a function, but {_shown(found)}.")
    return found


def _import_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"The reward function's file {source!r} does not exist.")
    name = f"_reward_file_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"{source!r} could not be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _import_module(source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise UserError(
            f"The module {source!r} could not be imported: {type(error).__name__}: {error}. Is it "
            "installed? A file is named by its path, ending in .py."
        ) from error


class _ColumnParameters:
    """Which columns of the data a reward function's signature takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some built-in functions have no signature
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # Prompts and responses, whatever the function calls them.
        self._taken = [p.name for p in parameters if p.kind in positional][:2]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        rest = [
            p for p in parameters
            if p.name not in self._taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]  # fmt: skip
        self._named = {p.name for p in rest}
        self.required = [p.name for p in rest if p.default is p.empty]

    def accept(self, column: str) -> bool:
        return column in self._named or (self._takes_all and column not in self._taken)


def _origin(error: Exception, function: Callable[..., Any]) -> str:
    """Where it failed: the innermost line of the function's own file, if it got that far."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call above
    if not frames:
        return ""
    code = getattr(function, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    return f" at {frame.filename}, line {frame.lineno}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _quoted(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)
