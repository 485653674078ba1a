"""What scores responses, higher is better: one reward or several with weights.

A reward is called with (prompts, responses, finished, columns), B of each, and returns scores [B].
It is a reward model (`model`), a Python function (`function`) or an HTTP endpoint
(`http`). A model reads equal responses to one prompt once; functions and endpoints, which may draw
random numbers, are asked for each. What becomes of the scores is in `shaping`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_engine.data.prompts import PromptExample, columns_of
from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.models import precision
from ppo_engine.models.budget import Budget
from ppo_engine.models.shared_base import SharedBase
from ppo_engine.rewards.arguments import bound, ready_reward
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.rewards.model import RewardModel, load_reward_model
from ppo_engine.rewards.ready import READY, REFUSING, ready_function
from ppo_engine.rewards.sources import (
    check_arguments,
    check_function,
    check_names,
    check_token,
    check_weights,
    configured_sources,
    named_rewards,
    parse_source,
    unique_names,
)
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.schema import RewardEndpointConfig, RewardSource, ScoringConfig
from ppo_engine.text.options import from_columns
from ppo_engine.text.prompt import show_prompt
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError
from ppo_engine.text.tokenizer import same_tokenizer
from ppo_engine.user_functions.function import function_name
from ppo_engine.user_functions.importing import import_function

Reward = RewardModel | RewardFunction | HTTPReward
# As users give them: the name of one, a function, or a reward object.
RewardLike = str | Callable[..., Any]
RewardsLike = RewardLike | Sequence[RewardLike] | Mapping[str, RewardLike]


class Rewards:
    """The rewards of a run by name, and the weights with which they add up."""

    def __init__(
        self,
        by_name: Mapping[str, Reward],
        weights: Sequence[float] | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """`weights` in the order of the names, 1 each by default; `tokenizer` is the policy's."""
        check_weights(weights, len(by_name), f" ({', '.join(by_name)})")
        self._tokenizer = tokenizer
        self.by_name = dict(by_name)
        self.weights = dict(zip(by_name, weights or [1.0] * len(by_name), strict=True))
        # Those that read the policy's own tokens: no text in between.
        self.by_tokens = {
            name: reward
            for name, reward in self.by_name.items()
            if isinstance(reward, RewardModel) and same_tokenizer(reward.tokenizer, tokenizer)
        }

    @property
    def models(self) -> list[RewardModel]:
        return [reward for reward in self.by_name.values() if isinstance(reward, RewardModel)]

    def reads(self, column: str) -> bool:
        """Whether a reward gets that column of the data: endpoints get all, models none."""
        return any(
            isinstance(reward, HTTPReward)
            or (isinstance(reward, RewardFunction) and reward.accepts(column))
            for reward in self.by_name.values()
        )

    def check_columns(self, columns: Collection[str], *, several_turns: bool = False) -> None:
        """A UserError where a reward function cannot be called on data with these `columns`: a run
        finds out before it samples."""
        for reward in self.by_name.values():
            if isinstance(reward, RewardFunction):
                reward.check_columns(columns, several_turns=several_turns)

    def try_functions(
        self, examples: Sequence[PromptExample], copies: int, *, several_turns: bool = False
    ) -> None:
        """Call each reward function once, before anything is sampled, on the first two prompts,
        `copies` times each, with their own text in place of responses; the scores are thrown away.
        A UserError where it fails, or returns something else than scores.

        No endpoint is asked: whoever serves it may charge for what it is asked, or record it.
        """
        asked = [example for example in examples[:2] for _ in range(copies)]
        prompts, columns = [example.prompt for example in asked], columns_of(asked)
        texts = [show_prompt(prompt) for prompt in prompts]
        turns = [[{"role": "assistant", "content": text}] for text in texts]
        token_ids = [list(self._tokenizer(text)["input_ids"]) for text in texts]
        for reward in self.by_name.values():
            if not isinstance(reward, RewardFunction):
                continue
            try:
                reward(
                    prompts,
                    texts,
                    [True] * len(texts),
                    columns,
                    turns=turns if several_turns else None,
                    token_ids=token_ids,
                )
            except UserError as error:
                raise UserError(
                    f"{str(error).rstrip('.')}. This was a trial call before anything is sampled, "
                    "with the prompts' own text as responses; a policy may write such text too."
                ) from error

    def check_rows(self, examples: Sequence[PromptExample]) -> None:
        """A UserError for a row that a ready function refuses, such as an answer without a number:
        a run would find out when it comes to that row."""
        for reward in self.by_name.values():
            check_rows(reward, examples)

    def check_prompts(self, examples: Sequence[PromptExample]) -> None:
        """A UserError for a prompt that a reward model cannot read, for which the policy's chat
        template may well have had a place."""
        for name, reward in self.by_name.items():
            if not isinstance(reward, RewardModel) or name in self.by_tokens:
                continue
            for example in examples:
                try:
                    reward.check_prompt(example.prompt, from_columns(example.columns))
                except TemplateError as error:
                    raise UserError(
                        f"{example.place}: the reward model {name!r} cannot read this prompt: "
                        f"{error}. Leave such prompts out, or take another reward model."
                    ) from error

    def score_each(self, rollout: Rollout) -> dict[str, Tensor]:
        """Each reward's scores of the responses, before weights: [B] fp32 by name."""
        return {name: self._score(name, rollout) for name in self.by_name}

    def total(self, each: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `score_each`: [B] fp32; a UserError where that cannot hold it. Of
        scores that are not finite it is none either."""
        parts = {name: self.weights[name] * scores for name, scores in each.items()}
        total = torch.stack([*parts.values()]).sum(0)
        good = torch.stack([*each.values()]).isfinite().all(0)
        for index in (good & ~total.isfinite()).nonzero().flatten().tolist()[:1]:
            terms = " + ".join(f"{float(part[index]):g} ({name})" for name, part in parts.items())
            raise UserError(
                f"The rewards of response {index} (counted from 0) add up to no finite number: "
                f"{terms}, with reward.weights. Scale them down."
            )
        return total

    def rounding(self, each: Mapping[str, Tensor]) -> Tensor:
        """By how much rounding alone may change the `total` of `score_each`: [B] fp32.

        Of a reward model this is a share of the batch's largest score, as its products are no
        smaller where they cancel; of all else a share of each score.
        """
        parts = []
        for name, scores in each.items():
            reward, size = self.by_name[name], scores.abs()
            dtype = torch.float32
            if isinstance(reward, RewardModel):
                largest = size.nan_to_num(0.0, 0.0).max()  # beside one that is not finite
                dtype, size = reward.dtype, largest.expand_as(size)
            parts.append(abs(self.weights[name]) * precision.rounding(dtype) * size)
        return torch.stack(parts).sum(0)

    def _score(self, name: str, rollout: Rollout) -> Tensor:
        reward, columns = self.by_name[name], rollout.columns
        told = rollout.prompts, rollout.responses, rollout.finished.tolist()
        if isinstance(reward, RewardModel):
            if rollout.turns is None:  # a column of the data's own
                columns = {key: column for key, column in columns.items() if key != "turns"}
            written = rollout.written if name in self.by_tokens else None
            scores = reward(*told, columns, written)
        elif isinstance(reward, RewardFunction):
            answers = [answer for _, answer in rollout.written]
            scores = reward(*told, columns, turns=rollout.turns, token_ids=answers)
        else:
            scores = reward(*told, columns)
        return scores.to(rollout.mask.device)


def check_rows(reward: Reward, examples: Sequence[PromptExample]) -> None:
    """The same of one reward, whose columns have been checked."""
    if not isinstance(reward, RewardFunction):
        return
    name = function_name(reward.function)
    function = getattr(reward.function, "func", reward.function)  # what its arguments are bound to
    if name not in REFUSING or function is not ready_function(name):
        return
    for example in examples:
        try:
            reward([example.prompt], [""], [False], columns_of([example]))
        except UserError as error:
            raise UserError(f"{example.place}: {error}") from error


def reward_metrics(each: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and standard deviation of each reward's own scores; nothing where there is but one."""
    metrics = {}
    for name, scores in each.items() if len(each) > 1 else ():
        metrics[f"rewards/{name}/mean"] = float(scores.mean())
        metrics[f"rewards/{name}/std"] = float(scores.std(unbiased=False))
    return metrics


def load_rewards(
    given: RewardsLike | None,
    config: ScoringConfig,
    renderer: Renderer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget | None = None,
    base: SharedBase | None = None,
) -> Rewards:
    """The rewards `given`, or else those that `config` names, with the weights of `config`.

    `given` is one reward, a list, or a mapping of names to rewards, each one anything that
    `load_reward` takes. `renderer` is the policy's. Raises a UserError for a reward that cannot be
    used, and where there is none. One reward that is `given` gets the arguments of `config`. With a
    `base`, reward models are adapters on it.
    """
    if given is not None:
        rewards = named_rewards(given)
        check_arguments(config, len(rewards))
        check_token(config, [parse_source(text) for _, text in rewards if isinstance(text, str)])
    else:
        rewards = [(source.name, source) for source in configured_sources(config)]
    if not rewards:
        raise UserError(
            "No reward was given: pass reward=…, or set reward.path (a reward model), "
            "reward.function (file.py:name, or exact_match and the like) or reward.url, or list "
            "several under reward.sources."
        )
    wanted = [name for name, _ in rewards]
    check_names(wanted)  # before models are loaded, which takes a while
    loaded = [
        load_reward(
            reward,
            arguments=config.arguments,
            http=config.http,
            device=device,
            dtype=dtype,
            budget=budget,
            renderer=renderer,
            base=base,
            trust=config.trust_remote_code,
        )
        for _, reward in rewards
    ]
    names = unique_names(wanted, [_default_name(reward) for reward in loaded])
    return Rewards(dict(zip(names, loaded, strict=True)), config.weights, renderer.tokenizer)


def load_reward(
    given: RewardSource | RewardLike,
    *,
    arguments: Mapping[str, Any] | None = None,
    http: RewardEndpointConfig | None = None,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget | None = None,
    renderer: Renderer | None = None,
    base: SharedBase | None = None,
    trust: bool = False,
) -> Reward:
    """One reward: a source, what `parse_source` takes for one, a function, or a reward object; with
    `arguments`, where it is a function; with `trust`, a model by code that comes with it."""
    arguments = dict(arguments or {})
    if isinstance(given, str):
        given = parse_source(given)
    if isinstance(given, RewardSource):
        given = replace(given, arguments=given.arguments | arguments)
        check_function(given)
    if isinstance(given, RewardModel) and base is not None:
        raise UserError(
            "share_base has no place for a RewardModel with weights of its own: give the folder of "
            "its adapters, or leave share_base unset."
        )
    if isinstance(given, RewardModel) and renderer is not None:
        given.renderer = renderer.of(given.tokenizer)  # with what this run hands to templates
    if isinstance(given, Reward):
        if arguments:
            raise UserError(
                "reward.arguments are those of a function given by name, or as it is: a "
                f"{type(given).__name__} has its own."
            )
        return given
    if isinstance(given, nn.Module):
        raise UserError(
            f"A reward model needs its tokenizer, so a {type(given).__name__} alone cannot "
            "be one: pass its folder or name, rewards.model.RewardModel, or a function."
        )
    if not isinstance(given, RewardSource):
        if not callable(given):
            raise UserError(f"A reward must be a function or a name, but is {shown(given)}.")
        return RewardFunction(bound(given, arguments, function_name(given)))
    if given.url:
        return HTTPReward(given.url, http or RewardEndpointConfig())
    if given.function in READY:
        return RewardFunction(ready_reward(given.function, given.arguments), given.function)
    if given.function:
        function = bound(import_function(given.function), given.arguments, given.function)
        return RewardFunction(function, given.function)
    return load_reward_model(
        given.path or "",
        device=device,
        dtype=dtype,
        budget=budget,
        renderer=renderer,
        base=base,
        trust=trust,
    )


def _default_name(reward: Reward) -> str:
    """The host's, the function's or the folder's name."""
    if isinstance(reward, HTTPReward):
        return reward.host
    if isinstance(reward, RewardFunction):
        return reward.name.rpartition(":")[2]
    return Path(reward.model.config.name_or_path or "").name or "reward_model"
