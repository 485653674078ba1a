"""`ppo-engine demo`: every stage of RLHF on an embedded model, as an example and as a check."""

from ppo_engine.demo.run import run_demo

__all__ = ["run_demo"]
