"""`ppo-engine inspect`: rows of data exactly as a model will see them."""
