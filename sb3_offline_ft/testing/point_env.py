"""A small environment with any spaces, and data from it."""

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.datasets import OfflineDataset

VECTOR = spaces.Box(-1.0, 1.0, (2,), np.float32)
STEP = 0.3
GOAL = 0.15


class PointEnv(gym.Env[Any, npt.NDArray[Any]]):
    """
    A point in the plane is to be moved to the origin: short episodes, some of which terminate and some of which end in the
    time limit, with observations and actions of any kind.

    The reward is minus the distance to the origin. An episode terminates near the origin and is truncated after
    ``max_steps``.

    :param observation_space: How the position is shown: a ``Box`` (of ``uint8`` with at least two dimensions: an image with a
        bright spot), ``Discrete``, ``MultiDiscrete``, ``MultiBinary``, or a ``Dict`` or ``Tuple`` of these
    :param action_space: How the point is moved: by the first two numbers of a ``Box``, each scaled from its bounds to [-1, 1]
        (one number moves both coordinates), or by the four directions of ``Discrete(4)``
    :param max_steps: Length of an episode that does not terminate
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # as in Gymnasium

    def __init__(
        self,
        observation_space: spaces.Space[Any] = VECTOR,
        action_space: spaces.Space[Any] = VECTOR,
        max_steps: int = 20,
    ) -> None:
        # Spaces have generators of their own, which environments must not share
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self.max_steps = max_steps
        self.position = np.zeros(2)
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1.0, 1.0, 2)
        self.n_steps = 0
        return encode(self.observation_space, self.position), {}

    def step(self, action: npt.NDArray[Any]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position = np.clip(self.position + STEP * self._direction(action), -1.0, 1.0)
        self.n_steps += 1
        distance = float(np.linalg.norm(self.position))
        terminated = distance < GOAL
        truncated = not terminated and self.n_steps >= self.max_steps
        return encode(self.observation_space, self.position), -distance, terminated, truncated, {}

    def _direction(self, action: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        space = self.action_space
        if isinstance(space, spaces.Box):
            if not space.contains(np.asarray(action)):
                raise ValueError(f"The action {action} is not in {space}.")
            low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
            scaled = 2.0 * (np.ravel(action) - low) / (high - low) - 1.0
            return scaled[:2] if len(scaled) > 1 else np.full(2, scaled[0])
        turn = np.pi / 2 * int(np.ravel(action)[0])
        return np.array([np.cos(turn), np.sin(turn)])


def encode(space: spaces.Space[Any], position: npt.NDArray[np.float64]) -> Any:
    """An element of a space that depends on a position alone, which is two numbers in [-1, 1]."""
    if isinstance(space, spaces.Dict):
        return {key: encode(part, position) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(encode(part, position) for part in space.spaces)
    shares = (position + 1.0) / 2.0
    if isinstance(space, spaces.Discrete):
        return space.start + np.int64(min(shares[0] * space.n, space.n - 1))
    if isinstance(space, spaces.MultiDiscrete):
        counts = space.nvec
        bins = np.resize(shares, counts.shape) * counts
        return np.minimum(bins, counts - 1).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return (np.resize(shares, space.shape) > 0.5).astype(space.dtype)
    if not isinstance(space, spaces.Box):
        raise ValueError(f"PointEnv cannot show a position in {space}: use a Box, MultiDiscrete, MultiBinary or Dict.")
    if space.dtype == np.uint8 and len(space.shape) >= 2:
        return _image(space.shape, shares)
    if space.is_bounded():
        values = space.low + np.resize(shares, space.shape) * (space.high - space.low)
    else:
        values = np.resize(position, space.shape)
    return values.astype(space.dtype)


def _image(shape: tuple[int, ...], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    channels_last = len(shape) == 3 and shape[-1] < shape[0]
    height, width = shape[:2] if channels_last else shape[-2:]
    image = np.zeros((height, width), np.uint8)
    row, column = (int(share * (size - 1)) for share, size in zip(shares, (height, width), strict=True))
    image[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4] = 255
    return np.broadcast_to(image[..., None] if channels_last else image, shape).copy()


def record(env: PointEnv, n_rows: int, seed: int = 0) -> OfflineDataset:
    """
    Log a controller that moves towards the origin, with noise; a tenth of the numbers of its actions are uniform instead.

    :param env: The environment, with a ``Box`` action space
    :param n_rows: Number of transitions; the last episode may be cut, which counts as a truncation
    :param seed: Seed of the environment and the noise
    :return: The dataset; it has no spec
    """
    space = env.action_space
    assert isinstance(space, spaces.Box)
    generator = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    observation, _ = env.reset(seed=seed)
    for _ in range(n_rows):
        wanted = np.resize(-env.position / STEP, space.shape) + 0.3 * generator.standard_normal(space.shape)
        wanted = np.where(generator.random(space.shape) < 0.1, generator.uniform(-1.0, 1.0, space.shape), wanted)
        shares = (np.clip(wanted, -1.0, 1.0) + 1.0) / 2.0
        action = np.clip((space.low + shares * (space.high - space.low)).astype(space.dtype), space.low, space.high)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, following, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else following
    return OfflineDataset.from_columns(
        *map(_stacked, zip(*rows, strict=True)),
        observation_space=env.observation_space,
        action_space=space,
        name="point",
    )


def _stacked(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _stacked([value[key] for value in values]) for key in values[0]}
    return np.stack([np.asarray(value) for value in values])
