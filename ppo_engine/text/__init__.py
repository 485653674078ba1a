"""Text: conversations to token ids."""
