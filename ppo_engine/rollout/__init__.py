"""Rollouts: what a policy writes, in one turn or several."""
