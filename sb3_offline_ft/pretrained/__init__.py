"""From a pretraining to a finetuning learner: recipes, the cache of what they gave, and how a learner starts from it."""
