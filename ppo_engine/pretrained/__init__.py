"""Hugging Face models as they stand in folders: read whole, adapted, saved as they came."""
