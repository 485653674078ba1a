"""RLHF on one machine: reward models from ranked answers, and PPO against them.

    from ppo_engine import PPOConfig, PPOTrainer
    PPOTrainer("path/to/model", reward=my_function, prompts=["…"], config=PPOConfig()).train()

`PPOEngine` gives the four calls of a PPO step to a training loop of your own.
"""

from ppo_engine.config import PPOConfig, RewardModelConfig
from ppo_engine.engine import PPOEngine
from ppo_engine.errors import UserError
from ppo_engine.ppo_trainer import PPOTrainer
from ppo_engine.reward_trainer import RewardModelTrainer
from ppo_engine.rollout import Experience, Rollout

__all__ = [
    "Experience",
    "PPOConfig",
    "PPOEngine",
    "PPOTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "Rollout",
    "UserError",
]
