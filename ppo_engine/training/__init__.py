"""The training loops, and what is measured in them."""
