"""The step of PPO: the engine, estimators, critic, KL coefficient, and what its settings say."""

from __future__ import annotations

from faults.bug import Bug, InFile

_ENGINE = [
    # Advantages.
    Bug(
        "the KL penalty in the reward though kl_in=loss",
        'in_reward = settings.kl_in == "reward"',
        "in_reward = True",
    ),
    Bug(
        "no KL penalty in the reward",
        'in_reward = settings.kl_in == "reward"',
        "in_reward = False",
    ),
    Bug(
        "adaptive KL fed with the wrong sign",
        "self.kl.update((logprobs - ref_logprobs).sum(1).mean()",
        "self.kl.update((ref_logprobs - logprobs).sum(1).mean()",
    ),
    Bug(
        "adaptive KL fed with the mean of a token",
        "self.kl.update((logprobs - ref_logprobs).sum(1).mean()",
        "self.kl.update((logprobs - ref_logprobs)[rollout.mask].mean()",
    ),
    Bug(
        "adaptive KL fed with the estimate of the penalty",
        "self.kl.update((logprobs - ref_logprobs).sum(1).mean()",
        "self.kl.update(shaped.kl.mean()",
    ),
    Bug(
        "adaptive KL counts steps, not responses",
        ".sum(1).mean(), len(rollout))",
        ".sum(1).mean(), 1)",
    ),
    Bug(
        "adaptive KL follows while the critic warms up",
        "        if not self._warms_up:  # until",
        "        if True:  # until",
    ),
    Bug(
        "the experience has the KL coefficient of the next step",
        "kl_coef = self.kl.coef.clone()",
        "kl_coef = self.kl.coef",
    ),
    Bug(
        "the advantages ignore the penalties of unfinished and long responses",
        "scores = self.shaped_scores(rollout, scores, learn=True)",
        "self.shaped_scores(rollout, scores, learn=True)",
    ),
    Bug(
        "the normalization learns nothing",
        "scores = self.shaped_scores(rollout, scores, learn=True)",
        "scores = self.shaped_scores(rollout, scores)",
    ),
    Bug(
        "scores are normalized though reward.normalize is off",
        "ScoreNormalizer() if config.reward.normalize else None",
        "ScoreNormalizer()",
    ),
    Bug(
        "the normalization also learns from greedy and held-out responses",
        "self.config.reward, self.normalizer, learn=learn)",
        "self.config.reward, self.normalizer)",
        "test_evaluation test_estimators test_engine",
    ),
    Bug(
        "scores that are not finite are taken",
        "if scores.shape != (len(rollout),) or not scores.isfinite().all():",
        "if scores.shape != (len(rollout),):",
    ),
    Bug(
        "groups are not checked",
        "if self.config.ppo.compares_groups:\n            check_groups",
        "if False:\n            check_groups",
    ),
    Bug(
        "the values are zero",
        "values = self.values(rollout) if self.critic else None",
        "values = torch.zeros_like(logprobs) if self.critic else None",
    ),
    Bug(
        "the critic learns advantages in place of returns",
        "None if values is None else shaped.returns",
        "None if values is None else shaped.advantages",
    ),
    Bug(
        "no importance weights",
        "is_weights=importance_weights(rollout, logprobs, settings.importance_cap)",
        "is_weights=None",
    ),
    Bug(
        "importance weights without the cap",
        "importance_weights(rollout, logprobs, settings.importance_cap)",
        "importance_weights(rollout, logprobs, settings.importance_cap and 1e9)",
    ),
    Bug(
        "the greedy scores are not shaped",
        "scores = self.shaped_scores(rollout.greedy, self.score(rollout.greedy))",
        "scores = self.score(rollout.greedy)",
    ),
    Bug(
        "the greedy scores of another prompt",
        "scores.repeat_interleave(len(rollout) // len(rollout.greedy))",
        "scores.repeat(len(rollout) // len(rollout.greedy))",
    ),
    # Log-probs.
    Bug(
        "the temperature is missing in all measured log-probs",
        "temperature = self.config.generation.temperature\n        unadapted",
        "temperature = 1.0\n        unadapted",
    ),
    Bug(
        "the temperature is missing in the reference's log-probs",
        "reference.response_logprobs(rollout, temperature)",
        "reference.response_logprobs(rollout, 1.0)",
    ),
    Bug(
        "the reference's log-probs are the policy's",
        "found = policy.stacked_logprobs([states, ref_states], rollout, temperature)",
        "found = policy.stacked_logprobs([states, states], rollout, temperature)",
    ),
    Bug(
        "the reference's log-probs are the policy's, under another head",
        "ref_logprobs, _ = reference.response_logprobs(rollout, temperature)",
        "ref_logprobs, _ = policy.response_logprobs(rollout, temperature)",
    ),
    Bug(
        "the reference is the policy with its adapter",
        "unadapted = nullcontext() if self.reference else policy.without_adapter()",
        "unadapted = nullcontext()",
    ),
    Bug(
        "the entropy is the reference's",
        "(logprobs, entropy), (ref_logprobs, _) = found",
        "(logprobs, _), (ref_logprobs, entropy) = found",
    ),
    Bug(
        "micro-batches of measurements lose rows",
        "rows = torch.arange(len(rollout)).split(self.config.ppo.micro_batch_size)",
        "rows = torch.arange(len(rollout)).split(self.config.ppo.micro_batch_size)[:1]",
    ),
    Bug(
        "measurements of a narrow micro-batch are padded on the left",
        "torch.cat([pad(x, (0, width - x.shape[1])) for x in column])",
        "torch.cat([pad(x, (width - x.shape[1], 0)) for x in column])",
    ),
    # Generation.
    Bug(
        "columns are tiled where prompts are repeated",
        "{name: _each(column, size) for name, column in columns.items()}",
        "{name: column * size for name, column in columns.items()}",
    ),
    Bug(
        "columns do not reach the rewards",
        "columns = columns or {}\n        rollout",
        "columns = {}\n        rollout",
    ),
    Bug(
        "prompts are tiled, not repeated in a row",
        "return [item for item in items for _ in range(times)]",
        "return [item for _ in range(times) for item in items]",
    ),
    Bug(
        "group_size is ignored",
        "size = config.ppo.group_size if group_size is None else group_size",
        "size = config.ppo.group_size",
    ),
    Bug(
        "the sampler's log-probs are not recorded",
        "record_logprobs=config.ppo.importance_cap is not None",
        "record_logprobs=False",
    ),
    Bug(
        "the greedy responses are sampled",
        "environment=self.environment, greedy=True",
        "environment=self.environment, greedy=False",
    ),
    Bug(
        "generation without the environment",
        "            environment=self.environment,\n            record_logprobs",
        "            record_logprobs",
        "test_conversation",
    ),
    # The update.
    Bug(
        "one epoch, whatever ppo.epochs says",
        "for _ in range(settings.epochs):",
        "for _ in range(1):",
    ),
    Bug(
        "mini-batches are not shuffled",
        "order = torch.randperm(len(experience), generator=self.shuffle)",
        "order = torch.arange(len(experience))",
    ),
    Bug(
        "all epochs share one permutation",
        "order = torch.randperm(len(experience), generator=self.shuffle)",
        "order = torch.randperm(len(experience), generator=torch.Generator().manual_seed(7))",
    ),
    Bug(
        "the order comes from the global generator",
        "order = torch.randperm(len(experience), generator=self.shuffle)",
        "order = torch.randperm(len(experience))",
    ),
    Bug(
        "every seed has the same order",
        "self.shuffle = torch.Generator().manual_seed(config.run.seed)",
        "self.shuffle = torch.Generator().manual_seed(0)",
    ),
    Bug(
        "one mini-batch of everything",
        "in order.split(settings.mini_batch_size):",
        "in order.split(len(experience)):",
    ),
    Bug(
        "micro-batches are optimizer steps",
        "in order.split(settings.mini_batch_size):",
        "in order.split(settings.micro_batch_size):",
    ),
    Bug(
        "the tokens of a mini-batch are those of the whole",
        "tokens = experience.rollout.mask[rows].sum()",
        "tokens = experience.rollout.mask.sum()",
    ),
    Bug(
        "the tokens of a mini-batch count the environment's",
        "tokens = experience.rollout.mask[rows].sum()",
        "tokens = experience.rollout.response_mask[rows].sum()",
    ),
    Bug(
        "the policy moves while the critic warms up",
        "found = {} if self._warms_up else self._update_policy",
        "found = self._update_policy",
    ),
    Bug(
        "the warm-up is a step too long",
        "return self.steps_done < self.config.ppo.critic_warmup_steps",
        "return self.steps_done <= self.config.ppo.critic_warmup_steps > 0",
    ),
    Bug(
        "the critic is not trained",
        "if self.critic is not None:\n                    found |= self.critic.update",
        "if False:\n                    found |= self.critic.update",
    ),
    Bug(
        "the policy's learning rate is that after the step",
        'metrics["policy/learning_rate"] = self.learner.learning_rate\n',
        'metrics["policy/learning_rate"] = self.learner.scheduler.base_lrs[0]\n',
    ),
    Bug(
        "the largest ratio is a mean over mini-batches",
        'float(over_steps.max() if name.endswith("max") else over_steps.mean())',
        "float(over_steps.mean())",
    ),
    Bug(
        "metrics are those of the last mini-batch",
        'float(over_steps.max() if name.endswith("max") else over_steps.mean())',
        'float(over_steps.max() if name.endswith("max") else over_steps[-1])',
    ),
    Bug(
        "the schedule knows nothing of ppo.epochs",
        "per_step = config.ppo.epochs * math.ceil(",
        "per_step = math.ceil(",
    ),
    Bug(
        "the schedule knows nothing of mini-batches",
        "config.ppo.rollout_batch_size / config.ppo.mini_batch_size",
        "config.ppo.rollout_batch_size / config.ppo.rollout_batch_size",
    ),
    Bug(
        "the schedule counts half mini-batches as none",
        "config.ppo.epochs * math.ceil(",
        "config.ppo.epochs * math.floor(",
    ),
    Bug(
        "the policy's schedule knows nothing of the critic's warm-up",
        "(config.steps - config.ppo.critic_warmup_steps) * per_step",
        "config.steps * per_step",
    ),
    Bug(
        "the critic's schedule ends with the warm-up left out",
        "updates=config.steps * per_step",
        "updates=(config.steps - config.ppo.critic_warmup_steps) * per_step",
    ),
    Bug(
        "the policy is trained with the critic's optimizer settings",
        "config.policy.optimizer,\n",
        "config.critic.optimizer,\n",
    ),
    Bug(
        "always on policy",
        "on_policy = self.policy_version == part.policy_version",
        "on_policy = True",
    ),
    Bug(
        "never on policy",
        "on_policy = self.policy_version == part.policy_version",
        "on_policy = False",
    ),
    Bug(
        "the temperature is missing in the policy's loss",
        "                    self.config.generation.temperature,\n",
        "                    1.0,\n",
    ),
    Bug(
        "the objective is always the clipped one",
        "objective=settings.objective,",
        'objective="clip",',
    ),
    Bug(
        "ratios are always those of tokens",
        "ratio_level=settings.ratio_level,",
        'ratio_level="token",',
    ),
    Bug("the clip range is 0.2", "clip_range=settings.clip_range,", "clip_range=0.2,"),
    Bug("no dual clip", "dual_clip=settings.dual_clip,", "dual_clip=None,"),
    Bug(
        "no whitening",
        "moments=part.moments if settings.whiten_advantages else None",
        "moments=None",
    ),
    Bug(
        "whitening whatever the settings say",
        "moments=part.moments if settings.whiten_advantages else None",
        "moments=part.moments",
    ),
    Bug(
        "the reduction is the mean over tokens",
        "reduction=settings.reduction,",
        'reduction="token_mean",',
    ),
    Bug(
        "a micro-batch has its own normalizer",
        "normalizer=normalizer,\n                    entropy_coef",
        "entropy_coef",
    ),
    Bug(
        "no entropy bonus",
        "entropy_coef=settings.entropy_coef,",
        "entropy_coef=0.0,",
    ),
    Bug(
        "the KL penalty in the loss though kl_in=reward",
        'penalized = settings.kl_in == "loss"',
        "penalized = True",
    ),
    Bug(
        "no KL penalty in the loss",
        'penalized = settings.kl_in == "loss"',
        "penalized = False",
    ),
    Bug(
        "the KL penalty in the loss is against the old policy",
        "ref_logprobs=part.ref_logprobs if penalized else None",
        "ref_logprobs=part.logprobs if penalized else None",
    ),
    Bug(
        "the KL penalty in the loss keeps the configured coefficient",
        "kl_coef=kl_coef if penalized else 0.0",
        "kl_coef=settings.kl_coef if penalized else 0.0",
    ),
    Bug(
        "the KL penalty in the loss is k3 whatever is set",
        "kl_estimator=settings.kl_estimator,",
        'kl_estimator="k3",',
    ),
    Bug(
        "importance weights do not reach the loss",
        "is_weights=part.is_weights,",
        "is_weights=None,",
    ),
    Bug(
        "metrics weigh micro-batches alike",
        "share = part.rollout.mask.sum() / tokens\n            found[\"policy/loss\"]",
        "share = 1 / len(parts)\n            found[\"policy/loss\"]",
    ),
    Bug(
        "the largest ratio is that of the last micro-batch",
        'torch.maximum(found["policy/ratio_max"], stats.ratio_max)',
        "stats.ratio_max",
    ),
    Bug(
        "the optimizer steps at each micro-batch",
        'share = part.rollout.mask.sum() / tokens\n            found["policy/loss"]',
        'self.learner.step()\n            share = part.rollout.mask.sum() / tokens\n'
        '            found["policy/loss"]',
    ),
    Bug(
        "the policy's version stands still",
        "        self.policy_version += 1\n",
        "",
    ),
    Bug(
        "Dr. GRPO's sum is divided by its tokens",
        "return float(responses * self.config.generation.max_new_tokens)",
        "return tokens",
    ),
    Bug(
        "Dr. GRPO's constant without the responses",
        "return float(responses * self.config.generation.max_new_tokens)",
        "return float(self.config.generation.max_new_tokens)",
    ),
    Bug(
        "sequence_mean is divided by tokens",
        "return float(responses)\n",
        "return tokens\n",
    ),
    # State.
    Bug(
        "the KL coefficient is not restored",
        'self.kl.coef.copy_(state["kl_coef"])',
        "pass",
        "test_engine test_evaluation test_ppo_trainer",
    ),
    Bug(
        "the critic is not restored",
        'self.critic.learner.load_state_dict(state["critic"])',
        "pass",
        "test_engine test_ppo_trainer",
    ),
    Bug(
        "the policy is not restored",
        'self.learner.load_state_dict(state["policy"])',
        "pass",
        "test_engine test_ppo_trainer",
    ),
    Bug(
        "the normalization is not restored",
        'self.normalizer.load_state_dict(state["normalizer"])',
        "pass",
        "test_ppo_trainer",
    ),
    Bug(
        "the order of mini-batches is not restored",
        'self.shuffle.set_state(state["shuffle"].cpu())',
        "pass",
        "test_engine test_ppo_trainer",
    ),
    Bug(
        "the warm-up begins anew after a resume",
        'self.steps_done = state["steps_done"]',
        "self.steps_done = 0",
        "test_ppo_trainer",
    ),
    Bug(
        "the critic starts from the policy though a reward model is there",
        "next(iter(self.rewards.by_tokens.values()), None)",
        "None",
        "test_rewards",
    ),
]

_ESTIMATORS = [
    Bug("GAE ignores lambda", "evidence.scores, settings.lam)", "evidence.scores, 0.95)"),
    Bug(
        "Monte Carlo is a temporal difference",
        '(the same, eq. 18: lambda = 1)."""\n'
        "    return _of_tokens(evidence, settings, evidence.scores, 1.0)",
        '(the same, eq. 18: lambda = 1)."""\n'
        "    return _of_tokens(evidence, settings, evidence.scores, 0.0)",
    ),
    Bug(
        "ReMax without its baseline",
        "evidence.scores - evidence.greedy_scores",
        "evidence.scores",
    ),
    Bug("GRPO by the biased deviation", "rewards.std(1, keepdim=True)",
        "rewards.std(1, keepdim=True, unbiased=False)"),
    Bug(
        "GRPO does not divide by the deviation",
        "(rewards - rewards.mean(1, keepdim=True)) / (deviation + _STD_EPS)",
        "(rewards - rewards.mean(1, keepdim=True))",
    ),
    Bug(
        "Dr. GRPO less the mean of the batch",
        "rewards - rewards.mean(1, keepdim=True))\n\n\ndef rloo",
        "rewards - rewards.mean())\n\n\ndef rloo",
    ),
    Bug(
        "RLOO divides by all of the group",
        "(settings.group_size - 1)",
        "settings.group_size",
    ),
    Bug(
        "RLOO's baseline holds the response itself",
        "others = (rewards.sum(1, keepdim=True) - rewards)",
        "others = rewards.sum(1, keepdim=True)",
    ),
    Bug(
        "the rewards of groups have no KL penalty",
        "rewards = rewards - evidence.kl_coef * kl.double()",
        "pass",
    ),
    Bug(
        "the rewards of groups have the KL penalty though kl_in=loss",
        'if settings.kl_in == "reward":\n        none',
        "if True:\n        none",
        excuse="Changes nothing: the engine's coefficient is 0 where kl_in=loss.",
    ),
    Bug(
        "groups are columns",
        "return rewards.view(-1, settings.group_size)",
        "return rewards.view(settings.group_size, -1).T",
    ),
    Bug(
        "the advantages of sequences are penalized again",
        "scores, none, torch.zeros_like(evidence.kl_coef), 1.0, 1.0)",
        "scores, none, evidence.kl_coef, 1.0, 1.0)",
    ),
    Bug(
        "rewards are not whitened",
        "if not settings.whiten_rewards:",
        "if True:",
        "test_estimators test_engine",
    ),
    Bug(
        "whitened rewards are divided by the variance",
        "rewards.returns * torch.rsqrt(m2 / count + 1e-8)",
        "rewards.returns / (m2 / count + 1e-8)",
        "test_estimators test_engine",
    ),
    Bug(
        "whitened rewards are shifted",
        "scaled = rewards.returns * torch",
        "scaled = (rewards.returns - rewards.moments[1]) * torch",
        "test_estimators test_engine",
    ),
    Bug(
        "no discount where rewards are whitened",
        "gae(scaled, values, gamma=settings.gamma, lam=lam",
        "gae(scaled, values, gamma=1.0, lam=lam",
        "test_estimators test_engine",
    ),
    Bug(
        "moments of whitened rewards are of the rewards",
        "moments = torch.stack((count, mean, (real - mean).square().sum()))",
        "moments = rewards.moments",
        "test_estimators test_engine",
    ),
    Bug("gamma is ignored", "evidence.kl_coef, settings.gamma, lam)", "evidence.kl_coef, 1.0, lam)"),
    Bug(
        "the KL estimator of the reward is k1 whatever is set",
        "kl_estimator=settings.kl_estimator,",
        'kl_estimator="k1",',
    ),
    Bug(
        "the KL of the reward is that of the reference to the policy",
        "        evidence.logprobs,\n        evidence.ref_logprobs,",
        "        evidence.ref_logprobs,\n        evidence.logprobs,",
    ),
    Bug("advantages of padding too", "mask=evidence.mask,\n    )", "mask=None,\n    )"),
    Bug(
        "groups of different prompts are taken",
        "whole = len(prompts) % size == 0 and all(",
        "whole = len(prompts) % size == 0 or all(",
    ),
    Bug(
        "equal groups are those with any two equal scores",
        "(groups == groups[:, :1]).all(1)",
        "(groups == groups[:, :1])[:, 1:].any(1)",
    ),
    Bug("REINFORCE++ is called PPO", '"reinforce_pp": "REINFORCE++"', '"reinforce_pp": "PPO"',
        excuse="A title that is shown, and used for nothing."),
]  # fmt: skip

_CRITIC = [
    Bug("no value clipping", "clip_range=settings.value_clip_range,", "clip_range=None,"),
    Bug(
        "values are clipped around the returns",
        "                    part.values,\n                    part.returns,",
        "                    part.returns,\n                    part.returns,",
    ),
    Bug(
        "the critic learns its own old values",
        "                    part.values,\n                    part.returns,",
        "                    part.values,\n                    part.values,",
    ),
    Bug("the value loss counts padding", "mask=part.rollout.mask,", "mask=None,"),
    Bug(
        "the value loss counts the environment's tokens",
        "mask=part.rollout.mask,",
        "mask=part.rollout.response_mask,",
        "test_conversation test_engine",
    ),
    Bug(
        "each micro-batch of the critic has its own mean",
        "                    normalizer=tokens,\n",
        "",
    ),
    Bug(
        "a value has seen the token that it is before",
        "start = rollout.prompt_ids.shape[1] - 1\n",
        "start = rollout.prompt_ids.shape[1] - 1 + 1\n        mask = mask.clone()\n"
        "        ids = torch.cat((ids, ids[:, -1:]), 1)\n"
        "        mask = torch.cat((mask, mask[:, -1:]), 1)\n",
    ),
    Bug(
        "the critic reads padding",
        "self.model, ids[:, :-1], mask[:, :-1], start)",
        "self.model, ids[:, :-1], torch.ones_like(mask[:, :-1]), start)",
    ),
    Bug(
        "the value's clip fraction weighs micro-batches alike",
        "stats.clip_fraction * share",
        "stats.clip_fraction",
    ),
    Bug(
        "the value loss is that of the last micro-batch",
        'found["value/loss"] += loss.detach()',
        'found["value/loss"] = loss.detach()',
    ),
    Bug(
        "the critic steps at each micro-batch",
        "                loss.backward()\n            share",
        "                loss.backward()\n            self.learner.step()\n            share",
    ),
    Bug(
        "the critic's learning rate is the policy's default",
        "Learner(self.model, config.optimizer, updates",
        "Learner(self.model, ModelConfig().optimizer, updates",
    ),
    Bug(
        "the critic shares nothing with the reward model",
        "if source is not None:\n            models",
        "if False:\n            models",
        excuse="Memory alone: the values are the same.",
    ),
]

_KL_CONTROL = [
    Bug("the error is not clipped", ".clamp(-_MAX_ERROR, _MAX_ERROR)", ""),
    Bug("the error is clipped to 1", "_MAX_ERROR = 0.2", "_MAX_ERROR = 1.0"),
    Bug("the error has the wrong sign", "kl / self.adaptive.target - 1", "1 - kl / self.adaptive.target"),
    Bug("the error is absolute", "kl / self.adaptive.target - 1", "kl - self.adaptive.target"),
    Bug("the responses are not counted", "1 + error * responses /", "1 + error /"),
    Bug("a fixed coefficient moves", "if self.adaptive is None:\n            return",
        "if self.adaptive is None:\n            self.adaptive = AdaptiveKLConfig()"),
]  # fmt: skip

_CONFIG = [
    Bug(
        "critic-free estimators whiten",
        'self.has_critic or self.estimator == "reinforce_pp"',
        "True",
    ),
    Bug(
        "REINFORCE++ does not whiten",
        'self.has_critic or self.estimator == "reinforce_pp"',
        "self.has_critic",
    ),
    Bug(
        "the KL estimator of the loss is k1",
        '"k1" if self.kl_in == "reward" else "k3"',
        '"k1"',
    ),
    Bug("GRPO is a mean over tokens", '{"grpo": "sequence_mean", "dr_grpo": "sum"}',
        '{"dr_grpo": "sum"}'),
    Bug("RLOO has a critic", 'in ("gae", "monte_carlo", "td")', 'in ("gae", "monte_carlo", "td", "rloo")'),
    Bug("RLOO compares no groups", 'in ("grpo", "dr_grpo", "rloo")', 'in ("grpo", "dr_grpo")'),
    Bug("what is set gives way to the source's own",
        "if getattr(self, name) is None:", "if True:"),
    Bug("Adam's epsilon is that of torch", "eps: PositiveFloat = 1e-5", "eps: PositiveFloat = 1e-8",
        "test_config test_optim test_engine"),
    Bug("top-p is on by default", "top_p: Annotated[float, Field(gt=0, le=1)] = 1.0",
        "top_p: Annotated[float, Field(gt=0, le=1)] = 0.9", "test_config test_policy test_engine"),
    Bug("unknown settings are taken", 'ConfigDict(extra="forbid")', 'ConfigDict(extra="ignore")',
        "test_config"),
    Bug("GRPO's command has its KL in the reward", '"kl_in": "loss"', '"kl_in": "reward"',
        "test_cli test_config"),
    Bug("adaptive KL aims at 1 nat", "target: PositiveFloat = 6.0", "target: PositiveFloat = 1.0",
        "test_engine test_estimators test_config"),
    Bug("a generation without a length", "max_new_tokens: PositiveInt = 128",
        "max_new_tokens: NonNegativeInt = 128", "test_config"),
]  # fmt: skip

_CHECKS = [
    Bug(
        "a step of parts of groups",
        "if settings.rollout_batch_size % settings.group_size:",
        "if False:",
    ),
    Bug("groups of one", "settings.compares_groups and settings.group_size < 2",
        "settings.compares_groups and settings.group_size < 1"),
    Bug("a critic's warm-up without a critic",
        "if settings.critic_warmup_steps and not settings.has_critic:", "if False:"),
    Bug("k1 in the loss", 'settings.kl_in == "loss" and settings.kl_estimator == "k1"', "False"),
    Bug("warm-up to the end", "if settings.critic_warmup_steps >= config.steps:",
        "if settings.critic_warmup_steps > config.steps:"),
    Bug("adaptive KL from 0", "settings.adaptive_kl is not None and settings.kl_coef == 0", "False"),
    Bug("a discount between groups",
        "settings.gamma != 1 and (settings.compares_groups or settings.needs_greedy)",
        "settings.gamma != 1 and settings.compares_groups"),
    Bug("a dual clip of no clip",
        'settings.dual_clip is not None and settings.objective != "clip"', "False"),
    Bug("patience without evaluations", "if config.patience and not config.every:", "if False:",
        "test_evaluation"),
    Bug("best of n of nothing", "if config.best_of > 1 and not held_out:", "if False:",
        "test_evaluation"),
]  # fmt: skip

FILES = [
    InFile("ppo_engine/engine.py", "test_engine test_estimators", _ENGINE),
    InFile("ppo_engine/estimators.py", "test_estimators", _ESTIMATORS),
    InFile("ppo_engine/critic.py", "test_engine test_estimators", _CRITIC),
    InFile("ppo_engine/kl_control.py", "test_engine", _KL_CONTROL),
    InFile("ppo_engine/config.py", "test_estimators", _CONFIG),
    InFile("ppo_engine/settings_checks.py", "test_estimators", _CHECKS),
]
