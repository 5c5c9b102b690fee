"""What a saved model holds of a guarded run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.brake import PolicyBrake
from sb3_offline_ft.collapse.good_states import GoodStates
from sb3_offline_ft.collapse.monitor import EpisodeMonitor, Phase
from sb3_offline_ft.collapse.remedies import RemediesOfRun
from sb3_offline_ft.collapse.reporting import Counts
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json
from sb3_offline_ft.common.warning import warn

ATTRIBUTE = "collapse_guard_state"
VERSION = 1


@dataclass(kw_only=True)
class SavedRun:
    """The run's state, in the form of JSON."""

    version: int = VERSION
    reference: list[Any]
    """Episodes of the first baseline as far as it has been gathered: returns or rewards."""
    monitor: dict[str, Any]
    phase: Phase
    counts: list[int]
    """Episodes, alarms, rollbacks, promotions, and rollbacks since the last promotion."""
    learning_rate_factor: float
    radius: float | None
    held: bool
    releases: Sequence[tuple[int, str]]
    """Timesteps at which remedies end, and their names."""
    stopped: bool
    undone_updates: int = 0
    snapshots: list[int]
    """Timesteps of the good states."""
    references: Sequence[int] = ()
    """Timesteps of those that became the reference of a constrained algorithm."""

    @classmethod
    def of(
        cls, monitor: EpisodeMonitor, good: GoodStates, brake: PolicyBrake, remedies: RemediesOfRun, counts: Counts
    ) -> Self:
        gathered = monitor.gathered if monitor.phase == "baseline" else []
        return cls(
            reference=[np.asarray(episode).tolist() for episode in gathered],
            monitor=arrays_to_json(monitor.state_dict()),
            phase=monitor.phase,
            counts=[counts.episodes, counts.alarms, counts.rollbacks, counts.promotions, good.failures],
            **brake.facts,
            releases=remedies.ends,
            stopped=counts.is_stopped,
            undone_updates=counts.undone_updates,
            snapshots=[state.timestep for state in good.states],
            references=[state.timestep for state in good.states if state.is_reference],
        )

    def write(self, model: OffPolicyAlgorithm) -> None:
        """Put the state where SB3's ``save`` finds it: a text attribute of the model, no pickle."""
        setattr(model, ATTRIBUTE, json.dumps(vars(self)))

    @classmethod
    def read(cls, model: OffPolicyAlgorithm, monitor: EpisodeMonitor) -> Self | None:
        """
        :param model: A loaded learner
        :param monitor: A new one, which takes up the monitoring period
        :return: The state that it was saved with. None if there is none or, with a warning, if it is damaged or of other
            settings; the monitor is useless then
        """
        text = vars(model).get(ATTRIBUTE)
        if text is None:
            return None
        try:
            content = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"it has version {content['version']}, expected {VERSION}")
            saved = cls(**content)
            saved._check()
            monitor.load_state_dict(arrays_from_json(saved.monitor))
            monitor.phase = saved.phase
            monitor.gathered = [np.array(episode) if monitor.needs_rewards else episode for episode in saved.reference]
        # Whoever reads half a state raises anything
        except Exception as error:
            warn(
                f"CollapseGuard: its state in the model cannot be taken up ({type(error).__name__}: {error}), so that it "
                "begins anew. The detector, its rate and its horizon must be those that the state was saved with."
            )
            return None
        return saved

    def _check(self) -> None:
        """``ValueError`` if a field is not of its kind: nothing has been taken up yet."""
        ends = self.releases
        checks = {
            "phase": self.phase in get_args(Phase),
            "counts": _are_whole(self.counts) and len(self.counts) == 5,
            "undone_updates": _are_whole([self.undone_updates]),
            "snapshots": _are_whole(self.snapshots),
            "references": _are_whole(self.references),
            "learning_rate_factor": _is_number(self.learning_rate_factor) and self.learning_rate_factor > 0,
            "radius": self.radius is None or (_is_number(self.radius) and self.radius > 0),
            "held": isinstance(self.held, bool),
            "stopped": isinstance(self.stopped, bool),
            "releases": isinstance(ends, list | tuple)
            and all(isinstance(end, list | tuple) and len(end) == 2 and _are_whole(end[:1]) for end in ends),
        }
        wrong = [name for name, is_right in checks.items() if not is_right]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} must be another kind of value")

    def take_up(self, good: GoodStates, brake: PolicyBrake, remedies: RemediesOfRun, counts: Counts) -> None:
        """Go on from this state."""
        counts.episodes, counts.alarms, counts.rollbacks, counts.promotions, _ = self.counts
        counts.undone_updates, counts.is_stopped = self.undone_updates, self.stopped
        good.read(self.snapshots, self.references)
        remedies.take_up(self.releases)
        # A frozen policy stays so, but not one that a remedy held and nothing would release
        held = self.held and (self.phase == "done" or bool(remedies.ends))
        # The loaded policy is the newest; the region lies around the last good one, where that was saved
        brake.take_up(self.learning_rate_factor, self.radius, held, good.states[-2:][0].snapshot.policy_state)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_whole(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int for value in values)
