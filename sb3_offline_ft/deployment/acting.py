"""Who acts in which environment: frozen policies in place of the learner."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.collapse import LearnerSnapshot
from sb3_offline_ft.common.io import arrays_to_text
from sb3_offline_ft.deployment.roles import Contender, Episode, Kind

STATISTICS = "obs_rms"


@dataclass
class PolicyCopy:
    """
    What a learner's policy was at a time.

    :param state: Its parameters and statistics by name
    :param statistics: Those of ``VecNormalize`` for observations, by key ("" where observations are no dictionary); None if
        observations are not normalized
    :param snapshot: The whole learner then; None if nobody needs it
    """

    state: Mapping[str, th.Tensor]
    statistics: dict[str, RunningMeanStd] | None = None
    snapshot: LearnerSnapshot | None = None

    @classmethod
    def of(cls, model: OffPolicyAlgorithm) -> "PolicyCopy":
        """Copy the learner's policy as it is now."""
        snapshot, normalize = LearnerSnapshot.take(model), _normalizer(model)
        return cls(snapshot.policy_state, None if normalize is None else _by_key(copy.deepcopy(normalize.obs_rms)), snapshot)

    @cached_property
    def text(self) -> str:
        """As a text, without the learner."""
        return arrays_to_text(self.to_arrays())

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        return all(bool(value.isfinite().all()) for value in self.state.values() if value.is_floating_point())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As arrays by name, without the learner."""
        arrays = {f"policy.{name}": value.cpu().numpy() for name, value in self.state.items()}
        for key, statistics in (self.statistics or {}).items():
            values = {"mean": statistics.mean, "var": statistics.var, "count": np.array(statistics.count)}
            arrays |= {f"{STATISTICS}.{name}.{key}": value for name, value in values.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PolicyCopy":
        """The copy that :meth:`to_arrays` was taken of."""
        state = {name.removeprefix("policy."): th.from_numpy(v.copy()) for name, v in arrays.items() if name[:7] == "policy."}
        prefix, statistics = f"{STATISTICS}.mean.", {}
        for key in (name.removeprefix(prefix) for name in arrays if name.startswith(prefix)):
            statistics[key] = RunningMeanStd()
            for name in ("mean", "var", "count"):
                setattr(statistics[key], name, arrays[f"{STATISTICS}.{name}.{key}"])
        return cls(state, statistics or None)

    def run_state(self) -> dict[str, Any]:
        """As plain values and tensors, with the learner."""
        statistics = {
            key: {"mean": one.mean, "var": one.var, "count": one.count} for key, one in (self.statistics or {}).items()
        }
        snapshot = None if self.snapshot is None else self.snapshot.state_dict()
        return {"state": dict(self.state), "statistics": statistics, "snapshot": snapshot}

    @classmethod
    def from_run_state(cls, state: dict[str, Any], device: th.device) -> "PolicyCopy":
        """The copy that :meth:`run_state` was taken of."""
        statistics = {}
        for key, values in state["statistics"].items():
            statistics[key] = RunningMeanStd()
            vars(statistics[key]).update(values)
        snapshot = None if state["snapshot"] is None else LearnerSnapshot.from_state_dict(state["snapshot"], device)
        return cls({name: value.to(device) for name, value in state["state"].items()}, statistics or None, snapshot)

    def in_learner(self, model: OffPolicyAlgorithm) -> "PolicyCopy":
        """This policy in a learner that is otherwise as it is now, which this does not change."""
        own = LearnerSnapshot.take(model)
        parameters: dict[str, Any] = {"policy": dict(self.state)}
        model.set_parameters(parameters, exact_match=False)
        snapshot = LearnerSnapshot.take(model)
        own.restore(model)
        return PolicyCopy(self.state, self.statistics, snapshot)


def _normalizer(model: OffPolicyAlgorithm) -> VecNormalize | None:
    normalize = model.get_vec_normalize_env()
    return normalize if normalize is not None and normalize.norm_obs else None


@contextmanager
def normalizing_as(model: OffPolicyAlgorithm, content: PolicyCopy) -> Iterator[VecNormalize | None]:
    """For the block, let a learner's ``VecNormalize`` normalize observations as it did for a copy; None if none does."""
    normalize = None if content.statistics is None else _normalizer(model)
    if normalize is None or content.statistics is None:
        yield None
        return
    live = normalize.obs_rms
    normalize.obs_rms = content.statistics if isinstance(live, dict) else content.statistics[""]
    try:
        yield normalize
    finally:
        normalize.obs_rms = live


def _by_key(statistics: Any) -> dict[str, RunningMeanStd]:
    return statistics if isinstance(statistics, dict) else {"": statistics}


class FrozenPolicy:
    """
    A policy that acts as a learner did at a time, whatever becomes of the learner.

    :param model: The learner, whose present policy is the first one
    """

    def __init__(self, model: OffPolicyAlgorithm, content: PolicyCopy) -> None:
        self._model = model
        with th.random.fork_rng():
            # Its first weights are drawn, and replaced
            made = type(model.policy)(**model.policy._get_constructor_parameters())
        self.policy: BasePolicy = made.to(model.device).requires_grad_(False)
        self.policy.set_training_mode(False)
        self._be(content)

    def take(self, content: PolicyCopy) -> None:
        """Be this policy from now on."""
        if content is not self._content:
            self._be(content)

    def _be(self, content: PolicyCopy) -> None:
        self.policy.load_state_dict(dict(content.state))
        self._content = content

    def predict(self, observations: Any, state: Any, episode_start: Any, deterministic: bool) -> tuple[np.ndarray, Any]:
        """As SB3's ``predict``, for observations normalized by ``VecNormalize`` as it is now, if it is there."""
        live = _normalizer(self._model)
        if live is not None:
            original = live.unnormalize_obs(observations)
            with normalizing_as(self._model, self._content):
                observations = live.normalize_obs(original)
        return self.policy.predict(observations, state, episode_start, deterministic)

    def act(self, deterministic: bool) -> np.ndarray:
        """Actions for the last observations of the learner's environments, shape ``(n_envs, action_dim)``."""
        observations: Any = self._model._last_obs
        original = cast(Any, self._model._last_original_obs)
        with normalizing_as(self._model, self._content) as normalize:
            if normalize is not None:
                observations = normalize.normalize_obs(original)
        return self.policy.predict(observations, deterministic=deterministic)[0]


class Cast:
    """
    Decides the actions in training episodes in place of a learner: which of three frozen policies acts in which environment.

    :param model: The learner
    :param champion: The champion's policy
    """

    def __init__(self, model: OffPolicyAlgorithm, champion: PolicyCopy) -> None:
        self._model = model
        assert isinstance(model.action_space, spaces.Box)
        self.action_space: spaces.Box = model.action_space
        self.policies = {role: FrozenPolicy(model, champion) for role in ("champion", "challenger", "rival")}
        self.running = [Episode() for _ in range(model.n_envs)]
        """What runs in each environment, which says who acts."""
        self.broken: set[int] = set()
        """Environments in which who is tried has chosen an action that is not finite; the champion has acted since."""

    def take(self, contenders: Mapping[str, Contender]) -> None:
        """Let the policies be those of these contenders, by their roles."""
        for role, frozen in self.policies.items():
            if role in contenders:
                frozen.take(contenders[role].policy)

    @property
    def champion(self) -> FrozenPolicy:
        """The champion's policy."""
        return self.policies["champion"]

    @property
    def explores(self) -> bool:
        """Whether exploring differs from serving: there is action noise, or the policy is a stochastic one."""
        return self._model.action_noise is not None or hasattr(getattr(self._model, "actor", None), "log_std")

    def choose(self) -> np.ndarray:
        """The actions in all environments for the learner's last observations, shape ``(n_envs, action_dim)``."""
        actions: np.ndarray = np.array(self.champion.act(deterministic=True), copy=True)
        acting = [(episode.actor, episode.role) for episode in self.running]
        for kind, role in {*acting} - {(Kind.SERVE, "champion")}:
            others = self._explore() if kind is Kind.EXPLORE else self.policies[role].act(deterministic=True)
            for place, one in enumerate(acting):
                if one != (kind, role) or place in self.broken:
                    continue
                if np.isfinite(others[place]).all():
                    actions[place] = others[place]
                else:
                    self.broken.add(place)
        return actions.clip(self.action_space.low, self.action_space.high)

    def _explore(self) -> np.ndarray:
        if self._model.use_sde:
            # The matrix that the learner has drawn for this rollout, since nobody draws one for the champion
            policies: list[Any] = [self.champion.policy, self._model.policy]
            own, drawn = (policy.actor.action_dist for policy in policies)
            own.exploration_mat, own.exploration_matrices = drawn.exploration_mat, drawn.exploration_matrices
        actions, noise = self.champion.act(deterministic=False), self._model.action_noise
        if noise is None:
            return actions
        # As SB3 does it: on actions scaled to [-1, 1]
        policy = self.champion.policy
        return policy.unscale_action(np.clip(policy.scale_action(actions) + noise(), -1, 1))

    def take_over(self) -> None:
        """Act from now on, until the learner's present run ends, however it does."""
        self._model.__class__ = _acted_for(_own_class(self._model), self, self._model.start_time)

    def leave(self) -> None:
        """Let the learner act itself again."""
        self._model.__class__ = _own_class(self._model)


def _own_class(model: OffPolicyAlgorithm) -> type[OffPolicyAlgorithm]:
    own: type[OffPolicyAlgorithm] = getattr(type(model), "_own_class", type(model))
    return own


def _acted_for(own: type[OffPolicyAlgorithm], cast: Cast, run: float) -> type[OffPolicyAlgorithm]:
    """The class of a learner for which others act; an attribute of the learner itself would be saved with it."""

    def _sample_action(self: Any, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        # After an interrupt nobody puts the class back
        if self.start_time != run:
            self.__class__ = own
            return own._sample_action(self, *args, **kwargs)
        actions = cast.choose()
        return actions, self.policy.scale_action(actions)

    return type(own.__name__, (own,), {"_sample_action": _sample_action, "_own_class": own, "__module__": own.__module__})
