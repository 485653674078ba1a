"""One process of `bench/e2e_grpo.py`: GRPO steps by TRL's `GRPOTrainer`, on the work in the folder
it is given; of one epoch, as it counts a further one as a step of its own.

The trainer does all of its own work; its phases are those of its methods:

- generate: `_generate`;
- score: `_calculate_rewards`;
- advantages: what else `_generate_and_score_completions` does, the reference's pass above all;
- update: the rest of the step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.e2e_worker import (
    GRPO_KL_COEF,
    LEARNING_RATE,
    PhaseClock,
    Work,
    cheap_reward,
    report_step,
)


def main(work: Work) -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"{work.folder}/policy", padding_side="left")
    steps = _Steps(PhaseClock(torch.device(work.device)))
    trainer = _Watched(
        steps,
        # The reference is loaded by the trainer, from the same folder and in the same dtype.
        model=f"{work.folder}/policy",
        reward_funcs=_reward,
        args=GRPOConfig(
            output_dir=f"{work.folder}/trl",
            model_init_kwargs={"dtype": work.dtype},
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.responses // work.micro_batch,
            num_generations=work.group,
            max_steps=work.steps,
            max_completion_length=work.new_tokens,
            temperature=1.0,
            loss_type="grpo",
            beta=GRPO_KL_COEF,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            adam_beta2=0.95,
            adam_epsilon=1e-5,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,  # mixed precision; the weights' dtype is that of the step
            use_cpu=work.device == "cpu",
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": work.prompts}),
        callbacks=[steps],
    )
    # No token ends a response, so that all have the same length.
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    trainer.train()


class _Steps(TrainerCallback):
    """The clock, and what a step read and wrote."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock
        self.prompt_tokens = self.response_tokens = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start("update")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        report_step(
            self.clock, prompt_tokens=self.prompt_tokens, response_tokens=self.response_tokens
        )
        self.clock.start("update")


class _Watched(GRPOTrainer):
    """Switches the clock's phase where the trainer enters and leaves its methods."""

    def __init__(self, steps: _Steps, **settings: Any) -> None:
        super().__init__(**settings)
        self.steps = steps

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.steps.clock.within("advantages"):
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: Any) -> Any:
        with self.steps.clock.within("generate"):
            found = super()._generate(prompts)
        prompt_ids, completion_ids, *_ = found
        self.steps.prompt_tokens = sum(map(len, prompt_ids))
        self.steps.response_tokens = sum(map(len, completion_ids))
        return found

    def _calculate_rewards(self, *arguments: Any) -> Any:
        with self.steps.clock.within("score"):
            return super()._calculate_rewards(*arguments)


def _reward(completions: list[Any], **_: Any) -> list[float]:
    """Of text, or of chats whose last message is the response."""
    return [cheap_reward(x if isinstance(x, str) else x[-1]["content"]) for x in completions]


if __name__ == "__main__":
    main(Work.load(sys.argv[1]))
