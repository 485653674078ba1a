"""A training loop of your own around the four calls of a PPO step.

    python examples/own_loop.py

It asks more often what the policy does worst: each prompt is drawn with a probability that falls
with the mean score of the responses to it so far.
"""

import math
import random

import common

from ppo_engine import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOEngine,
    PPOSettings,
)

TOPICS = "rain, a chair, the road, a dog, bread, a window, coffee, a clock, the sea, a letter"
PROMPTS = [f"Write one sentence about {topic}." for topic in TOPICS.split(", ")]
PROMPTS_PER_STEP = 8


def short_words(responses):
    """Minus the mean length of a word."""
    return [-len(response) / max(len(response.split()), 1) for response in responses]


def main():
    options = common.options(__doc__)
    steps = 2 if options.smoke else 8
    config = PPOConfig(
        steps=steps,  # over which the learning rate decays
        policy=ModelConfig(
            trainable_layers=options.layers,  # the last ones, at a high learning rate
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_fraction=0.1),
        ),
        ppo=PPOSettings(
            estimator="rloo",
            group_size=4,
            rollout_batch_size=4 * PROMPTS_PER_STEP,
            mini_batch_size=16,
        ),
        generation=GenerationConfig(max_new_tokens=24),
    )
    engine = PPOEngine(options.model, reward=short_words, config=config)
    draws = random.Random(0)
    so_far = dict.fromkeys(PROMPTS, 0.0)
    for step in range(1, steps + 1):
        # Distinct prompts, the worst most likely (Gumbel's trick).
        keys = {prompt: -so_far[prompt] - math.log(draws.expovariate(1.0)) for prompt in PROMPTS}
        chosen = sorted(PROMPTS, key=keys.__getitem__, reverse=True)[:PROMPTS_PER_STEP]
        chats = [[{"role": "user", "content": prompt}] for prompt in chosen]

        rollout = engine.generate(chats)  # 1 four responses to each
        scores = engine.score(rollout)  # 2
        experience = engine.estimate_advantages(rollout, scores)  # 3
        metrics = engine.update(experience)  # 4

        means = scores.view(PROMPTS_PER_STEP, -1).mean(1).tolist()
        for prompt, mean in zip(chosen, means, strict=True):
            so_far[prompt] = (so_far[prompt] + mean) / 2
        print(
            f"step {step}: score {float(scores.mean()):+.2f}, KL {metrics['objective/kl']:.3f}, "
            f"worst so far: {min(so_far, key=so_far.__getitem__)}"
        )
    engine.save("runs/own-loop")
    print("runs/own-loop/policy loads with from_pretrained")


if __name__ == "__main__":
    main()
