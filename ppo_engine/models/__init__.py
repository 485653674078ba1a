"""Models at work: passes, log-probs, losses and scores, what is trained, the optimizer."""
