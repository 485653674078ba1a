"""The command line: `ppo-engine demo | sft | generate | rank | agreement | reward | ppo | grpo |
view | replay | inspect | doctor`."""

from ppo_engine.cli.run import main

__all__ = ["main"]
