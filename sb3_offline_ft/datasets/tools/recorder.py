"""Episodes of an environment, recorded as the environment itself saw them."""

from typing import Any

import gymnasium as gym
import numpy as np
from minari.data_collector import EpisodeBuffer
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft.common.observations import map_observations
from sb3_offline_ft.common.seeding import derive_seed


class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """
    Records the episodes of an environment, and seeds each of them.

    Used as the innermost wrapper it sees what the environment itself sees, whatever wrappers the agent needs around it. Where
    an episode ends it is told (:meth:`end`), as those wrappers may end episodes, or let them go on.
    Minari's ``DataCollector`` needs jax, and draws its seeds from the operating system whenever a vectorised environment
    resets itself.

    :param env: The environment; a ``Monitor`` around it is taken off, as the spec of one with it cannot be recovered
    :param seed: The number that the seeds of the episodes are derived from
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int = 0) -> None:
        super().__init__(env.env if isinstance(env, Monitor) else env)
        self.seed = seed
        self.n_resets = self.n_steps = self.n_ended = 0
        self.complete: list[EpisodeBuffer] = []
        self._begin([], None)

    def _begin(self, observations: list[Any], seed: int | None) -> None:
        self._observations, self._episode_seed = observations, seed
        self._actions: list[Any] = []
        self._rewards: list[float] = []
        self._has_terminated = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a recorded episode; its seed is derived from the recorder's, not from ``seed``. A running one is ended."""
        self.end(self._has_terminated)
        episode_seed = derive_seed(self.seed, self.n_resets)
        self.n_resets += 1
        observation, info = self.env.reset(seed=episode_seed, options=options)
        # Environments may change the array that they returned
        self._begin([map_observations(np.array, observation)], episode_seed)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Record a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(np.array(action))
        self._rewards.append(float(reward))
        self._observations.append(map_observations(np.array, observation))
        self.n_steps += 1
        self._has_terminated = bool(terminated)
        return observation, reward, bool(terminated), bool(truncated), info

    def end(self, terminated: bool) -> None:
        """End the running episode here, if it has steps. Without a reset the next one begins at its last observation."""
        length = len(self._rewards)
        if not length:
            return
        self.n_ended += 1
        terminations, truncations = np.zeros((2, length), np.bool_)
        terminations[-1], truncations[-1] = terminated, not terminated
        self.complete.append(
            EpisodeBuffer(
                seed=self._episode_seed,
                observations=map_observations(lambda *steps: np.stack(steps), *self._observations),
                actions=np.stack(self._actions),
                rewards=np.array(self._rewards),
                terminations=terminations,
                truncations=truncations,
            )
        )
        self._begin(self._observations[-1:], None)


class EpisodeEnds(gym.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper: it tells the recorder where episodes end for the agent."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.recorder = recorder_in(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.recorder.end(bool(terminated))
        return observation, reward, bool(terminated), bool(truncated), info


def recorder_in(env: Any) -> EpisodeRecorder:
    """The recorder below the wrappers of an environment."""
    while not isinstance(env, EpisodeRecorder):
        env = env.env
    return env
