"""A reward of your own: a Python function of the responses and of columns of your data.

    python examples/own_reward.py

GRPO teaches the model to answer in as many words as a column asks for; every response to a prompt
is compared with seven others. Held-out prompts are answered before and after.
"""

import common

from ppo_engine import (
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    PPOTrainer,
)

TOPICS = "rain, a chair, the road, a dog, bread, a window, coffee, a clock, the sea, a letter"


def length(responses, words):
    """1 for exactly so many words, 0 for none or twice as many. `words` is a column of the data."""
    return [
        max(0.0, 1 - abs(len(response.split()) - wanted) / wanted)
        for response, wanted in zip(responses, words, strict=True)
    ]


def rows():
    """Prompts as chat messages, each with the columns that the reward reads."""
    for topic in TOPICS.split(", "):
        for words in (6, 8, 10):
            question = f"Write one sentence of {words} words about {topic}."
            yield {"prompt": [{"role": "user", "content": question}], "words": words}


if __name__ == "__main__":
    options = common.options(__doc__)
    config = PPOConfig(
        steps=2 if options.smoke else 10,
        policy=ModelConfig(
            trainable_layers=options.layers,  # the last ones, at a high learning rate
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_fraction=0.1),
        ),
        ppo=PPOSettings(
            estimator="grpo",
            group_size=8,
            rollout_batch_size=32,
            mini_batch_size=16,
            kl_in="loss",
            kl_coef=0.04,
        ),
        generation=GenerationConfig(max_new_tokens=32),
        evaluation=EvaluationConfig(prompts=8, best_of=4),
    )
    trainer = PPOTrainer(options.model, reward=length, prompts=rows(), config=config)
    metrics = trainer.train()
    print(f"Held-out reward after training: {metrics['eval/scores']:.2f}")
