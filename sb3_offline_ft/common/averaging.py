"""A policy that is the average of what gradient steps have made of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch as th
from stable_baselines3.td3.policies import Actor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class LearnedWeights:
    """
    The weights that gradient steps change, beside an actor whose own are their exponential moving average.

    Everybody but the optimizer sees the average: it acts, is evaluated, saved and rolled back. Batch normalization's
    statistics are not averaged.

    :param actor: The actor; the weights start from its own
    """

    def __init__(self, actor: Actor) -> None:
        self.values = {name: parameter.detach().clone() for name, parameter in actor.named_parameters()}

    def load(self, values: Mapping[str, th.Tensor]) -> None:
        """
        :param values: New weights by name
        """
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_place(self, actor: Actor, decay: float) -> Iterator[None]:
        """
        For the duration of the block, in which one gradient step is done, the actor has these weights; then it has the new
        average.

        :param actor: The actor
        :param decay: Weight of the past in the average, in [0, 1)
        """
        # Read anew, since their memory may have been moved
        parameters = [parameter.detach() for parameter in actor.parameters()]
        learned = list(self.values.values())
        averages = [parameter.clone() for parameter in parameters]
        _copy(learned, parameters)
        try:
            yield
            _copy(parameters, learned)
            get_ema_multi_avg_fn(decay)(averages, parameters, None)  # type: ignore[no-untyped-call]
        finally:
            _copy(averages, parameters)


def _copy(sources: list[th.Tensor], targets: list[th.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
