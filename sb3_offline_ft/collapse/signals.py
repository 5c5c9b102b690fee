"""Signs of a collapse beside the returns: signals measured on transitions of the replay buffer, and non-finite numbers."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.learner import PolicyState, policy_network
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.common.warning import warn

SATURATED = 0.99
"""Scaled actions beyond this are counted as saturated."""

LEAST_ROWS = 2
LOSSES = ("train/critic_loss", "train/actor_loss", "train/loss")

Observations = th.Tensor | dict[str, th.Tensor]


def draw_rows(buffer: ReplayBuffer, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows and environments, each of shape ``(n,)``, of transitions of a replay buffer, drawn uniformly; ``buffer.sample`` would
    draw from NumPy's global generator.
    """
    # The newest next observation has overwritten the oldest observation
    if buffer.optimize_memory_usage and buffer.full:
        rows = (buffer.pos + generator.integers(1, buffer.buffer_size, size=n)) % buffer.buffer_size
    else:
        rows = generator.integers(0, buffer.size(), size=n)
    return rows, generator.integers(0, buffer.n_envs, size=n)


def observations_at(model: OffPolicyAlgorithm, rows: np.ndarray, columns: np.ndarray, following: bool = False) -> Observations:
    """Observations of the replay buffer, or the ones that follow them, as the policy sees them."""
    buffer = model.replay_buffer
    assert buffer is not None
    vec_normalize = model.get_vec_normalize_env()
    if following and buffer.optimize_memory_usage:
        stored, rows = buffer.observations, (rows + 1) % buffer.buffer_size
    else:
        stored = buffer.next_observations if following else buffer.observations
    if isinstance(stored, dict):
        chosen = {key: value[rows, columns] for key, value in stored.items()}
        normalized: Any = buffer._normalize_obs(chosen, vec_normalize)
        return {key: buffer.to_torch(value) for key, value in normalized.items()}
    return buffer.to_torch(np.asarray(buffer._normalize_obs(stored[rows, columns], vec_normalize)))


@th.no_grad()
def greedy_actions(model: OffPolicyAlgorithm, observations: Observations, state: PolicyState | None = None) -> th.Tensor:
    """
    The policy's actions without exploration, with the parameters ``state`` or its own, in evaluation mode: scaled to [-1, 1],
    shape ``(n, action_dim)``, or numbers of discrete ones, shape ``(n,)``.
    """
    policy = model.policy
    if state is None:
        return policy._predict(observations, deterministic=True)
    # Of modules that actor and critic share, the state dict has several names, and a functional call takes one
    names = [name for name, _ in (*policy.named_parameters(), *policy.named_buffers())]
    chosen = {name: state[name] for name in names}
    arguments = {"deterministic": True}
    return cast(th.Tensor, th.func.functional_call(policy, chosen, (observations,), arguments, tie_weights=False))


def policy_distance(actions: th.Tensor, others: th.Tensor) -> float:
    """
    How far two policies are apart, by their actions on the same observations: mean squared difference over states and
    dimensions of continuous actions in [-1, 1]; share of states in which discrete ones differ.
    """
    if actions.is_floating_point():
        return float((actions - others).pow(2).mean())
    return float((actions != others).double().mean())


@th.no_grad()
def q_values(model: OffPolicyAlgorithm, observations: Observations, actions: th.Tensor, target: bool = False) -> th.Tensor:
    """
    Values, shape ``(n,)``, of actions by the learner's critic, or by its target where there is one, in evaluation mode:
    minimum over critics, mean over quantiles.
    """
    policy: Any = model.policy
    if hasattr(policy, "critic"):
        critic = getattr(policy, "critic_target", policy.critic) if target else policy.critic
        values: Any = critic(observations, actions)
        if isinstance(values, tuple | list):
            values = th.cat(list(values), dim=1)
        else:
            # TQC: batch, critics, quantiles
            values = values.mean(dim=2)
        return cast(th.Tensor, values.min(dim=1).values)
    name = "quantile_net" if hasattr(policy, "quantile_net") else "q_net"
    values = getattr(policy, f"{name}_target" if target else name)(observations)
    values = values.mean(dim=1) if name == "quantile_net" else values
    return cast(th.Tensor, values.gather(1, actions.reshape(-1, 1).long()).squeeze(1))


class SignalMonitor:
    """
    Measures heuristic signs of a collapse that is under way.

    None has an error rate: they are logged for diagnosis, and raise alarms only where a limit is asked for. The growth of
    ``log10 mean|Q|`` is the sign that Bu et al. 2026 (arXiv 2609.32819) found to come before failures of SAC and TD3.

    :param model: The learner
    :param batch_size: Number of transitions that each measurement uses
    :param window: Number of measurements for the slope of ``log10 mean|Q|``
    :param seed: Seed of the choice of transitions
    """

    NAMES = ("log_mean_abs_q", "log_mean_abs_q_slope", "td_error", "policy_shift", "action_saturation")

    def __init__(self, model: OffPolicyAlgorithm, batch_size: int = 256, window: int = 10, seed: int = 0) -> None:
        self._model = model
        self._batch_size = batch_size
        self._generator = np.random.default_rng(seed)
        self._log_q: deque[tuple[int, float]] = deque(maxlen=window)
        self.n_asked = 0
        self.n_measured = 0

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        counts = {"n_asked": self.n_asked, "n_measured": self.n_measured}
        return {"generator": self._generator.bit_generator.state, "log_q": list(self._log_q), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._generator.bit_generator.state = state["generator"]
        self._log_q = deque(state["log_q"], self._log_q.maxlen)
        self.n_asked, self.n_measured = state["n_asked"], state["n_measured"]

    @property
    def names(self) -> tuple[str, ...]:
        """The signals that there are for this learner."""
        continuous = isinstance(self._model.action_space, spaces.Box)
        return tuple(name for name in self.NAMES if continuous or name != "action_saturation")

    def reset(self) -> None:
        """Forget the measurements of the past, such as after a rollback."""
        self._log_q.clear()

    @th.no_grad()
    def measure(self, policy_state: PolicyState | None = None) -> dict[str, float]:
        """
        Measure all signals now.

        :param policy_state: Parameters of the policy from which the shift is measured
        :return: By name: ``log_mean_abs_q`` (base 10), ``log_mean_abs_q_slope`` (per 1,000 environment steps; after two
            measurements), ``td_error`` (mean absolute one-step error in units of reward), ``policy_shift``
            (:func:`policy_distance`) and ``action_saturation`` (share of actions at their bounds; continuous actions only);
            empty as long as the replay buffer has less than two rows
        """
        model, buffer = self._model, self._model.replay_buffer
        self.n_asked += 1
        if buffer is None or buffer.size() < LEAST_ROWS:
            self._warn_if_never_more(buffer)
            return {}
        self.n_measured += 1
        rows, columns = draw_rows(buffer, self._batch_size, self._generator)
        training = model.policy.training
        model.policy.set_training_mode(False)
        try:
            observations = observations_at(model, rows, columns)
            actions = greedy_actions(model, observations)
            values = q_values(model, observations, actions)
            signals = {"log_mean_abs_q": float(values.abs().mean().clamp_min(1e-30).log10())}
            self._log_q.append((model.num_timesteps, signals["log_mean_abs_q"]))
            if len(self._log_q) > 1 and np.isfinite(self._log_q).all() and self._log_q[0][0] != self._log_q[-1][0]:
                steps, logarithms = np.array(self._log_q).T
                signals["log_mean_abs_q_slope"] = float(np.polyfit(steps / 1000, logarithms, 1)[0])
            signals["td_error"] = self._td_error(buffer, rows, columns, observations)
            if policy_state is not None:
                signals["policy_shift"] = policy_distance(actions, greedy_actions(model, observations, policy_state))
            if "action_saturation" in self.names:
                signals["action_saturation"] = float((actions.abs() > SATURATED).double().mean())
        finally:
            model.policy.set_training_mode(training)
        return signals

    def _warn_if_never_more(self, buffer: ReplayBuffer | None) -> None:
        if self.n_asked == 1 and (buffer is None or buffer.buffer_size < LEAST_ROWS):
            rows = 0 if buffer is None else buffer.buffer_size
            warn(
                f"Signals of collapse cannot be measured: they need {LEAST_ROWS} rows of the replay buffer, which can hold "
                f"{rows}. Use a larger `buffer_size`."
            )

    def _td_error(self, buffer: ReplayBuffer, rows: np.ndarray, columns: np.ndarray, observations: Observations) -> float:
        model = self._model
        rewards = buffer._normalize_reward(buffer.rewards[rows, columns], model.get_vec_normalize_env())
        following = observations_at(model, rows, columns, following=True)
        next_values = q_values(model, following, greedy_actions(model, following), target=True)
        ended = buffer.dones[rows, columns] * (1 - buffer.timeouts[rows, columns])
        targets = buffer.to_torch(rewards) + model.gamma * (1 - buffer.to_torch(ended)) * next_values
        return float((targets - q_values(model, observations, buffer.to_torch(buffer.actions[rows, columns]))).abs().mean())


def check_limits(limits: Mapping[str, float], model: OffPolicyAlgorithm | None = None) -> None:
    """``ValueError`` if a limit is of no signal, of none that there is for a learner, or no finite number."""
    for name, limit in sorted(limits.items()):
        if name not in SignalMonitor.NAMES:
            raise ValueError(f"Unknown signal {name!r} in `secondary_alarms`. {suggestion(name, SignalMonitor.NAMES)}")
        if not isinstance(limit, int | float) or not math.isfinite(limit):
            raise ValueError(f"The limit of {name!r} in `secondary_alarms` must be a finite number, found {limit!r}.")
        if model is not None and name not in SignalMonitor(model).names:
            raise ValueError(
                f"`secondary_alarms` has a limit for `{name}`, which {type(model).__name__} does not have with the action "
                f"space {model.action_space}: leave it out."
            )


class NonFiniteNumbers:
    """Looks for them in updates and steps."""

    def __init__(self, model: OffPolicyAlgorithm) -> None:
        self._model = model
        _, self._policy, _ = policy_network(model)
        self._checked_updates = model._n_updates
        self._observation_was_broken = False

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"checked_updates": self._checked_updates, "observation_was_broken": self._observation_was_broken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._checked_updates = state["checked_updates"]
        self._observation_was_broken = state["observation_was_broken"]

    def go_on(self) -> None:
        """Begin another call of ``learn``."""
        self._observation_was_broken = False

    def in_updates(self) -> str | None:
        """What the updates since the last look have made not finite."""
        for name in LOSSES:
            value = self._model.logger.name_to_value.get(name)
            if value is not None and not math.isfinite(value):
                return f"non-finite {name.removeprefix('train/').replace('_', ' ')}"
        if self._model._n_updates != self._checked_updates:
            self._checked_updates = self._model._n_updates
            sums = [parameter.detach().sum() for parameter in self._policy.parameters()]
            if not th.stack(sums).isfinite().all():
                return "non-finite policy parameter"
        return None

    def forget_updates(self) -> None:
        """What is not finite now shall not raise the alarm again."""
        self._checked_updates, logger = self._model._n_updates, self._model.logger
        for name in LOSSES:
            logger.name_to_value.pop(name, None)
            logger.name_to_excluded.pop(name, None)
            logger.name_to_count.pop(name, None)

    def in_step(self, step: Mapping[str, Any], rewards: np.ndarray) -> Literal["environment", "policy"] | None:
        """Who gave what is not finite in a step; an action after a broken observation is not the policy's fault."""
        ended = np.flatnonzero(step["dones"])
        observations = [step["new_obs"], *(step["infos"][index].get("terminal_observation") for index in ended)]
        parts: list[np.ndarray] = [rewards]
        for one in observations:
            parts += [] if one is None else list(one.values()) if isinstance(one, dict) else [one]
        # A sum is finite only if all its terms are
        environment_is_fine = all(math.isfinite(part.sum()) for part in parts)
        action_is_finite = math.isfinite(step["actions"].sum())
        blameless, self._observation_was_broken = self._observation_was_broken, not environment_is_fine
        if environment_is_fine and action_is_finite:
            return None
        return "environment" if action_is_finite or blameless else "policy"
