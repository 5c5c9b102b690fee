"""The Lagrange multiplier of a constraint."""

import math
from collections.abc import Mapping

import numpy as np
import torch as th

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
    """

    def __init__(
        self, initial: float, learning_rate: float, least: float, largest: float, device: th.device | str = "cpu"
    ) -> None:
        self._logarithm = th.tensor(math.log(initial), dtype=th.float64, device=device, requires_grad=True)
        self._optimizer = th.optim.Adam([self._logarithm], lr=learning_rate)
        self._bounds = math.log(least), math.log(largest)

    @property
    def value(self) -> th.Tensor:
        """Its value, a float64 scalar without gradient."""
        return self._logarithm.detach().exp()

    def __float__(self) -> float:
        return math.exp(self._logarithm.item())

    def step(self, violation: th.Tensor) -> None:
        """
        Take one step.

        :param violation: By how much the constraint is violated, a scalar; negative if it is not
        """
        # The dual's gradient with respect to log(multiplier), up to the factor multiplier, as SAC does for its temperature
        self._logarithm.grad = -violation.to(self._logarithm.dtype)
        self._optimizer.step()
        with th.no_grad():
            self._logarithm.clamp_(*self._bounds)

    def state_dict(self) -> dict[str, np.ndarray]:
        """
        :return: Its logarithm and Adam's moments, as arrays
        """
        moments = self._optimizer.state.get(self._logarithm, {})
        return {
            "log_multiplier": self._logarithm.detach().cpu().numpy(),
            **{f"multiplier_optimizer.{name}": value.cpu().numpy() for name, value in moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """
        :param state: What :meth:`state_dict` returned; without a multiplier in it nothing is changed
        """
        if "log_multiplier" not in state:
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
