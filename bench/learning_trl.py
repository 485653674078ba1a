"""One training of `bench/learning.py` by TRL 1.12's `PPOTrainer`, as the JSON file says that it is
given. Its optimizer's settings are ours; what else is not set is TRL's default."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main(work: dict[str, Any]) -> None:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32) for _ in range(2)
    )
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(work["reward"], dtype=torch.float32)
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(work["policy"], padding_side="left")
    # TRL scores and masks as if padding began with this token: it must not be the one that ends.
    tokenizer.pad_token_id = reward.config.pad_token_id
    holder = _Holder(Path(work["folder"]), work["hold_every"])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=f"{work['folder']}/trl",
            # A rollout is as large as this, whatever `num_mini_batches` divides it into. With
            # accumulation TRL would step once for several mini-batches.
            per_device_train_batch_size=work["responses"],
            gradient_accumulation_steps=1,
            num_mini_batches=work["responses"] // work["mini_batch"],
            num_ppo_epochs=1,
            total_episodes=work["responses"] * len(work["prompts"]),
            local_rollout_forward_batch_size=work["responses"],
            response_length=work["new_tokens"],
            stop_token="eos",
            temperature=1.0,
            kl_coef=work["kl_coef"],
            gamma=1.0,
            lam=work["lam"],
            learning_rate=work["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            adam_epsilon=1e-5,
            seed=work["seed"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
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
        train_dataset=Dataset.from_dict({"input_ids": work["prompt_ids"]}),
        callbacks=[holder],
    )
    found = trainer.args.num_total_batches, trainer.args.local_mini_batch_size
    if found != (len(work["prompts"]), work["mini_batch"]):
        raise RuntimeError(f"TRL would train on other rollouts and mini-batches: {found}")
    holder.policy = policy
    trainer.train()


class _Holder(TrainerCallback):
    """Saves the policy as it is after every so many rollouts."""

    policy: Any

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.policy.save_pretrained(self.folder / f"step-{state.global_step}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
