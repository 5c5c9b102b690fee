"""Numbers that are not finite: always a reason for an alarm, unless the environment gave them."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.learner import policy_network

LOSSES = ("train/critic_loss", "train/actor_loss", "train/loss")


class NonFiniteNumbers:
    """Looks for them in updates and steps."""

    def __init__(self, model: OffPolicyAlgorithm) -> None:
        self._model = model
        _, self._policy, _ = policy_network(model)
        self._checked_updates = model._n_updates
        self._observation_was_broken = False

    def go_on(self) -> None:
        """Begin another call of ``learn``."""
        self._observation_was_broken = False

    def in_updates(self) -> str | None:
        """What the updates since the last look have made not finite."""
        for name in LOSSES:
            value = self._model.logger.name_to_value.get(name)
            if value is not None and not math.isfinite(value):
                return f"non-finite {name.removeprefix('train/').replace('_', ' ')}"
        if self._model._n_updates != self._checked_updates:
            self._checked_updates = self._model._n_updates
            sums = [parameter.detach().sum() for parameter in self._policy.parameters()]
            if not th.stack(sums).isfinite().all():
                return "non-finite policy parameter"
        return None

    def forget_updates(self) -> None:
        """What is not finite now shall not raise the alarm again."""
        self._checked_updates, logger = self._model._n_updates, self._model.logger
        for name in LOSSES:
            logger.name_to_value.pop(name, None)
            logger.name_to_excluded.pop(name, None)
            logger.name_to_count.pop(name, None)

    def in_step(self, step: Mapping[str, Any], rewards: np.ndarray) -> Literal["environment", "policy"] | None:
        """Who gave what is not finite in a step; an action after a broken observation is not the policy's fault."""
        ended = np.flatnonzero(step["dones"])
        observations = [step["new_obs"], *(step["infos"][index].get("terminal_observation") for index in ended)]
        parts: list[np.ndarray] = [rewards]
        for one in observations:
            parts += [] if one is None else list(one.values()) if isinstance(one, dict) else [one]
        # A sum is finite only if all its terms are
        environment_is_fine = all(math.isfinite(part.sum()) for part in parts)
        action_is_finite = math.isfinite(step["actions"].sum())
        blameless, self._observation_was_broken = self._observation_was_broken, not environment_is_fine
        if environment_is_fine and action_is_finite:
            return None
        return "environment" if action_is_finite or blameless else "policy"
