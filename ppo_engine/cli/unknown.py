"""What an option that a command does not have may have meant: another option, or a setting."""

from __future__ import annotations

import argparse
import difflib

_BATCH = ("rollout_batch_size", "batch_size")
# What other trainers call it: our option, or the ends of our settings, the first that there is.
_ELSEWHERE = {
    "lr": ("learning_rate",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_steps": ("steps",),
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "max_length": ("max_tokens",),
    "max_completion_length": ("max_new_tokens",),
    "num_generations": ("group_size",),
    "beta": ("kl_coef",),
    "model_name_or_path": ("--model",),
    "dataset_name": ("--data",),
    "reward_funcs": ("--reward",),
    "reward_model_path": ("--reward",),
    "resume_from_checkpoint": ("run.resume=true --output-dir FOLDER",),
    "resume": ("run.resume=true --output-dir FOLDER",),
}


def meant(option: str, parser: argparse.ArgumentParser) -> str:
    """A sentence, after a space, that names it for the command of `parser`; nothing where none is
    near."""
    from ppo_engine.settings.problems import keys
    from ppo_engine.settings.schema import COMMANDS

    command = parser.prog.split()[-1]
    settings = list(keys(COMMANDS[command])) if command in COMMANDS else []
    options = [name for name in parser._option_string_actions if name.startswith("--")]
    written = option.partition("=")[0].lstrip("-").replace("-", "_")
    for name in _ELSEWHERE.get(written, (written,)):
        if name.startswith("--") and name in options:
            return f" Did you mean {name}?"
        if "=" in name and name.partition("=")[0] in settings:
            return f" Did you mean {name}?"
        found = [f"{key}=…" for key in settings if key.rpartition(".")[2] == name]
        if found:
            return f" Did you mean {' or '.join(found)}?"
    near = difflib.get_close_matches(f"--{written.replace('_', '-')}", options, n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""
