"""Models: loading, precision, freezing, passes, log-probs and losses, the optimizer."""
