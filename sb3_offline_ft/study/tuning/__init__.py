"""Hyperparameters tuned in the conditions of a study."""
