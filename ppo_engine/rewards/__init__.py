"""Rewards: what scores a response, and what becomes of the scores."""
