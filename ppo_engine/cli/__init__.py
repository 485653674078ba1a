"""The command line: `ppo-engine demo | sft | reward | ppo | grpo | generate | inspect | view |
doctor`."""

from ppo_engine.cli.run import main

__all__ = ["main"]
