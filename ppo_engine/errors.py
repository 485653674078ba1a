"""The one exception that means "the user can fix this": the CLI prints its text, no traceback."""


class UserError(Exception):
    """Wrong input, configuration or environment; the message says what, where, and what to do."""
