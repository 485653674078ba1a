"""Settings: the schema, files and overrides, contradictions."""
