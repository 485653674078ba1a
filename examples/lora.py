"""LoRA: train low-rank adapters beside the frozen weights.

    pip install 'ppo-engine[lora]'
    python examples/lora.py

The reference policy is the same model with its adapters switched off, so that it takes no memory.
What is saved has the adapters merged into the weights, and loads anywhere.
"""

import time

import common
from transformers import AutoModelForCausalLM

from ppo_engine import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    PPOTrainer,
    RunConfig,
)

TOPICS = "rain, a chair, the road, a dog, bread, a window, coffee, a clock"
PROMPTS = [
    [{"role": "user", "content": f"Write one sentence about {topic}."}]
    for topic in TOPICS.split(", ")
]


def brevity(responses):
    return [-len(response) / 100 for response in responses]


if __name__ == "__main__":
    options = common.options(__doc__)
    folder = time.strftime("runs/lora-%Y%m%d-%H%M%S")  # a run wants a new one
    config = PPOConfig(
        steps=2 if options.smoke else 8,
        policy=ModelConfig(
            lora=LoraConfig(rank=16, alpha=32),
            optimizer=OptimizerConfig(learning_rate=2e-4),  # adapters want more than full weights
        ),
        ppo=PPOSettings(
            estimator="grpo", group_size=8, rollout_batch_size=32, mini_batch_size=16, kl_in="loss"
        ),
        generation=GenerationConfig(max_new_tokens=32),
        run=RunConfig(output_dir=folder),
    )
    trainer = PPOTrainer(options.model, reward=brevity, prompts=PROMPTS, config=config)
    weights = list(trainer.engine.policy.model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    print(f"{trained:,} of {sum(weight.numel() for weight in weights):,} weights are trained")
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(f"{folder}/policy")
    print(f"{folder}/policy is a plain {type(merged).__name__}")
