"""Several rewards with weights, each measured apart.

    python examples/several_rewards.py

What trains is their weighted sum; metrics, curves and samples show each alone, so that one which
is bought at another's expense is seen. A reward may also be a reward model's folder or a URL.
"""

import common

from ppo_engine import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    PPOTrainer,
    RewardConfig,
)

TOPICS = "rain, a chair, the road, a dog, bread, a window, coffee, a clock"
PROMPTS = [
    [{"role": "user", "content": f"Write one sentence about {topic}."}]
    for topic in TOPICS.split(", ")
]


def ends(responses, finished):
    """Whether the response came to its end, rather than being cut off."""
    return [float(one) for one in finished]


def brief(responses):
    """-1 for every 20 words."""
    return [-len(response.split()) / 20 for response in responses]


def varied(responses):
    """The share of words that are not said twice: without it, brevity alone would do."""
    words = [response.lower().split() for response in responses]
    return [len(set(said)) / max(len(said), 1) for said in words]


if __name__ == "__main__":
    options = common.options(__doc__)
    config = PPOConfig(
        steps=2 if options.smoke else 8,
        policy=ModelConfig(
            trainable_layers=options.layers,  # the last ones, at a high learning rate
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_fraction=0.1),
        ),
        reward=RewardConfig(weights=[1.0, 0.5, 0.5]),
        ppo=PPOSettings(
            estimator="grpo", group_size=8, rollout_batch_size=32, mini_batch_size=16, kl_in="loss"
        ),
        generation=GenerationConfig(max_new_tokens=32),
    )
    rewards = {"ends": ends, "brief": brief, "varied": varied}
    metrics = PPOTrainer(options.model, reward=rewards, prompts=PROMPTS, config=config).train()
    for name in rewards:
        print(f"{name:6} {metrics[f'rewards/{name}/mean']:+.2f}")
