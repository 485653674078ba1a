"""Rollouts made by hand, an engine whose policy has left its reference, and what models say of a
response, in float64 (but for norms and softmaxes inside the models, for which the library insists
on float32).

Every response is read alone, without padding, from the models' own logits: none of the engine's
ops, masks or batches has a part in what a test expects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ppo_engine.models.budget import Budget
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.optimizer import Learner
from ppo_engine.models.reader import Reader
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.experience import Part, in_parts
from ppo_engine.rewards.weighted import RewardsLike
from ppo_engine.rollout.batch import Rollout
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.schedule import Request, Response
from ppo_engine.settings.schema import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RunConfig,
)

TOKENIZER = tiny_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
TEMPERATURE = 0.7
MAX_NEW_TOKENS = 12


class Row(NamedTuple):
    """A prompt and the turns of the response: the policy's, the environment's, the policy's …"""

    prompt: str
    turns: tuple[str, ...]
    finished: bool = True  # else the last turn is cut, without its EOS


# Two groups of three: responses of one turn and of several, finished and cut.
ROWS = (
    Row("Hi", ("five", "\nno\n", "ok, 4")),
    Row("Hi", ("a",)),
    Row("Hi", ("cut off he",), finished=False),
    Row("A longer prompt", ("yes, sir",)),
    Row("A longer prompt", ("so", "?", "be", "cause", "cut"), finished=False),
    Row("A longer prompt", ("",)),
)
SCORES = (1.0, -0.5, 2.5, 0.3, -2.0, 0.8)


def tokens_of(row: Row) -> tuple[list[int], list[bool]]:
    """The response's token ids, and which of them the policy wrote."""
    ids: list[int] = []
    own: list[bool] = []
    for index, text in enumerate(row.turns):
        is_own, is_last = index % 2 == 0, index == len(row.turns) - 1
        ends = is_own and (row.finished or not is_last)
        turn = [*TOKENIZER(text)["input_ids"], *[EOS] * ends]
        ids += turn
        own += [is_own] * len(turn)
    return ids, own


def rollout_of(rows: Sequence[Row] = ROWS, **more: Any) -> Rollout:
    """The batch of `rows`, each with its number in the column `row`."""
    prompts = [TOKENIZER(row.prompt)["input_ids"] for row in rows]
    responses, own = zip(*(tokens_of(row) for row in rows), strict=True)
    left, width = max(map(len, prompts)), max(map(len, responses))
    ids = torch.full((len(rows), width), PAD)
    mask, heard = torch.zeros(2, len(rows), width, dtype=torch.bool)
    prompt_ids = torch.full((len(rows), left), PAD)
    prompt_mask = torch.zeros(len(rows), left, dtype=torch.bool)
    for b in range(len(rows)):
        n = len(responses[b])
        ids[b, :n] = torch.tensor(responses[b])
        mask[b, :n] = torch.tensor(own[b])
        heard[b, :n] = ~mask[b, :n]
        prompt_ids[b, left - len(prompts[b]) :] = torch.tensor(prompts[b])
        prompt_mask[b, left - len(prompts[b]) :] = True
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids,
        mask=mask,
        finished=torch.tensor([row.finished for row in rows]),
        prompts=[row.prompt for row in rows],
        responses=["".join(row.turns) for row in rows],
        columns={"row": list(range(len(rows)))},
        environment_mask=heard,
        **more,
    )


Say = Callable[[LanguageModel, list[list[int]]], list[tuple[list[int], bool]]]


def script(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    """Let any policy write, behind rows of tokens, what `say` gives for it and them: tokens of
    each, and whether it is finished."""

    @contextmanager
    def session(self: Sampler, *_: Any, **__: Any) -> Iterator[Any]:
        def write(requests: Sequence[Request]) -> list[Response]:
            said = say(self.policy, [request.tokens for request in requests])
            return [
                Response(request, tokens, [-1.0] * len(tokens), finished, done=True)
                for request, (tokens, finished) in zip(requests, said, strict=True)
            ]

        yield write

    monkeypatch.setattr(Sampler, "session", session)


def sharp_model(seed: int = 0) -> Any:
    """The tiny model with matrices so large that its distributions are far from uniform."""
    model = tiny_model(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


class OwnLogits(LlamaForCausalLM):
    """A model whose logits no output layer gives, so that its own are used."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5 + torch.arange(output.logits.shape[-1]) / 100
        return output


def own_logits() -> OwnLogits:
    plain = sharp_model()
    model = OwnLogits(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def move(model: nn.Module, seed: int = 1, by: float = 0.1) -> None:
    """Change every weight that is trained, each matrix by a fraction of its own size."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.requires_grad:
                # An adapter's second matrix is 0 at first.
                parameter += by * noise * (parameter.std() if parameter.any() else 1.0)


def length(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward: the response's characters."""
    return [float(len(response)) for response in responses]


def moved_engine(
    score: RewardsLike = length,
    *,
    model: Any = None,
    ppo: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    critic: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    environment_function: Callable[..., Any] | None = None,
    seed: int = 0,
    **sections: Any,
) -> PPOEngine:
    """An engine for rollouts of `ROWS`, whose policy is not its reference and samples at 0.7."""
    of_optimizer = {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0.0}
    learning = OptimizerConfig(**{**of_optimizer, "max_grad_norm": 1e6, **(optimizer or {})})
    sizes = {"rollout_batch_size": 6, "mini_batch_size": 4, "micro_batch_size": 3}
    config = PPOConfig(
        policy=ModelConfig(optimizer=learning, **(policy or {})),
        critic=ModelConfig(optimizer=learning, **(critic or {})),
        generation=GenerationConfig(
            **{"max_new_tokens": MAX_NEW_TOKENS, "temperature": TEMPERATURE, **(generation or {})}
        ),
        ppo=PPOSettings(**{**sizes, **(ppo or {})}),
        run=RunConfig(dtype="float32", device="cpu", seed=seed),
        **sections,
    )
    engine = PPOEngine(
        model or sharp_model(),
        score,
        config=config,
        tokenizer=tiny_tokenizer(),
        environment=environment_function,
    )
    move(engine.policy.model)
    return engine


def double(model: nn.Module) -> Any:
    return copy.deepcopy(model).double()


def alone(rollout: Rollout, row: int) -> tuple[Tensor, Tensor]:
    """The prompt and response of one row without padding, and which tokens the policy wrote."""
    ids, real = rollout.sequences()
    own = torch.cat((torch.zeros_like(rollout.prompt_mask[row]), rollout.mask[row]))
    return ids[row][real[row]], own[real[row]]


def read(
    model: Any, rollout: Rollout, row: int, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the policy's tokens in one row, by a `double` model's logits."""
    text, own = alone(rollout, row)
    log_p = (model(input_ids=text[None]).logits[0, :-1] / temperature).log_softmax(-1)[own[1:]]
    logprobs = log_p.gather(1, text[1:][own[1:], None])[:, 0]
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def values_of(critic: Any, rollout: Rollout, row: int) -> Tensor:
    """A `double` critic's value before each of the policy's tokens in one row."""
    text, own = alone(rollout, row)
    return critic.score(critic.model(input_ids=text[None]).last_hidden_state)[0, :-1, 0][own[1:]]


@dataclass
class Step:
    """An optimizer's step, as it was about to be taken."""

    passes: list[list[int]]  # the rows of each
    learning_rate: float
    model: Any  # with the weights before the step, in float64
    gradients: list[Tensor]  # after clipping

    @property
    def rows(self) -> list[int]:
        return [row for rows in self.passes for row in rows]


def recorded_steps(learner: Learner, passes: list[list[int]]) -> list[Step]:
    """The steps that `learner` takes from now on; `passes` gathers the rows that went before."""
    steps: list[Step] = []

    def before(optimizer: torch.optim.Optimizer, given: tuple[Any, ...], _: Any) -> None:
        factor = given[-1]  # of clipping, in the step itself
        trained = [p for p in learner.model.parameters() if p.grad is not None]
        gradients = [p.grad * factor for p in trained]
        rate = optimizer.param_groups[0]["lr"]
        steps.append(Step(list(passes), rate, double(learner.model), gradients))
        passes.clear()

    learner.optimizer.register_step_pre_hook(before)
    return steps


class Steps(NamedTuple):
    policy: list[Step]
    critic: list[Step]


def record(engine: PPOEngine, monkeypatch: Any) -> Steps:
    """The steps that the engine's updates take from now on."""
    passes: tuple[list[list[int]], list[list[int]]] = ([], [])

    def spy(rollout: Rollout, numbers: Any, reader: Reader, budget: Budget, attempt: Any) -> Any:
        def seen(parts: list[Part]) -> Any:
            of_policy = reader is engine.policy.reader
            rows = [[rollout.columns["row"][number] for number in part.numbers] for part in parts]
            passes[not of_policy].extend(rows)
            return attempt(parts)

        return in_parts(rollout, numbers, reader, budget, seen)

    for module in ("actor", "critic"):
        monkeypatch.setattr(f"ppo_engine.ppo.{module}.in_parts", spy)
    of_critic = recorded_steps(engine.critic.learner, passes[1]) if engine.critic else []
    return Steps(recorded_steps(engine.actor.learner, passes[0]), of_critic)
