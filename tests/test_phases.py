"""The life cycle by itself, without a learner, and what a learner tells of it."""

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import TD3BC
from sb3_offline_ft.offline_td3 import Phase
from sb3_offline_ft.offline_td3.life_cycle import LifeCycle
from tests.hooks import last_observations

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8, 8]}, "seed": 0, "device": "cpu", "batch_size": 8}


def test_a_run_goes_through_its_phases() -> None:
    cycle = LifeCycle()
    assert cycle.phase(0, 0) is Phase.NEW
    with cycle.pretraining():
        assert cycle.phase(0, 7) is Phase.PRETRAINING and not cycle.is_plain_td3
    assert cycle.phase(0, 10) is Phase.PRETRAINED
    assert cycle.begin_run(num_timesteps=0, n_updates=10, has_data=True, warmup_steps=20, critic_steps=5)
    assert cycle.offline_is_finished
    assert [cycle.phase(step, 10) for step in (0, 1, 20)] == [Phase.WARMUP] * 3
    assert [cycle.phase(21 + n, 10 + n) for n in (0, 4)] == [Phase.CRITIC_WARMUP] * 2
    assert cycle.phase(26, 15) is Phase.FINETUNING
    # Offline steps between runs do not end one
    with pytest.raises(KeyError), cycle.pretraining(26):
        assert cycle.environment_steps == 26
        raise KeyError
    assert cycle.phase(26, 15) is Phase.FINETUNING


def test_only_trained_weights_get_a_warm_up() -> None:
    cycle = LifeCycle()
    assert not cycle.begin_run(0, 0, has_data=True, warmup_steps=20, critic_steps=5)
    assert cycle.phase(1, 0) is Phase.FINETUNING and cycle.first_warmup_end == 0
    assert not cycle.begin_run(0, 0, has_data=False, warmup_steps=20, critic_steps=5)
    assert cycle.phase(1, 0) is Phase.ONLINE_ONLY and cycle.is_plain_td3
    # Those from elsewhere have no updates here
    cycle = LifeCycle(is_pretrained=True)
    assert cycle.phase(0, 0) is Phase.PRETRAINED
    assert cycle.begin_run(0, 0, has_data=False, warmup_steps=20, critic_steps=0)
    assert cycle.phase(1, 0) is Phase.WARMUP


def test_the_first_warm_up_is_kept_apart_from_later_ones() -> None:
    cycle = LifeCycle(is_pretrained=True)
    cycle.begin_run(100, 0, has_data=False, warmup_steps=20, critic_steps=0)
    cycle.begin_warmup(110, 5)
    assert cycle.first_warmup_end == 120, "within the first one, it is only prolonged"
    cycle.begin_warmup(110, 30)
    assert (cycle.first_warmup_end, cycle.later_warmup_end) == (140, 0)
    assert cycle.phase(141, 0) is Phase.FINETUNING
    cycle.begin_warmup(200, 10)
    cycle.begin_warmup(205, 1)
    assert (cycle.first_warmup_end, cycle.later_warmup_end, cycle.frozen_until) == (140, 210, 210)
    assert cycle.phase(210, 0) is Phase.WARMUP and cycle.phase(211, 0) is Phase.FINETUNING
    cycle.begin_run(300, 0, has_data=False, warmup_steps=0, critic_steps=0)
    assert (cycle.first_warmup_end, cycle.later_warmup_end) == (300, 0)


def test_its_state_is_in_plain_numbers_and_a_position_leaves_progress_alone() -> None:
    cycle = LifeCycle(offline_steps_done=3)
    cycle.begin_run(5, 3, has_data=True, warmup_steps=4, critic_steps=2)
    state = cycle.state_dict()
    assert all(type(value) in (bool, int) for value in state.values())
    other = LifeCycle()
    other.load_state_dict(state | {"something": 1})
    assert other == cycle
    other = LifeCycle(offline_steps_done=50, first_warmup_end=70)
    other.load_state_dict(cycle.position())
    assert (other.offline_steps_done, other.first_warmup_end) == (50, 70)
    assert other.is_finetuning and other.critic_warmup_end == 5


def test_it_needs_no_torch() -> None:
    code = """
import importlib.util, sys
from pathlib import Path
path = Path(importlib.util.find_spec("sb3_offline_ft").origin).parent / "offline_td3" / "life_cycle.py"
spec = importlib.util.spec_from_file_location("life_cycle", path)
sys.modules["life_cycle"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules and "stable_baselines3" not in sys.modules
assert module.LifeCycle().phase(0, 0).value == "new"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Phases(BaseCallback):
    """The phase at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Phase] = []

    def _on_step(self) -> bool:
        self.seen.append(self.model.phase)  # type: ignore[attr-defined]
        return True


def test_a_learner_tells_its_phase() -> None:
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", offline_steps=6, warmup_steps=10,
                  critic_warmup_steps=4, offline_fraction=1.0, **SMALL)  # fmt: skip
    assert model.phase is Phase.NEW
    phases = Phases()
    model.pretrain(5, callback=phases)
    assert model.phase is Phase.PRETRAINED and phases.seen == [Phase.PRETRAINING] * 5
    phases = Phases()
    model.learn(20, callback=phases)
    # A callback sees the phase before the update of its step
    assert phases.seen == [Phase.WARMUP] * 10 + [Phase.CRITIC_WARMUP] * 4 + [Phase.FINETUNING] * 6
    with pytest.raises(AttributeError):
        model.phase = Phase.NEW  # type: ignore[misc]


@pytest.mark.parametrize("n_envs", [1, 3])
def test_another_policy_acts_in_the_learners_place(n_envs: int) -> None:
    noise = NormalActionNoise(np.zeros(1), np.ones(1))
    model = TD3BC("MlpPolicy", make_vec_env("Pendulum-v1", n_envs, seed=0), dataset="bundled:pendulum-medium", offline_steps=5,
                  warmup_steps=0, action_noise=noise, guide_policy="pretrained", guide_steps=2, **SMALL)  # fmt: skip
    champion = TD3BC("MlpPolicy", gym.make("Pendulum-v1"), seed=7, device="cpu", policy_kwargs={"net_arch": [8]})
    rows: list[tuple[np.ndarray, np.ndarray]] = []

    class Acts(BaseCallback):
        def _on_step(self) -> bool:
            rows.append((last_observations(self.model).copy(), self.locals["actions"].copy()))
            if self.n_calls == 9:
                model.let_act(None)
            return True

    model.let_act(champion)
    model.learn(12 * n_envs, callback=Acts())
    for step, (observations, actions) in enumerate(rows):
        by_champion = np.allclose(actions, champion.predict(observations, deterministic=True)[0], atol=1e-6)
        assert by_champion == (2 <= step < 9), "the guide begins the episodes, and at last the learner acts again"
