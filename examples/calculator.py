"""Several turns with a tool: an environment that calculates what the policy asks it to.

    python examples/calculator.py

The policy may write a sum such as [12*7]; its turn ends there, the environment's message says what
it gives, and the policy goes on. Only the policy's tokens are learned. The reward: does the last
turn say the right number, and was the calculator asked?
"""

import random
import re

import common

from ppo_engine import (
    EnvironmentConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    PPOTrainer,
)

CALL = re.compile(r"\[(\d{1,4}) ?([-+*]) ?(\d{1,4})\]$")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
SHOWN = [  # how a tool is asked, as part of every prompt
    {"role": "user", "content": "What is 12 times 11?"},
    {"role": "assistant", "content": "[12*11]"},
    {"role": "tool", "content": "132"},
    {"role": "assistant", "content": "12 times 11 is 132."},
]


def calculator(turns):
    """The result for each conversation whose last turn is a call; None ends the others.

    `turns` holds the messages after the prompt, of each conversation that goes on.
    """
    calls = [CALL.search(messages[-1]["content"]) for messages in turns]
    return [
        call and {"role": "tool", "content": str(OPERATIONS[call[2]](int(call[1]), int(call[3])))}
        for call in calls
    ]


def right(turns, answer):
    """1 for the right number in the last turn; a fifth for having asked the calculator."""
    return [
        (str(number) in re.findall(r"-?\d+", messages[-1]["content"])) + 0.2 * (len(messages) > 1)
        for messages, number in zip(turns, answer, strict=True)
    ]


def rows(count):
    draws = random.Random(0)
    for _ in range(count):
        a, b = draws.randint(11, 99), draws.randint(11, 99)
        word, sign = draws.choice([("plus", "+"), ("minus", "-"), ("times", "*")])
        question = {"role": "user", "content": f"What is {a} {word} {b}?"}
        yield {"prompt": [*SHOWN, question], "answer": OPERATIONS[sign](a, b)}


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
            rollout_batch_size=64,
            mini_batch_size=32,
            kl_in="loss",
            kl_coef=0.04,
        ),
        generation=GenerationConfig(max_new_tokens=24, stop=("]",)),
        environment=EnvironmentConfig(max_turns=2),
    )
    trainer = PPOTrainer(
        options.model, reward=right, prompts=rows(256), config=config, environment=calculator
    )
    metrics = trainer.train()
    print(f"Reward of the last step: {metrics['objective/scores']:.2f} of 1.2")
