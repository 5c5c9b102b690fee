"""The shadow of a policy: it computes its actions, and another one acts."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sb3_offline_ft.trial.actuators import ActionLog


@dataclass
class ShadowLog(ActionLog):
    """What a policy would have done in an episode, beside what was done."""

    distances: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    """Why actions could not have been sent, and how often."""

    def compare(self, action: Any, acted: Any) -> None:
        """
        :param action: What the shadow would have done, without fault
        :param acted: What was done
        """
        self.add(action)
        command = self.actuators.command
        self.distances.append(float(self.actuators.distance(command(action), command(acted)).mean()))

    def summary(self) -> dict[str, Any] | None:
        """As of :class:`ActionLog`; over the steps the ``distance`` of the actions, mean of the actuators; ``faults``."""
        actions = super().summary()
        if actions is None and not self.faults:
            return None
        distances = np.array(self.distances)
        distance = {"mean": distances.mean(), "p95": np.quantile(distances, 0.95), "max": distances.max()} if actions else None
        return (actions or {"steps": 0}) | {
            "distance": {name: float(value) for name, value in distance.items()} if distance else None,
            "faults": dict(self.faults.most_common(8)),
        }
