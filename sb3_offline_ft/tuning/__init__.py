"""The engine of both tuners, rl_zoo3's ``-optimize`` and ``study tune``: storages, samplers, objective, pruner."""
