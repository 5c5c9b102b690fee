"""The Lagrange multiplier of a constraint."""

import math
from collections.abc import Mapping

import numpy as np
import torch as th

from sb3_offline_ft.common.warning import warn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Multiplier:
    """
    A Lagrange multiplier that is kept within bounds, and on log scale takes one step of Adam with each violation.

    It is kept on the device, which no method but ``float(...)`` waits for.

    :param initial: Its first value
    :param learning_rate: Learning rate of Adam
    :param least: Its smallest value
    :param largest: Its largest value
    :param device: Where it is kept
    :raises ValueError: A number is out of range
    """

    def __init__(
        self, initial: float, learning_rate: float, least: float, largest: float, device: th.device | str = "cpu"
    ) -> None:
        if not 0 < least <= initial <= largest < math.inf:
            raise ValueError(
                "Expected 0 < min_multiplier <= initial_multiplier <= max_multiplier < inf, found "
                f"{least!r}, {initial!r}, {largest!r}."
            )
        if not 0 <= learning_rate < math.inf:
            raise ValueError(f"`multiplier_learning_rate` must be at least 0, found {learning_rate!r}.")
        self._initial, self._learning_rate, self._device = initial, learning_rate, device
        self._bounds = math.log(least), math.log(largest)
        self.reset()

    def reset(self) -> None:
        """Begin anew with the first value."""
        self._logarithm = th.tensor(math.log(self._initial), dtype=th.float64, device=self._device, requires_grad=True)
        self._optimizer = th.optim.Adam([self._logarithm], lr=self._learning_rate)

    @property
    def value(self) -> th.Tensor:
        """Its value, a float64 scalar without gradient."""
        return self._logarithm.detach().exp()

    def __float__(self) -> float:
        return math.exp(self._logarithm.item())

    def step(self, violation: th.Tensor) -> None:
        """Take one step with a violation of the constraint, a scalar that is negative if it is kept."""
        # The dual's gradient with respect to log(multiplier), up to the factor multiplier, as SAC does for its temperature
        self._logarithm.grad = -violation.to(self._logarithm.dtype)
        self._optimizer.step()
        with th.no_grad():
            self._logarithm.clamp_(*self._bounds)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Its logarithm and Adam's moments, as arrays."""
        moments = self._optimizer.state.get(self._logarithm, {})
        return {
            "log_multiplier": self._logarithm.detach().cpu().numpy(),
            **{f"multiplier_optimizer.{name}": value.cpu().numpy() for name, value in moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up a state, which may be that of a learner without a multiplier."""
        if "log_multiplier" not in state:
            warn(
                f"The file was not saved by TD3C: the Lagrange multiplier starts at its initial value {float(self):g}, "
                "and the loaded policy will be the reference of the constraint."
            )
            return
        with th.no_grad():
            self._logarithm.copy_(th.from_numpy(state["log_multiplier"]))
        moments = {name: state[key] for name in MOMENTS if (key := f"multiplier_optimizer.{name}") in state}
        self._optimizer.state.clear()
        if moments:
            self._optimizer.state[self._logarithm] = {
                name: th.from_numpy(value.copy()).to("cpu" if name == "step" else self._logarithm.device)
                for name, value in moments.items()
            }
