"""One step of PPO or a relative."""
