"""`ppo-engine demo`: the whole method on an embedded model, as an example and as a check."""

from ppo_engine.demo.run import run_demo

__all__ = ["run_demo"]
