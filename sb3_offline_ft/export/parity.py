"""Whether an exported policy does what the policy does."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.controllers.saved_policy import PolicyController
from sb3_offline_ft.export.formats import Inputs, Run
from sb3_offline_ft.export.observations import RealObservations

TOLERANCE = 1e-5
DEFINITION = (
    "The largest absolute difference between an action of the exported policy and one of SB3's predict, of any number of any "
    "action, as a share of the range between the bounds of this number (without bounds, and of a policy that only clips its "
    "actions: no more than the range of SB3's actions here, at least 1). Each observation was given by itself, and all in one "
    "batch."
)


@dataclass(frozen=True)
class Parity:
    """
    How far an exported policy is from the one that it was made of.

    :param difference: The largest one, see :data:`DEFINITION`; NaN if an action was not finite
    :param observations: What was compared
    """

    difference: float
    observations: RealObservations

    @property
    def is_kept(self) -> bool:
        """Whether the two are the same but for rounding."""
        # NaN is not
        return self.difference <= TOLERANCE


def compare(policy: PolicyController, run: Run, observations: RealObservations) -> Parity:
    """
    :param policy: What the exported policy was made of; it has a ``Box`` of actions
    :param run: The exported policy
    :param observations: What both see
    :return: How far they are apart
    """
    assert isinstance(policy.action_space, spaces.Box)
    policy.reset()
    expected = np.stack([policy.act(each) for each in observations.single()]).astype(np.float64)
    inputs = observations.inputs
    alone = np.concatenate([run(_row(inputs, i)) for i in range(len(expected))])
    found = np.stack([alone, run(inputs)]).astype(np.float64)
    ranges = _ranges(policy.action_space, expected, is_scaled=policy.policy.squash_output)
    return Parity(float(np.abs((found - expected) / ranges).max()), observations)


def _row(inputs: Inputs, i: int) -> Inputs:
    return {name: array[i : i + 1] for name, array in inputs.items()}


def _ranges(space: spaces.Box, actions: npt.NDArray[np.float64], is_scaled: bool) -> npt.NDArray[np.float64]:
    ranges, seen = space.high.astype(np.float64) - space.low, np.maximum(1.0, np.ptp(actions, axis=0))
    # Bounds may be as wide as float32 is: a share of them would be no test
    return np.where(np.isfinite(ranges) & (ranges > 0), ranges if is_scaled else np.minimum(ranges, seen), seen)
