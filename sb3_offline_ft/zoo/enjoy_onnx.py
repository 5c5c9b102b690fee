"""What ``enjoy`` does for a policy in ONNX's format, which knows neither algorithm nor run."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.controllers import check_fits
from sb3_offline_ft.controllers.contract import contract_file
from sb3_offline_ft.controllers.onnx_file import OnnxController
from sb3_offline_ft.evaluation.robustness.episodes import make_env


def enjoy_onnx(arguments: Sequence[str]) -> None:
    """
    Let a policy act in an environment, and print the returns as rl_zoo3's enjoy does.

    :param arguments: Of the command line
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        controller = OnnxController(args.onnx, Path(args.onnx).expanduser())
        env = _environment(controller, args)
    except (OSError, ValueError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    returns, lengths = [], []
    try:
        for total, length in _episodes(controller, env, args.n_timesteps, args.seed):
            print(f"Episode Reward: {total:.2f}\nEpisode Length {length}")
            returns.append(total)
            lengths.append(length)
    except KeyboardInterrupt:
        pass
    finally:
        env.close()
    if returns:
        print(f"{len(returns)} Episodes")
        print(f"Mean reward: {np.mean(returns):.2f} +/- {np.std(returns):.2f}")
        print(f"Mean episode length: {np.mean(lengths):.2f} +/- {np.std(lengths):.2f}")


def _parser() -> argparse.ArgumentParser:
    from rl_zoo3.utils import StoreDict

    parser = argparse.ArgumentParser("python -m sb3_offline_ft.zoo.enjoy", description="Let a policy in ONNX's format act.")
    parser.add_argument("--onnx", metavar="FILE", required=True, help="The policy, as sb3-offline-ft export writes it")
    parser.add_argument("--env", help="Environment ID; by default that of the contract beside the policy")
    parser.add_argument("-n", "--n-timesteps", type=int, default=1000, help="Number of timesteps")
    parser.add_argument("--seed", type=int, default=0, help="Random generator seed")
    parser.add_argument("--no-render", action="store_true", help="Do not render the environment")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="Packages to import that register environments")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, help="Arguments of the environment")
    return parser


def _environment(controller: OnnxController, args: argparse.Namespace) -> gym.Env[Any, Any]:
    for package in args.gym_packages:
        importlib.import_module(package)
    with naming_damage(contract_file(Path(args.onnx)), "a contract that `sb3-offline-ft export` wrote"):
        known = {"id": None, "kwargs": {}, **((controller.contract or {}).get("environment") or {})}
        known_id, known_kwargs = known["id"], dict(known["kwargs"])
    env_id = args.env or known_id
    if env_id is None:
        raise ValueError(f"{args.onnx} has no contract that names an environment: give one with --env.")
    kwargs = args.env_kwargs or (known_kwargs if env_id == known_id else {})
    # Environments need not know of `render_mode`
    kwargs = {name: value for name, value in kwargs.items() if name != "render_mode"}
    env = make_env(env_id, kwargs | ({} if args.no_render else {"render_mode": "human"}))
    check_fits(controller, env)
    return env


def _episodes(controller: OnnxController, env: gym.Env[Any, Any], n_steps: int, seed: int) -> Any:
    """Return and length of each episode that ends within so many steps."""
    observation, _ = env.reset(seed=seed)
    controller.reset(seed)
    total, length = 0.0, 0
    for _ in range(n_steps):
        action, space = controller.act(observation), env.action_space
        # As rl_zoo3's policies do
        action = np.clip(action, space.low, space.high) if isinstance(space, spaces.Box) else action
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length = total + float(reward), length + 1
        if terminated or truncated:
            yield total, length
            total, length = 0.0, 0
            observation, _ = env.reset()
            controller.reset()
