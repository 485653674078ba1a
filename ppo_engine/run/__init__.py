"""A run as people see it: its folder, checkpoints, progress, plots and trackers."""
