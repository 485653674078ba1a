"""One step of PPO or a relative, in the order of the textbook:

    rollout    = engine.generate(prompts)                     # 1 the policy writes responses
    scores     = engine.score(rollout)                        # 2 the reward scores them
    experience = engine.estimate_advantages(rollout, scores)  # 3 KL to the reference, values, GAE
    metrics    = engine.update(experience)                    # 4 policy, 5 critic

`PPOTrainer` calls these in a loop; call them from a loop of your own for anything else. Such a loop
keeps its models by `engine.save(folder)`, and itself by `save_checkpoint` and `load_checkpoint`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.errors import UserError, entry_point
from ppo_engine.memory import release_freed_memory
from ppo_engine.messages import nearest_path, shown
from ppo_engine.models import precision
from ppo_engine.models.determinism import compute_deterministically
from ppo_engine.models.finite import NotFiniteError, Skips, refuse_not_finite
from ppo_engine.models.optimizer import Learner
from ppo_engine.ppo.actor import Actor
from ppo_engine.ppo.estimators import (
    Evidence,
    check_groups,
    equal_groups,
    estimate,
    in_groups,
    rounding_of,
)
from ppo_engine.ppo.experience import Experience, importance_weights, objective_metrics
from ppo_engine.ppo.kl_control import KLController
from ppo_engine.ppo.offloading import check_offload, let_wait
from ppo_engine.ppo.old_logprobs import OldLogprobs
from ppo_engine.ppo.passes import Passes
from ppo_engine.ppo.roles import load_roles, optimizer_steps
from ppo_engine.ppo.saving import save_models
from ppo_engine.ppo.trunks import Role, Trunks
from ppo_engine.pretrained import loading
from ppo_engine.rewards.shaping import ScoreNormalizer, shape_scores
from ppo_engine.rewards.weighted import RewardsLike
from ppo_engine.rollout.batch import Rollout
from ppo_engine.rollout.environment import Environment, load_environment
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.run.checkpoint import random_states, restore_random_states
from ppo_engine.run.directory import replacing
from ppo_engine.run.state_file import STATE, load_state, save_state
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.schema import PPOConfig, resolved, settings_of
from ppo_engine.spans import span
from ppo_engine.text.prompt import Prompt

# What is kept from call to call (a decoder, weights that are packed, an experience) must not be of
# that mode, in which a loop of one's own may sample.
_NO_INFERENCE_MODE = torch.inference_mode(False)


class PPOEngine:
    """Policy, frozen reference, frozen reward and critic, with their optimizers.

    Args:
        policy: a causal language model: Hugging Face name, folder, or a loaded model (then with
            `tokenizer`). Empty: `config.policy.path`.
        reward: a reward model's name or folder, `"file.py:function"`, the URL of an endpoint, or
            a function `(prompts, responses, **columns) -> list[float]`, sync or async (see
            `rewards.function`); a list of these, or a mapping of names to these. `config.reward`
            has their weights, and names the rewards where None is given.
        config: every setting; a `PPOConfig`, or a dictionary of its keys. The learning rate decays
            over `config.steps` updates of `config.ppo.rollout_batch_size` responses each: set both
            to what your loop does, or the schedule to "constant".
        tokenizer: of a policy that is a loaded model.
        environment: answers the policy's turns; see `rollout.environment`. None:
            `config.environment`, by default single-turn responses.

    Raises:
        UserError: a model, reward or setting that cannot be used, before anything is trained.
    """

    @entry_point
    def __init__(
        self,
        policy: str | Path | PreTrainedModel = "",
        reward: RewardsLike | None = None,
        *,
        config: PPOConfig | Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        environment: Callable[..., Any] | Environment | None = None,
    ) -> None:
        self.config = config = resolved(settings_of(PPOConfig, config))
        check_settings(config)
        if config.run.deterministic:
            compute_deterministically()
        self.device = precision.choose_device(config.run.device)
        self.dtype = precision.choose_dtype(config.run.dtype, self.device)
        check_offload(config.run.offload, self.device)
        torch.manual_seed(config.run.seed)
        self.shuffle = torch.Generator().manual_seed(config.run.seed)

        given = loading.given_model(policy)
        roles = load_roles(given, reward, config, tokenizer, device=self.device, dtype=self.dtype)
        self.policy, self.reference = roles.policy, roles.reference
        self.rewards, self.critic, self.budget = roles.rewards, roles.critic, roles.budget
        self.sampler = Sampler(self.policy)
        self.environment = load_environment(config.environment, environment)
        trained: list[Role] = [self.policy, *([self.critic] if self.critic else [])]
        references: list[Role] = [self.reference] if self.reference else []
        self.trunks = Trunks(trained, [*references, *roles.scorers])
        self.actor = Actor(
            self.policy,
            config,
            self.budget,
            updates=(config.steps - config.ppo.critic_warmup_steps) * optimizer_steps(config),
        )
        self.passes = Passes(
            self.policy,
            self.reference,
            temperature=config.generation.temperature,
            budget=self.budget,
            trunks=self.trunks,
        )
        self.kl = KLController(config.ppo.kl_coef, config.ppo.adaptive_kl, self.device)
        self.normalizer = ScoreNormalizer() if config.reward.normalize else None
        self.old_logprobs = OldLogprobs(config, self.passes)
        frozen: dict[str, Sequence[Role]] = {"reference": references, "reward": self.rewards.models}
        let_wait(config.run.offload, frozen, trained, self.device)
        self.steps_done = 0
        self._warned = False  # that nothing more is learned
        self.skips = Skips(config.run.on_bad_numbers)
        release_freed_memory()  # of weights that were loaded in fp32

    @entry_point
    @_NO_INFERENCE_MODE
    @span("generate")
    def generate(
        self,
        prompts: Sequence[Prompt],
        columns: dict[str, list[Any]] | None = None,
        *,
        group_size: int | None = None,
    ) -> Rollout:
        """Sample responses to each prompt: text, or chat messages.

        `group_size` of them in a row, by default that of the configuration. `columns` holds lists
        as long as `prompts`, passed to a reward function and an environment.
        """
        config = self.config
        size = config.ppo.group_size if group_size is None else group_size
        self.trunks.clear()
        rollout = generate(
            self.sampler,
            prompts,
            config.generation,
            columns,
            group_size=size,
            environment=self.environment,
        )
        if not config.ppo.needs_greedy:
            return rollout
        greedy = generate(
            self.sampler,
            prompts,
            config.generation,
            columns,
            environment=self.environment,
            greedy=True,
        )
        return replace(rollout, greedy=greedy)

    def check_columns(self, columns: Collection[str]) -> None:
        """A UserError where a reward function or the environment cannot be called on prompts with
        these `columns`; a loop of your own finds out at the first batch."""
        self.rewards.check_columns(columns, several_turns=self.environment is not None)
        if self.environment is not None:
            self.environment.check_columns(columns)

    def score(self, rollout: Rollout) -> Tensor:
        """The weighted sum of `score_each`, [B] fp32; neither normalized nor penalized."""
        return self.rewards.total(self.score_each(rollout))

    @entry_point
    @_NO_INFERENCE_MODE
    @span("score")
    def score_each(self, rollout: Rollout) -> dict[str, Tensor]:
        """Each reward's scores of the responses, before weights: [B] fp32 by the reward's name."""
        with self.trunks.of(rollout):
            return self.rewards.score_each(rollout)

    @entry_point
    @_NO_INFERENCE_MODE
    @span("advantages")
    def estimate_advantages(
        self,
        rollout: Rollout,
        scores: Tensor | Sequence[float],
        rounding: Tensor | None = None,
    ) -> Experience:
        """KL to the reference, values, and advantages; `scores` are B numbers.

        `rounding` [B] is by how much rounding alone may change each of them: of several rewards,
        or a model's in bf16, `rewards.rounding(score_each(rollout))`. Without it, they are taken
        for numbers computed in fp32.

        Raises ValueError unless there is one score for each response, in complete groups; and
        NotFiniteError, which changes nothing, where scores, or what comes of them, is not finite.
        """
        scores = torch.as_tensor(scores, dtype=torch.float32, device=self.device)
        if scores.shape != (len(rollout),):
            raise ValueError(
                f"scores must be {len(rollout)} numbers, one for each response, but are "
                f"{tuple(scores.shape)}: {scores.flatten()[:8].tolist()}"
            )
        with self._unchanged_by_bad_numbers(rollout):
            return self._estimate(rollout, scores, rounding)

    def _estimate(self, rollout: Rollout, scores: Tensor, rounding: Tensor | None) -> Experience:
        given = scores
        if self.config.ppo.compares_groups:
            check_groups(rollout.prompts, self.config.ppo)
        rounding = rounding_of(scores, rounding)
        scores = self.shaped_scores(rollout, scores, learn=True)
        if self.normalizer is not None:
            rounding = rounding / self.normalizer.scale
        greedy_scores = self._greedy_scores(rollout)

        settings = self.config.ppo
        logprobs, ref_logprobs, entropy, deferred = self.old_logprobs.measure(rollout)
        values = self.values(rollout) if self.critic else None
        with span("gae"):
            shaped = estimate(
                Evidence(
                    scores,
                    logprobs,
                    logprobs if ref_logprobs is None else ref_logprobs,
                    rollout.mask,
                    kl_coef=self.kl.coef,
                    rounding=rounding,
                    values=values,
                    greedy_scores=greedy_scores,
                ),
                settings,
            )
        refuse_not_finite(
            {
                "the rewards' scores are": given,
                "the shaped scores are": scores,
                "the policy's log-probs are": logprobs,
                "the reference's log-probs are": ref_logprobs,
                "the policy's entropies are": entropy,
                "the critic's values are": values,
                "the advantages are": shaped.advantages,
                "the returns are": None if values is None else shaped.returns,
                # By which they are whitened: of all responses together.
                "the advantages' squares are": shaped.moments[2].expand(len(rollout))
                if settings.whiten_advantages
                else None,
            }
        )
        kl_coef = self.kl.coef.clone()
        # Until then the KL is 0, whatever its coefficient.
        if ref_logprobs is not None and not self._warms_up:
            self.kl.update((logprobs - ref_logprobs).sum(1).mean(), len(rollout))
        return Experience(
            rollout=rollout,
            scores=scores,
            advantages=shaped.advantages,
            kl=shaped.kl,
            kl_coef=kl_coef,
            moments=shaped.moments,
            policy_version=self.actor.version,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            entropy=entropy,
            rounding=rounding,
            values=values,
            returns=None if values is None else shaped.returns,
            is_weights=importance_weights(rollout, logprobs, settings.importance_cap),
            sampled=entropy is None and not deferred,
            deferred=deferred,
        )

    @contextmanager
    def _unchanged_by_bad_numbers(self, rollout: Rollout) -> Iterator[None]:
        """Where the block raises a NotFiniteError, what it learned of bad numbers is forgotten."""
        are_samplers = self.old_logprobs.are_samplers
        statistics = self.normalizer.state_dict() if self.normalizer else None
        try:
            yield
        except NotFiniteError as error:
            self.old_logprobs.are_samplers = are_samplers
            if self.normalizer is not None and statistics is not None:
                self.normalizer.load_state_dict(statistics)
            raise self._named(error, rollout) from None

    def _named(self, error: NotFiniteError, rollout: Rollout) -> NotFiniteError:
        """With the step and the responses; a UserError where an update before it is the cause."""
        step = self.steps_done + 1
        for learner in self.learners:
            learner.refuse_bad_weights(step)
        return error.at(
            step,
            lambda n: f"response {n + 1} of {len(rollout)}, to {shown(rollout.prompts[n])}",
        )

    def shaped_scores(self, rollout: Rollout, scores: Tensor, *, learn: bool = False) -> Tensor:
        """What training makes of `scores` [B]: normalized and penalized, see `rewards.shaping`.

        With `learn`, the normalization updates its statistics with them.
        """
        return shape_scores(scores, rollout, self.config.reward, self.normalizer, learn=learn)

    def compare_with_reference(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of policy and reference, and the policy's entropies: each [B, T] fp32, 0 at
        padding. Their difference, summed over a response, estimates the KL divergence."""
        logprobs, ref_logprobs, entropy = self.passes.of_both(rollout)
        return logprobs, ref_logprobs, entropy

    def values(self, rollout: Rollout) -> Tensor:
        """The critic's value before each of the policy's tokens, [B, T] fp32; 0 elsewhere."""
        if self.critic is None:
            raise ValueError(f"ppo.estimator={self.config.ppo.estimator} has no critic.")
        return self.passes.of_critic(self.critic, rollout)

    @entry_point
    @_NO_INFERENCE_MODE
    @span("update")
    def update(self, experience: Experience) -> dict[str, float]:
        """Train policy and critic on `experience`; returns the step's metrics. Warns, once, where
        their schedules are over.

        Raises ValueError for an experience whose log-probs its one optimizer step was to measure
        (`Experience.deferred`), where the policy has moved since."""
        settings = self.config.ppo
        over = [learner.name for learner in self.learners if learner.learning_rate == 0]
        if over and not self._warned:
            self._warned = True
            warnings.warn(
                f"The learning rate of {' and '.join(over)} has fallen to 0, and nothing more is "
                f"learned: it is planned for config.steps={self.config.steps} updates of "
                f"ppo.rollout_batch_size={settings.rollout_batch_size} responses. Set both to what "
                'your loop does, or optimizer.schedule to "constant".',
                stacklevel=5,  # the caller of `entry_point`, which calls two more, which call this
            )
        metrics = {"policy/learning_rate": self.actor.learner.learning_rate}
        # Some rows of a rollout (`Experience.select`) may be learned from without their groups.
        prompts = experience.rollout.prompts
        if settings.compares_groups and in_groups(prompts, settings.group_size):
            metrics["objective/equal_groups"] = equal_groups(
                experience.scores, settings, experience.rounding
            )
        kl_coef = float(experience.kl_coef)  # once: it synchronizes with the GPU
        records: dict[str, list[Tensor]] = defaultdict(list)
        tokens = experience.rollout.mask.sum(1).tolist()
        entropies: list[tuple[Tensor, int]] = []  # of the first epoch, with its tokens
        named = partial(self._named, rollout=experience.rollout)
        with self.trunks.of(experience.rollout):
            for epoch in range(settings.epochs):
                order = torch.randperm(len(experience), generator=self.shuffle)
                for rows in order.split(settings.mini_batch_size):
                    numbers = rows.tolist()
                    found: dict[str, Tensor] = {}
                    if not self._warms_up:
                        with self.skips.left_out(named):
                            found |= self.actor.update(experience, numbers, kl_coef)
                    if self.critic is not None:
                        with self.skips.left_out(named):
                            found |= self.critic.update(experience, numbers, settings, self.budget)
                    entropy = found.pop("policy/entropy", None)
                    if entropy is not None and epoch == 0:
                        entropies.append((entropy, sum(tokens[number] for number in numbers)))
                    for name, value in found.items():
                        records[name].append(value)
        self.trunks.clear()
        self.steps_done += 1
        for learner in self.learners:
            learner.refuse_bad_weights(self.steps_done)
        # Here, as the update may have measured the log-probs.
        metrics = objective_metrics(experience, settings.importance_cap) | metrics
        metrics |= self.skips.end_step()
        if entropies and "objective/entropy" not in metrics:  # nothing else has measured it
            sums = torch.stack([entropy * count for entropy, count in entropies])
            metrics["objective/entropy"] = float(sums.sum()) / sum(count for _, count in entropies)
        for name, values in records.items():
            over_steps = torch.stack(values)
            metrics[name] = float(over_steps.max() if name.endswith("max") else over_steps.mean())
        return metrics

    def leave_out_step(self) -> dict[str, float]:
        """Count a step without an update, as `estimate_advantages` refused it; its metrics."""
        self.steps_done += 1
        return self.skips.end_step()

    def take_notes(self) -> list[str]:
        """What is to be said since the last call: of updates that were left out, and of memory that
        ran out."""
        # A reward model that was given as an object has a budget of its own.
        budgets = [self.budget, *(model.budget for model in self.rewards.models)]
        smaller = [self.sampler.take_note(), *(budget.take_note() for budget in budgets)]
        return [*self.skips.take_notes(), *filter(None, smaller)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, for `load_state_dict` with the same settings.

        Weights and what optimizers keep are their own tensors; all else is copied.
        """
        return {
            "policy": self.actor.learner.state_dict(),
            "critic": self.critic.learner.state_dict() if self.critic else None,
            "steps_done": self.steps_done,
            "policy_version": self.actor.version,
            "takes_samplers": self.old_logprobs.are_samplers,
            "kl_coef": self.kl.coef.clone(),
            "normalizer": self.normalizer.state_dict() if self.normalizer else None,
            "shuffle": self.shuffle.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state; a `UserError` where it is of other settings."""
        for part, ours in (("critic", self.critic), ("normalizer", self.normalizer)):
            if (state[part] is None) != (ours is None):
                raise UserError(
                    f"The checkpoint has {'no' if state[part] is None else 'a'} {part}, and this "
                    f"engine has {'none' if ours is None else 'one'}: make the engine with the "
                    "settings of the checkpoint (ppo.estimator, reward.normalize)."
                )
        self.actor.learner.load_state_dict(state["policy"])
        if self.critic is not None:
            self.critic.learner.load_state_dict(state["critic"])
        self.steps_done = state["steps_done"]
        self.actor.version = state["policy_version"]
        self.old_logprobs.are_samplers = state["takes_samplers"]
        self.kl.coef.copy_(state["kl_coef"])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
        self.shuffle.set_state(state["shuffle"].cpu())

    @entry_point
    def save(self, folder: str | Path) -> None:
        """Write the policy into `folder`/policy and the critic, if there is one, into critic, in
        Hugging Face format (adapters merged unless `config.run.save_adapters` says otherwise, in
        `config.run.save_dtype`) with the tokenizer and the generation config. Each replaces the
        model that was there, whole or not at all; where anything else is in its place, a
        `UserError` comes before both."""
        save_models(folder, self.policy, self.critic, self.config)

    @entry_point
    def save_checkpoint(self, folder: str | Path) -> None:
        """Write what a loop of your own resumes from into `folder`, whole or not at all: trained
        weights, optimizers, and the states of all generators of random numbers."""
        with replacing(folder, STATE, "checkpoint") as inside:
            save_state(inside, {"engine": self.state_dict(), "random": random_states()})

    @entry_point
    def load_checkpoint(self, folder: str | Path) -> None:
        """Go on from such a checkpoint, or one of a trainer's run, with the settings it was made
        with: on a CPU to the same bits. Where in the data the loop was, it keeps itself."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"There is no checkpoint {str(folder)!r}.{nearest_path(folder)}")
        state = load_state(folder, self.device)
        if "engine" not in state:
            raise UserError(f"{folder} is a checkpoint of `sft` or `reward`, not of a PPO run.")
        self.load_state_dict(state["engine"])
        restore_random_states(state["random"])

    @property
    def learners(self) -> list[Learner]:
        """Those of the policy, and of the critic where there is one."""
        return [self.actor.learner, *([self.critic.learner] if self.critic else [])]

    @property
    def _warms_up(self) -> bool:
        return self.steps_done < self.config.ppo.critic_warmup_steps

    def _greedy_scores(self, rollout: Rollout) -> Tensor | None:
        """The score of the greedy response to each response's prompt, [B]."""
        if not self.config.ppo.needs_greedy:
            return None
        if rollout.greedy is None:
            raise ValueError("ReMax needs Rollout.greedy, which PPOEngine.generate makes.")
        with self.trunks.of(rollout):  # of the same step
            scores = self.rewards.total(self.rewards.score_each(rollout.greedy))
        # On the scale of the sampled responses' scores.
        scores = self.shaped_scores(rollout.greedy, scores)
        return scores.repeat_interleave(len(rollout) // len(rollout.greedy))
