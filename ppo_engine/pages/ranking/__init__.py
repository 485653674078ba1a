"""`ppo-engine rank` and `ppo-engine agreement`: people rank responses, and how far they agree."""
