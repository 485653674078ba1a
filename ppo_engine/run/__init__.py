"""A run as people see it: its folder, checkpoints, progress, pictures and trackers."""
