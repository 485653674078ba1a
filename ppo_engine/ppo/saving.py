"""Policy and critic as they are saved."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ppo_engine.models.language_model import LanguageModel
from ppo_engine.ppo.critic import Critic
from ppo_engine.pretrained.adapters import is_adapted
from ppo_engine.pretrained.loading import save_model
from ppo_engine.run.directory import replacing
from ppo_engine.settings.schema import PPOConfig


def save_models(
    folder: str | Path, policy: LanguageModel, critic: Critic | None, config: PPOConfig
) -> None:
    """Into `folder`/policy and `folder`/critic: both or, where something else than a model stands
    in the place of one, neither."""
    run = config.run

    def place(name: str, model: Any) -> AbstractContextManager[Path]:
        adapted = run.save_adapters and is_adapted(model)
        mark = ADAPTER_CONFIG_NAME if adapted else CONFIG_NAME
        return replacing(Path(folder) / name, mark, "model")

    with ExitStack() as both:
        inside = both.enter_context(place("policy", policy.model))
        if critic is not None:
            other = both.enter_context(place("critic", critic.model))
            save_model(
                critic.model,
                policy.tokenizer,
                other,
                run.save_dtype,
                as_adapters=run.save_adapters,
            )
        policy.save(inside, run.save_dtype, config.generation, as_adapters=run.save_adapters)
