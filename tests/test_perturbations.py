"""Each perturbation is what it says, and the next nominal episode is as if it had never been."""

import math
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium import spaces
from scipy import stats

from sb3_offline_ft.evaluation.robustness import PERTURBATIONS, find_perturbation
from sb3_offline_ft.evaluation.robustness.perturbations import Conditions, possible
from sb3_offline_ft.testing import PointEnv

HOPPER, PENDULUM = "Hopper-v5", "Pendulum-v1"


class Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Notes what the environment itself gets and gives."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self.actions, self.observations = list[Any](), [observation]
        return observation, info

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.actions.append(np.array(action))
        self.observations.append(result[0])
        return result


def conditions(env: gym.Env[Any, Any], seed: int = 0, spread: float = 1.0) -> Conditions:
    space = env.observation_space
    if isinstance(space, spaces.Dict):
        return Conditions(seed, {key: np.full(part.shape, spread) for key, part in space.spaces.items()})
    return Conditions(seed, np.full(space.shape, spread))


def applied(env: gym.Env[Any, Any], name: str, level: float, **options: Any) -> Any:
    return find_perturbation(name, env).applied(env, level, conditions(env, **options))


def play(env: gym.Env[Any, Any], actions: Any, seed: int = 3) -> np.ndarray:
    """The observations of an episode, the first included."""
    seen = [env.reset(seed=seed)[0]]
    for action in actions:
        observation, _, ended, _, _ = env.step(action)
        seen.append(observation)
        if ended:
            break
    return np.array(seen)


def some_actions(env: gym.Env[Any, Any], n: int) -> np.ndarray:
    space = env.action_space
    assert isinstance(space, spaces.Box)
    return np.random.default_rng(1).uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    found = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    copied = {name: value.copy() for name, value in found.items() if isinstance(value, np.ndarray)}
    return copied | {"gravity": model.opt.gravity.copy()}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mass", ["body_mass", "body_inertia", "body_subtreemass"]),
        ("friction", ["geom_friction"]),
        ("gravity", ["gravity"]),
        ("damping", ["dof_damping"]),
        ("actuator_gain", ["actuator_gainprm"]),
    ],
)
def test_numbers_of_mujocos_model(name: str, fields: list[str]) -> None:
    env = gym.make(HOPPER)
    model = env.unwrapped.model  # type: ignore[attr-defined]
    before, actions = arrays_of(model), some_actions(env, 15)
    nominal = play(env, actions)
    with applied(env, name, 1.2) as changed:
        for field in fields:
            now = arrays_of(model)[field]
            np.testing.assert_allclose(now, 1.2 * before[field])
            assert now.any()
        other = play(changed, actions)
        # The last two are at first the same in the air, and without friction
        length = min(len(nominal), len(other))
        assert not np.array_equal(other[:length], nominal[:length])
    assert all(np.array_equal(value, before[field]) for field, value in arrays_of(model).items())
    np.testing.assert_array_equal(play(env, actions), nominal)
    np.testing.assert_array_equal(play(gym.make(HOPPER), actions), nominal)


def test_an_error_in_the_block_leaves_nothing_behind() -> None:
    env = gym.make(HOPPER)
    before = arrays_of(env.unwrapped.model)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="stop"), applied(env, "mass", 2.0):
        raise RuntimeError("stop")
    now = arrays_of(env.unwrapped.model)  # type: ignore[attr-defined]
    assert all(np.array_equal(value, before[name]) for name, value in now.items())


def test_what_is_lifted_weighs_more() -> None:
    """The force that MuJoCo needs to hold all joints against gravity is 1.2 times as large."""
    env = gym.make(HOPPER)
    model = env.unwrapped.model  # type: ignore[attr-defined]

    def holding() -> np.ndarray:
        data = mujoco.MjData(model)
        mujoco.mj_resetData(model, data)
        data.qpos[1], data.qacc[:] = 3.0, 0.0
        mujoco.mj_inverse(model, data)
        return data.qfrc_inverse.copy()

    before = holding()
    with applied(env, "mass", 1.2):
        np.testing.assert_allclose(holding(), 1.2 * before, atol=1e-9)
    with applied(env, "gravity", 0.5):
        np.testing.assert_allclose(holding(), 0.5 * before, atol=1e-9)


@pytest.mark.parametrize(("name", "symbol"), [("mass", "m"), ("gravity", "g"), ("length", "l"), ("max_torque", "torque")])
def test_numbers_of_the_pendulum(name: str, symbol: str) -> None:
    env, level = gym.make(PENDULUM), 0.8
    numbers = {"m": 1.0, "g": 10.0, "l": 1.0, "torque": 2.0}
    nominal = play(env, [np.array([2.0], np.float32)] * 3)
    with applied(env, name, level) as changed:
        (first, second) = play(changed, [np.array([2.0], np.float32)])
    of = numbers | {symbol: level * numbers[symbol]}
    acceleration = 1.5 * of["g"] / of["l"] * first[1] + 3 / (of["m"] * of["l"] ** 2) * of["torque"]
    assert second[2] == pytest.approx(first[2] + 0.05 * acceleration, rel=1e-5)
    np.testing.assert_array_equal(play(env, [np.array([2.0], np.float32)] * 3), nominal)


def test_any_number_of_any_environment() -> None:
    env: Any = gym.make("MountainCarContinuous-v0")
    power = env.unwrapped.power
    with applied(env, "attribute.power", 1.5):
        assert env.unwrapped.power == 1.5 * power
    assert env.unwrapped.power == power


def test_wind_pushes_with_its_share_of_the_weight() -> None:
    env: Any = gym.make(HOPPER)
    data, weight = env.unwrapped.data, 9.81 * env.unwrapped.model.body_mass.sum()
    actions = np.zeros((6, 3), np.float32)
    nominal = play(env, actions)
    with applied(env, "wind", -0.1) as windy:
        windy.reset(seed=3)
        for action in actions:
            windy.step(action)
            assert data.xfrc_applied[1].tolist() == [pytest.approx(-0.1 * weight), 0, 0, 0, 0, 0]
        # Speed of the root along x, after six steps of 8 milliseconds
        assert data.qvel[0] < nominal[-1][5] - 0.02
    assert not data.xfrc_applied.any()
    np.testing.assert_array_equal(play(env, actions), nominal)


def test_first_states_of_mujoco_are_wider_spread() -> None:
    env: Any = gym.make(HOPPER)

    def largest() -> float:
        far = []
        for seed in range(40):
            env.reset(seed=seed)
            far.append(np.abs(env.unwrapped.data.qpos - env.unwrapped.init_qpos).max())
        return float(max(far))

    before = largest()
    with applied(env, "initial_state", 4.0):
        assert largest() == pytest.approx(4 * before)
    assert largest() == before <= 0.005


def test_first_states_of_the_pendulum_are_faster() -> None:
    env = gym.make(PENDULUM)
    first = env.reset(seed=5)[0]
    with applied(env, "initial_state", 4.0) as wider:
        wide = wider.reset(seed=5)[0]
    np.testing.assert_allclose(wide, first * [1, 1, 4], rtol=1e-6)
    np.testing.assert_array_equal(env.reset(seed=5)[0], first)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_delay_is_so_many_steps(steps: int) -> None:
    inner = Recorder(gym.make(PENDULUM))
    actions = some_actions(inner, 8)
    with applied(inner, "delay", steps) as delayed:
        for _ in range(2):
            play(delayed, actions)
            got = np.array(inner.actions)
            assert not got[:steps].any()
            np.testing.assert_array_equal(got[steps:], actions[:-steps])


def test_dead_zone_and_gain() -> None:
    inner = Recorder(gym.make(PENDULUM))
    asked = np.array([[-2.0], [-0.41], [-0.39], [0.0], [0.1], [0.39], [0.41], [2.0]], np.float32)
    with applied(inner, "dead_zone", 0.2) as changed:
        play(changed, asked)
        assert np.ravel(inner.actions).tolist() == pytest.approx([-2, -0.41, 0, 0, 0, 0, 0.41, 2])
    with applied(inner, "action_gain", 1.5) as changed:
        play(changed, asked)
        assert np.ravel(inner.actions).tolist() == pytest.approx([-2, -0.615, -0.585, 0, 0.15, 0.585, 0.615, 2])


def test_bounds_on_one_side_of_zero() -> None:
    """Doing nothing is then the bound that is nearest to zero."""
    inner = Recorder(PointEnv(action_space=spaces.Box(1.0, 3.0, (2,), np.float32)))
    with applied(inner, "delay", 1) as delayed:
        play(delayed, np.full((2, 2), 2.0, np.float32))
        assert np.array(inner.actions).tolist() == [[1, 1], [2, 2]]
    with applied(inner, "action_gain", 0.5) as weaker:
        play(weaker, np.full((1, 2), 2.0, np.float32))
        assert np.array(inner.actions).tolist() == [[1.5, 1.5]]


def test_noise_has_its_standard_deviation() -> None:
    inner = Recorder(gym.make(PENDULUM, max_episode_steps=5000))
    actions = some_actions(inner, 4000)
    with applied(inner, "sensor_noise", 0.1, spread=2.0) as noisy:
        seen = play(noisy, actions)
        noise = seen - np.array(inner.observations)
    assert seen.dtype == np.float32
    # Two-sided chi-squared and normal limits that chance crosses once in 10,000 times for each of 3 sensors
    low, high = np.sqrt(stats.chi2.ppf([5e-5, 1 - 5e-5], noise.shape[0] - 1) / (noise.shape[0] - 1))
    assert (noise.std(axis=0, ddof=1) / 0.2 > low).all() and (noise.std(axis=0, ddof=1) / 0.2 < high).all()
    assert np.abs(noise.mean(axis=0)).max() < 3.9 * 0.2 / math.sqrt(len(noise))
    assert np.abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 3.9 / math.sqrt(len(noise))
    for seed, is_same in ((0, True), (1, False)):
        with applied(inner, "sensor_noise", 0.1, spread=2.0, seed=seed) as again:
            assert np.array_equal(play(again, actions[:50]), seen[:51]) == is_same


def test_bias() -> None:
    inner = Recorder(gym.make(PENDULUM))
    with applied(inner, "sensor_bias", -0.5, spread=0.2) as biased:
        seen = play(biased, some_actions(inner, 20))
        np.testing.assert_allclose(seen - np.array(inner.observations), -0.1, atol=1e-6)


@pytest.mark.parametrize("name", ["sensor_holds", "sensor_zero"])
def test_drop_outs(name: str) -> None:
    inner = Recorder(gym.make(PENDULUM, max_episode_steps=5000))
    with applied(inner, name, 0.3) as changed:
        shown = play(changed, some_actions(inner, 2000))
        true = np.array(inner.observations)
    np.testing.assert_array_equal(shown[0], true[0])
    fails = (shown != true)[1:]
    instead = shown[:-1] if name == "sensor_holds" else np.zeros_like(shown[:-1])
    np.testing.assert_array_equal(shown[1:][fails], instead[fails])
    for sensor in fails.T:
        assert stats.binomtest(int(sensor.sum()), len(sensor), 0.3).pvalue > 1e-4
    both = int((fails[:, 0] & fails[:, 2]).sum())
    assert stats.binomtest(both, len(fails), 0.09).pvalue > 1e-4, "sensors fail one by one"


def test_dict_observations() -> None:
    parts = {"goal": spaces.Box(-1, 1, (1,), np.float32), "place": spaces.Box(-1, 1, (2,), np.float32)}
    env = PointEnv(spaces.Dict(parts))
    with applied(env, "sensor_bias", 0.5) as biased:
        true, seen = env.reset(seed=0)[0], biased.reset(seed=0)[0]
        assert all(np.allclose(seen[key], true[key] + 0.5) for key in parts)
    for name in ("sensor_noise", "sensor_holds", "sensor_zero"):
        with applied(env, name, 0.5) as changed:
            changed.reset(seed=0)
            assert changed.step(np.zeros(2, np.float32))[0].keys() == parts.keys()


def test_random_actions_at_the_beginning() -> None:
    inner = Recorder(gym.make(PENDULUM))
    with applied(inner, "random_start", 7) as started:
        seen = started.reset(seed=0)[0]
        assert len(inner.actions) == 7 and len(np.unique(inner.actions)) == 7
        np.testing.assert_array_equal(seen, inner.observations[-1])
        first = inner.actions
        with applied(inner, "random_start", 7) as again:
            again.reset(seed=0)
        np.testing.assert_array_equal(inner.actions, first)
    with applied(gym.make(PENDULUM, max_episode_steps=30), "random_start", 7) as started:
        started.reset(seed=0)
        cut = [started.step(np.zeros(1, np.float32))[3] for _ in range(30)]
    assert cut == [False] * 29 + [True], "an episode is as long as any other, so that returns can be compared"
    ends = Recorder(gym.make(PENDULUM, max_episode_steps=4))
    with applied(ends, "random_start", 7) as started:
        started.reset(seed=0)
        assert not ends.actions, "an episode that has ended does not begin"


@pytest.mark.parametrize("env_id", [HOPPER, PENDULUM])
def test_nominal_levels_change_nothing(env_id: str) -> None:
    env = gym.make(env_id)
    actions = some_actions(env, 10)
    nominal = play(env, actions)
    names = possible(env)
    assert {"mass", "gravity", "initial_state", "delay", "sensor_noise"} <= set(names) <= PERTURBATIONS.keys()
    for name in names:
        with applied(env, name, find_perturbation(name, env).nominal) as unchanged:
            np.testing.assert_array_equal(play(unchanged, actions), nominal, err_msg=name)


@pytest.mark.parametrize(
    ("env_id", "name", "message"),
    [
        (PENDULUM, "fricton", "Unknown perturbation 'fricton'. Did you mean 'friction'?"),
        (PENDULUM, "friction", "Pendulum-v1 has no friction that could be changed: it has mass, gravity, length"),
        (PENDULUM, "wind", "it has mass, gravity, .*sensor_zero, attribute.dt, attribute.g"),
        (HOPPER, "length", "Hopper-v5 has no length that could be changed: it has mass, friction"),
        (PENDULUM, "attribute.mas", "Pendulum-v1 has no number 'mas'. (Did you mean 'm|Known are)"),
        ("CartPole-v1", "delay", "CartPole-v1 has no delay"),
    ],
)
def test_what_an_environment_does_not_have(env_id: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_perturbation(name, gym.make(env_id))


@pytest.mark.parametrize(
    ("name", "level"),
    [("delay", 0.5), ("delay", -1), ("mass", -0.1), ("sensor_holds", 1.1), ("sensor_noise", math.nan), ("max_torque", 1.2)],
)
def test_levels_that_make_no_sense(name: str, level: float) -> None:
    with pytest.raises(ValueError, match=f"A level of {name} must be a .* number from 0 to .*, found"):
        find_perturbation(name, gym.make(PENDULUM)).check_level(level)


def test_images_have_no_sensors_to_disturb() -> None:
    env = PointEnv(spaces.Box(0, 255, (36, 36, 1), np.uint8))
    assert possible(env) == ["random_start", "delay", "dead_zone", "action_gain"]
