"""Who acts in training episodes: the learner or the average of its policy, a guide, or another policy in its place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.td3.policies import Actor, TD3Policy

from sb3_offline_ft.common.type_aliases import Schedule
from sb3_offline_ft.policies.averaging import LearnedWeights
from sb3_offline_ft.policies.frozen import frozen_actor, tensors_to_arrays, weights_from_arrays, weights_to_arrays
from sb3_offline_ft.policies.guide import PRETRAINED, GuideLike, find_guide, guide_actions

if TYPE_CHECKING:
    from sb3_offline_ft.offline_td3.learner import OfflineLearner

GUIDE_PREFIX = "guide_actor."
LEARNED_PREFIX = "learned_actor."


class Acting:
    """
    Who acts in training episodes.

    :param learner: The learner
    :param guide_policy: What :func:`sb3_offline_ft.policies.guide.check_guide` returned, and
    :param guide_steps: the schedule of the steps at the start of each episode that the guide acts
    """

    def __init__(self, learner: "OfflineLearner", guide_policy: GuideLike, guide_steps: Schedule) -> None:
        self._learner, self._guide_policy, self._guide_steps = learner, guide_policy, guide_steps
        self.guide: BaseAlgorithm | BasePolicy | None = None
        self.substitute: BaseAlgorithm | BasePolicy | None = None
        """Acts in place of the learner; not saved."""
        self.learned_weights: LearnedWeights | None = None
        """What gradient steps change, where the policy is the average of it."""
        self.episode_steps = np.zeros(0, dtype=int)
        """How far the current episodes are, shape ``(n_envs,)``."""

    @property
    def _policy(self) -> TD3Policy:
        # Looked up, since it may be replaced
        return self._learner.policy

    def prepare(self) -> None:
        """Find the guide, before anything else is done, so that one that cannot be used costs no time."""
        learner = self._learner
        if self._guide_policy is None:
            self.guide = None
        elif self._guide_policy != PRETRAINED:
            assert isinstance(learner.action_space, spaces.Box)
            self.guide = find_guide(self._guide_policy, learner.observation_space, learner.action_space, learner.device)
        elif not learner.has_trained_weights and learner.remaining_offline_steps == 0:
            raise ValueError(
                "`guide_policy='pretrained'` needs a pretrained policy, and this one has not been trained: pretrain it with "
                "`offline_steps` or `pretrain()`, or give another guide."
            )

    def begin_run(self, averages: bool) -> None:
        """Begin a finetuning run with the policy as it is; what acts may be the average of what gradient steps make of it."""
        if self._guide_policy == PRETRAINED:
            self.guide = frozen_actor(self._policy)
        self.learned_weights = LearnedWeights(self._policy.actor) if averages else None

    def count_steps(self, dones: np.ndarray) -> None:
        """Tell which episodes ended in the last step, shape ``(n_envs,)``."""
        self.episode_steps = np.where(dones, 0, self.episode_steps + 1)

    def others(self, progress_remaining: float) -> tuple[np.ndarray, np.ndarray] | None:
        """
        :param progress_remaining: Progress of the run, from 1 to 0
        :return: Where others than the learner act now, shape ``(n_envs,)``, and their actions, scaled to [-1, 1], shape
            ``(n_envs, *action_shape)``; None if nowhere
        """
        learner, acting = self._learner, np.zeros(len(self.episode_steps), dtype=bool)
        actions = np.zeros((len(acting), *(learner.action_space.shape or ())), dtype=learner.action_space.dtype)
        guided = acting
        if self._guide_policy is not None:
            guided = self.episode_steps < self._guide_steps(progress_remaining)
            learner.logger.record_mean("rollout/guide_share", float(guided.mean()))
            if guided.any() and self.guide is None:
                # The run went on with another guide than it was saved with
                self.guide = frozen_actor(self._policy)
        for where, other in ((~acting, self.substitute), (guided, self.guide)):
            if other is not None and where.any():
                assert learner._last_obs is not None
                actions[where] = self._policy.scale_action(guide_actions(other, learner._last_obs))[where]
                acting = acting | where
        return (acting, actions) if acting.any() else None

    def state_dict(self) -> dict[str, np.ndarray]:
        """As arrays, the guide if it is a copy of the policy, and what gradient steps change."""
        state: dict[str, np.ndarray] = {}
        if self._guide_policy == PRETRAINED and isinstance(self.guide, Actor):
            state |= weights_to_arrays(self.guide, GUIDE_PREFIX)
        if self.learned_weights is not None:
            state |= tensors_to_arrays(self.learned_weights.values, LEARNED_PREFIX)
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up a state, perhaps that of another learner."""
        guide, learned = weights_from_arrays(state, GUIDE_PREFIX), weights_from_arrays(state, LEARNED_PREFIX)
        if self._guide_policy == PRETRAINED:
            self.guide = frozen_actor(self._policy) if guide else None
            if self.guide is not None:
                self.guide.load_state_dict(guide)
        self.learned_weights = LearnedWeights(self._policy.actor) if learned else None
        if self.learned_weights is not None:
            self.learned_weights.load(learned)
