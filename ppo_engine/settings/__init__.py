"""Settings: what there is to set, files and overrides, what contradicts what."""
