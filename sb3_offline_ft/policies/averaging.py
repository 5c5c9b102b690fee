"""A policy that is the average of what gradient steps have made of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch as th
from stable_baselines3.td3.policies import Actor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class LearnedWeights:
    """
    The weights that gradient steps change, beside an actor whose own are their exponential moving average.

    The average acts, is evaluated, and is the policy that others find in a saved model. Losses, the optimizer's step and the
    target policy, which follows, see these weights. Models and snapshots keep both. Batch normalization's statistics are not
    averaged.

    :param actor: The actor; the weights start from its own
    """

    def __init__(self, actor: Actor) -> None:
        self.values = {name: parameter.detach().clone() for name, parameter in actor.named_parameters()}
        self.average: dict[str, th.Tensor] = {}
        """What acts, by name, for the duration of :meth:`in_place`; else empty, as the actor has it."""
        self._is_undone = False
        self._afterwards: Callable[[], None] | None = None

    def load(self, values: Mapping[str, th.Tensor]) -> None:
        """Take over weights by name."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_place(self, actor: Actor, decay: float) -> Iterator[None]:
        """
        For the duration of the block, in which one gradient step is done, the actor has these weights; then it has the new
        average, unless :meth:`undo_step` has been called.

        :param actor: The actor
        :param decay: Weight of the past in the average, in [0, 1)
        """
        # Read anew, since their memory may have been moved
        parameters = [parameter.detach() for parameter in actor.parameters()]
        learned = list(self.values.values())
        averages = [parameter.clone() for parameter in parameters]
        _copy(learned, parameters)
        self.average = dict(zip(self.values, averages, strict=True))
        self._is_undone, self._afterwards = False, None
        try:
            yield
            if not self._is_undone:
                _copy(parameters, learned)
                get_ema_multi_avg_fn(decay)(averages, parameters, None)  # type: ignore[no-untyped-call]
        finally:
            self.average = {}
            _copy(averages, parameters)
        if self._afterwards is not None:
            self._afterwards()

    def undo_step(self, actor: Actor) -> None:
        """
        Within :meth:`in_place`, after the step: these weights stay what they were, and the average is what the actor has now.
        """
        self._is_undone = True
        parameters = [parameter.detach() for parameter in actor.parameters()]
        _copy(parameters, list(self.average.values()))
        _copy(list(self.values.values()), parameters)

    def call_afterwards(self, act: Callable[[], None]) -> None:
        """Have something called once at the end of the present :meth:`in_place`, when the actor has the new average."""
        self._afterwards = act


def _copy(sources: list[th.Tensor], targets: list[th.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
