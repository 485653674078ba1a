"""One process of `bench/e2e.py`: PPO steps by TRL's `PPOTrainer`, on the work in the folder it is
given.

The trainer does all of its own work; its phases are told apart from outside, by wrapping functions
of its module:

- generate: until `batch_generation` returns;
- score: `get_reward` with the reward model;
- advantages: everything else (log-probs from the sampler's scores, the reference, the critic, GAE)
  until the first forward pass with gradients;
- update: from there to the end of the step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.e2e_worker import LEARNING_RATE, PhaseClock, Work, report_step


def main(work: Work) -> None:
    # In mixed precision TRL's PPO would sample in fp32 all the same: weights alone set its dtype.
    dtype = getattr(torch, work.dtype)
    tokenizer = AutoTokenizer.from_pretrained(f"{work.folder}/policy", padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f"{work.folder}/policy", dtype=dtype) for _ in range(2)
    )
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(f"{work.folder}/reward", dtype=dtype)
        for _ in range(2)
    )
    count = len(work.prompts)
    steps = _Steps(PhaseClock(torch.device(work.device)), reward)
    steps.watch()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=f"{work.folder}/trl",
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=count // work.micro_batch,
            num_mini_batches=1,
            num_ppo_epochs=work.epochs,
            total_episodes=count * work.steps,
            # Sampling, too, is in batches of this size.
            local_rollout_forward_batch_size=count,
            response_length=work.new_tokens,
            stop_token=None,  # so that all responses have the same length
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=work.device == "cpu",
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": work.prompt_ids}),
        callbacks=[steps],
    )
    trainer.train()


class _Steps(TrainerCallback):
    """Switches the clock's phase where the trainer enters and leaves its functions."""

    def __init__(self, clock: PhaseClock, reward: Any) -> None:
        self.clock = clock
        self.reward = reward
        self.prompt_tokens = self.response_tokens = 0

    def watch(self) -> None:
        generation, get_reward = ppo_trainer.batch_generation, ppo_trainer.get_reward
        forward = ppo_trainer.forward

        def watched_generation(
            model: Any, queries: torch.Tensor, batch: int, pad: int, config: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            found = generation(model, queries, batch, pad, config)
            self.clock.switch("advantages")
            self.prompt_tokens = int((queries != pad).sum())
            self.response_tokens = found[0][:, queries.shape[1] :].numel()
            return found

        def watched_reward(model: Any, *arguments: Any) -> Any:
            if model is not self.reward:
                return get_reward(model, *arguments)
            with self.clock.within("score"):
                return get_reward(model, *arguments)

        def watched_forward(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and self.clock.phase != "update":
                self.clock.switch("update")
            return forward(*arguments)

        ppo_trainer.batch_generation = watched_generation
        ppo_trainer.get_reward = watched_reward
        ppo_trainer.forward = watched_forward

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start("generate")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        report_step(
            self.clock, prompt_tokens=self.prompt_tokens, response_tokens=self.response_tokens
        )
        self.clock.start("generate")


if __name__ == "__main__":
    main(Work.load(sys.argv[1]))
