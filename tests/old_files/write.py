"""
Writes files of the version that is installed, which later versions have to open: ``python tests/old_files/write.py FOLDER``.

Each model is saved in the middle of something; ``expected.npz`` tells what it predicts then, and its actor's weights after it
was loaded and has gone on.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft import TD3BC, TD3C, CollapseGuard, LearnerSnapshot, OfflineTD3, ReBRAC
from sb3_offline_ft.testing import PointEnv, record

STEPS_AFTER_LOADING = 40
GUARD = {"baseline": [-3.0, -4.0, -5.0, -6.0, -7.0, -8.0], "signal_freq": 10, "verbose": 0}
SMALL: dict[str, Any] = {
    "dataset": "bundled:hopper-medium",
    "policy_kwargs": {"net_arch": [8, 8]},
    "offline_steps": 20,
    "warmup_steps": 20,
    "batch_size": 32,
    "buffer_size": 500,
    "seed": 3,
    "device": "cpu",
}


def make_env(n_envs: int = 1) -> VecEnv:
    return make_vec_env("Hopper-v5", n_envs=n_envs, seed=5)


def noise() -> NormalActionNoise:
    return NormalActionNoise(np.zeros(3), np.full(3, 0.1))


def evaluation(folder: Path) -> EvalCallback:
    return EvalCallback(make_env(), n_eval_episodes=1, eval_freq=25, log_path=str(folder), verbose=0)


Model = Callable[[Path], TD3]


def offline_td3(folder: Path) -> OfflineTD3:
    model = OfflineTD3(
        "MlpPolicy",
        make_env(),
        **SMALL,
        guide_policy="pretrained",
        guide_steps="lin_20_0",
        policy_averaging=0.9,
        action_noise=noise(),
    )
    return model.learn(60)


def in_warmup(folder: Path) -> OfflineTD3:
    return TD3BC("MlpPolicy", make_env(2), **SMALL | {"warmup_steps": 50}, online_bc="lin_1_0").learn(20)


def in_pretraining(folder: Path) -> OfflineTD3:
    return TD3C("MlpPolicy", make_env(), **SMALL | {"offline_steps": 40}).pretrain(15)


def adaptive(folder: Path) -> OfflineTD3:
    return TD3BC("MlpPolicy", make_env(), **SMALL, online_bc="adaptive").learn(80)


def constrained(folder: Path) -> OfflineTD3:
    model = TD3C("MlpPolicy", make_env(), **SMALL, epsilon="geo_0.01_0.001", critic_penalty=1.0, critic_warmup_steps=10)
    return model.learn(80, callback=evaluation(folder))


def guarded(folder: Path) -> OfflineTD3:
    model = TD3C("MlpPolicy", make_env(), **SMALL, constraint_reference="pretrained", n_steps=3)
    return model.learn(80, callback=CallbackList([CollapseGuard(**GUARD, path=folder)]))


def rebrac(folder: Path) -> OfflineTD3:
    return ReBRAC("MlpPolicy", make_env(), **SMALL | {"policy_kwargs": {"net_arch": [8, 8], "n_critics": 3}}).learn(60)


def plain_td3(folder: Path) -> TD3:
    return TD3("MlpPolicy", make_env(), policy_kwargs={"net_arch": [8, 8]}, learning_starts=10, seed=3, device="cpu").learn(30)


MODELS: dict[str, tuple[type[OfflineTD3], Model]] = {
    "offline_td3": (OfflineTD3, offline_td3),
    "in_warmup": (TD3BC, in_warmup),
    "in_pretraining": (TD3C, in_pretraining),
    "adaptive": (TD3BC, adaptive),
    "constrained": (TD3C, constrained),
    "guarded": (TD3C, guarded),
    "rebrac": (ReBRAC, rebrac),
    "plain_td3": (TD3BC, plain_td3),
}


def with_buffer() -> OfflineTD3:
    """A model whose file holds its replay buffer."""
    small = {"net_arch": [8]}
    sampling = {"offline_sampling": "balanced", "balanced_kwargs": small, "augmentation": "gaussian_noise"}
    settings = SMALL | {"dataset": record(PointEnv(), 40), "replay_buffer_kwargs": sampling, "buffer_size": 100}
    return TD3BC("MlpPolicy", PointEnv(), **settings).learn(60)


def go_on_with_buffer(folder: Path) -> OfflineTD3:
    model = TD3BC.load(folder / "with_buffer.zip", env=PointEnv(), device="cpu")
    return model.learn(STEPS_AFTER_LOADING, reset_num_timesteps=False)


def observations() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 11)).astype(np.float32)


def go_on(name: str, folder: Path) -> tuple[OfflineTD3, np.ndarray]:
    """The model that was saved under a name, and its actions before it goes on."""
    cls = MODELS[name][0]
    model = cls.load(folder / f"{name}.zip", env=make_env(2 if name == "in_warmup" else 1), device="cpu")
    if (folder / f"{name}_buffer.npz").exists():
        model.load_replay_buffer(folder / f"{name}_buffer.npz")
    actions, _ = model.predict(observations(), deterministic=True)
    if name == "in_pretraining":
        model.pretrain()
    else:
        callback = CollapseGuard(**GUARD) if name == "guarded" else None
        model.learn(STEPS_AFTER_LOADING, callback=callback, reset_num_timesteps=name == "plain_td3")
    return model, actions


def weights(model: OfflineTD3) -> np.ndarray:
    return np.asarray(th.nn.utils.parameters_to_vector(model.actor.parameters()).detach().numpy())


def write(folder: Path, scratch: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, (_, make) in MODELS.items():
        model = make(scratch / name)
        model.save(folder / f"{name}.zip")
        if isinstance(model, OfflineTD3) and name != "in_pretraining":
            model.save_replay_buffer(folder / f"{name}_buffer.npz")
        if name == "constrained":
            LearnerSnapshot.take(model).save(folder / "snapshot.pt")
    for name in MODELS:
        model, expected[f"{name}_actions"] = go_on(name, folder)
        expected[f"{name}_weights"] = weights(model)
    with_buffer().save(folder / "with_buffer.zip", include=["replay_buffer"])
    expected["with_buffer_weights"] = weights(go_on_with_buffer(folder))
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(Path(sys.argv[1]), Path(sys.argv[1]).parent / "scratch")
