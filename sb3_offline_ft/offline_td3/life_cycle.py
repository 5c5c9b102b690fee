"""Where a learner is between its first offline gradient step and its finetuning, in plain numbers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Phase(Enum):
    """What a learner does at present, or did in its last step."""

    NEW = "new"
    """Nothing has been trained, and it has not acted."""
    PRETRAINING = "pretraining"
    """Gradient steps on logged data alone."""
    PRETRAINED = "pretrained"
    """It has trained weights, and has not acted."""
    WARMUP = "warm-up"
    """The policy acts and nothing is updated: at the start of a finetuning run, or later on request."""
    CRITIC_WARMUP = "critic warm-up"
    """The policy acts and only the critics are updated."""
    FINETUNING = "finetuning"
    ONLINE_ONLY = "online only"
    """With neither data nor pretrained weights it trains like Stable-Baselines3's TD3."""


SAVED_AS = {
    "offline_steps_done": "offline_steps_done",
    "_pretrained": "is_pretrained",
    "_offline_finished": "offline_is_finished",
    "_went_online": "went_online",
    "_finetuning": "is_finetuning",
    "_warmup_end": "first_warmup_end",
    "_later_warmup_end": "later_warmup_end",
    "_critic_warmup_end": "critic_warmup_end",
    "_constrained": "is_constrained",
}
"""Names in saved models and snapshots."""
PROGRESS = ("offline_steps_done", "_warmup_end", "_later_warmup_end")
"""Those that count what was done and what is to come in the environment; the others say how updates are done."""


@dataclass
class LifeCycle:
    """
    The position of a learner in its life cycle. Environment steps are counted as by ``num_timesteps``.

    :param offline_steps_done: Offline gradient steps so far
    :param is_pretrained: Whether the weights count as trained, whatever the number of updates
    :param offline_is_finished: Whether no offline steps are left to do, whatever their number
    :param went_online: Whether a run has begun to act
    :param is_finetuning: Whether that run has data or began with trained weights
    :param first_warmup_end: Environment steps until which its policy is not updated at all
    :param later_warmup_end: The same for a later pause of the updates
    :param critic_warmup_end: Gradient steps until which only the critics are updated
    :param is_constrained: Whether an algorithm that can do so holds the policy of that run near another
    :param environment_steps: While pretraining, where ``num_timesteps`` counts gradient steps, the environment's; else None
    """

    offline_steps_done: int = 0
    is_pretrained: bool = False
    offline_is_finished: bool = False
    went_online: bool = False
    is_finetuning: bool = False
    first_warmup_end: int = 0
    later_warmup_end: int = 0
    critic_warmup_end: int = 0
    is_constrained: bool = False
    environment_steps: int | None = None

    def phase(self, num_timesteps: int, n_updates: int) -> Phase:
        """The phase after so many steps of the environment and gradient steps."""
        if self.is_pretraining:
            return Phase.PRETRAINING
        if not self.went_online:
            return Phase.PRETRAINED if self.has_trained_weights(n_updates) else Phase.NEW
        if 0 < self.frozen_until >= num_timesteps:
            return Phase.WARMUP
        if not self.is_finetuning:
            return Phase.ONLINE_ONLY
        return Phase.CRITIC_WARMUP if n_updates < self.critic_warmup_end else Phase.FINETUNING

    @property
    def is_pretraining(self) -> bool:
        """Whether updates are offline ones now."""
        return self.environment_steps is not None

    @property
    def is_plain_td3(self) -> bool:
        """Whether an update is one of TD3 itself, as there is nothing that an algorithm for logged data could hold on to."""
        return not (self.is_pretraining or self.is_finetuning)

    @property
    def frozen_until(self) -> int:
        """Environment steps until which nothing is updated, in the first warm-up or in a later one."""
        return max(self.first_warmup_end, self.later_warmup_end)

    def has_trained_weights(self, n_updates: int) -> bool:
        """Whether the weights are worth keeping after so many gradient steps."""
        return self.is_pretrained or n_updates > 0

    @contextmanager
    def pretraining(self, num_timesteps: int = 0) -> Iterator[None]:
        """For the duration of the block, after so many steps of the environment, updates are offline ones."""
        self.environment_steps = num_timesteps
        try:
            yield
        finally:
            self.environment_steps = None

    def begin_run(self, num_timesteps: int, n_updates: int, has_data: bool, warmup_steps: int, critic_steps: int) -> bool:
        """Begin a run, with both warm-ups if the weights are trained ones, and return whether they are."""
        is_trained = self.has_trained_weights(n_updates)
        self.went_online = self.offline_is_finished = True
        self.is_finetuning = is_trained or has_data
        self.first_warmup_end = num_timesteps + (warmup_steps if is_trained else 0)
        self.later_warmup_end = 0
        self.critic_warmup_end = n_updates + (critic_steps if is_trained else 0)
        return is_trained

    def begin_warmup(self, num_timesteps: int, steps: int) -> None:
        """Pause the updates for so many steps; within the first warm-up, which is kept apart, this can only prolong it."""
        name = "first_warmup_end" if num_timesteps <= self.first_warmup_end else "later_warmup_end"
        setattr(self, name, max(getattr(self, name), num_timesteps + steps))

    def state_dict(self) -> dict[str, Any]:
        """What is saved, by the names that files have."""
        return {saved: getattr(self, name) for saved, name in SAVED_AS.items()}

    def position(self) -> dict[str, Any]:
        """The part of it that says how updates are done."""
        return {saved: value for saved, value in self.state_dict().items() if saved not in PROGRESS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` or :meth:`position` returned; other names are ignored."""
        for saved, name in SAVED_AS.items():
            if saved in state:
                setattr(self, name, state[saved])
