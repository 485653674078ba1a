"""Settings that follow from others as long as nobody sets them: None in settings and in files, so
that they go on following when the others change, and a value from where a run begins."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

from ppo_engine.settings.schema.commands import PPOConfig, RewardModelConfig, SFTConfig
from ppo_engine.settings.schema.ppo import PPOSettings

Config = TypeVar("Config", bound=Any)

# What is trained: its learning rate for all weights, that for LoRA, and where they come from.
LEARNING_RATES: dict[str, tuple[float, float, str]] = {
    "policy": (
        1e-6,
        1e-4,
        "DeepSeekMath (Shao et al. 2024, section 4.2), TRL's GRPOConfig and verl: 1e-6",
    ),
    "critic": (1e-5, 1e-4, "verl: 1e-5; OpenRLHF: 9e-6"),
    "reward model": (9e-6, 1e-4, "InstructGPT (Ouyang et al. 2022, appendix C.2), OpenRLHF: 9e-6"),
    "SFT": (2e-5, 2e-4, "Llama 2 (Touvron et al. 2023, section 3.1), TRL's SFTConfig: 2e-5"),
}
_REDUCTIONS = {"grpo": "sequence_mean", "dr_grpo": "sum"}  # of the others: token_mean


def derived(config: Any) -> dict[str, Any]:
    """What a command's unset settings come to, by their dotted keys."""
    return {key: value for key, value in _followed(config).items() if _at(config, key) is None}


def following(config: Any) -> list[str]:
    """The dotted keys of what is set to no other value than it would come to anyway."""
    return [key for key, value in _followed(config).items() if _at(config, key) == value]


def _followed(config: Any) -> dict[str, Any]:
    """What follows from other settings where it is not set, by dotted keys."""
    values: dict[str, Any] = {}
    match config:
        case PPOConfig():
            trained = {"policy": "policy", "critic": "critic"}
            values = {f"ppo.{name}": value for name, value in _of_algorithm(config.ppo).items()}
            values |= {f"critic.{name}": value for name, value in _of_critic(config).items()}
        case RewardModelConfig():
            trained = {"model": "reward model"}
        case SFTConfig():
            trained = {"model": "SFT"}
        case _:
            trained = {}
    for section, use in trained.items():
        full, lora, _ = LEARNING_RATES[use]
        adapted = getattr(config, section).lora or values.get(f"{section}.lora")
        values[f"{section}.optimizer.learning_rate"] = full if adapted is None else lora
    return values


def resolved(config: Config) -> Config:
    """A command's settings with every unset one at what it comes to."""
    for key, value in derived(config).items():
        config = with_value(config, key, value)
    return config


def _of_algorithm(settings: PPOSettings) -> dict[str, Any]:
    return {
        "whiten_advantages": settings.has_critic or settings.estimator == "reinforce_pp",
        "kl_estimator": "k1" if settings.kl_in == "reward" else "k3",
        "reduction": _REDUCTIONS.get(settings.estimator, "token_mean"),
    }


def _of_critic(config: PPOConfig) -> dict[str, Any]:
    """Its adapters, where it shares the policy's base and has none of its own."""
    if not config.share_base or config.critic.lora is not None:
        return {}
    of_policy = {name: getattr(config.policy, name) for name in ("lora", "trainable_layers")}
    return {name: value for name, value in of_policy.items() if value is not None}


def _at(section: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), section)


def with_value(section: Any, key: str, value: Any) -> Any:
    """`section` with another value at a dotted key."""
    name, _, rest = key.partition(".")
    inner = with_value(getattr(section, name), rest, value) if rest else value
    return replace(section, **{name: inner})
