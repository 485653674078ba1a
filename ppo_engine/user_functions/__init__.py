"""Functions that people write: found by their names, given what they ask for, sync or async."""
