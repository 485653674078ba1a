"""Notes where the data are too few for the batches, or these do not come out even."""

from __future__ import annotations

from ppo_engine.messages import counted
from ppo_engine.settings.schema import PPOSettings

_FEW_STEPS = 2


def few_steps_note(
    command: str, steps: int, examples: int, batch_size: int, unit: str
) -> list[str]:
    """A note where a run of `command` ends after so few optimizer steps that nothing is learned."""
    if steps > _FEW_STEPS:
        return []
    return [
        f"The run is {counted(steps, 'optimizer step')} in all: {examples} {unit} in batches of "
        f"{batch_size}. Give more data, lower {command}.batch_size, or raise {command}.epochs."
    ]


def batch_notes(settings: PPOSettings, prompts: int) -> list[str]:
    """Notes on a rollout of more prompts than there are, and on mini-batches that do not divide it
    or are more than it."""
    rollout, mini = settings.rollout_batch_size, settings.mini_batch_size
    needed, notes = rollout // settings.group_size, []
    if prompts < needed:
        notes.append(
            f"{counted(prompts, 'prompt')} for {needed} in each rollout: prompts repeat within a "
            "step. Give more, or lower ppo.rollout_batch_size."
        )
    if mini > rollout:
        notes.append(
            f"ppo.mini_batch_size={mini} is more than ppo.rollout_batch_size={rollout}: each epoch "
            f"is one optimizer step over all {counted(rollout, 'response')}."
        )
    rest = rollout % mini
    if rest and mini < rollout:
        batches = counted(rollout // mini + 1, "optimizer step")
        notes.append(
            f"ppo.mini_batch_size={mini} does not divide ppo.rollout_batch_size={rollout}: each "
            f"epoch is {batches}, the last of {counted(rest, 'response')} only."
        )
    return notes
