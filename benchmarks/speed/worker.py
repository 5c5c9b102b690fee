"""
Serve one candidate of the speed benchmark: `run.py` starts one such process for each, warm and waiting for its turn.

    echo '{"steps": 200}' | python benchmarks/speed/worker.py offline/hopper/sb3 --threads 1

Reads one JSON object per line, ``{"steps": n}``, takes so many steps and answers with the seconds they took; ends with its
input. The first answer says whether the candidate is ready, or why it cannot be measured.
"""

import argparse
import gc
import importlib.metadata
import inspect
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candidates import BATCH_SIZE, GEMM_SIZE, HIDDEN, POLICY_DELAY, ROWS, SHAPES, find_group

PACKAGES = ("sb3-offline-ft", "stable-baselines3", "torch", "numpy", "gymnasium", "mujoco", "sbx-rl", "jax", "d3rlpy")
EPISODE = 1_000
IMAGE_BATCH_SIZE = 64
IMAGE_ROWS = 10_000
OFFLINE_BEFORE_ONLINE = 100
SBX_STEPS = 400  # in one call, which is one compiled loop


class CannotMeasureError(Exception):
    """The candidate cannot be measured here; the message says why."""


@dataclass
class Session:
    """
    A candidate that is set up.

    :param run: Take a number of steps, a multiple of ``multiple_of``; may return numbers to keep
    :param multiple_of: See ``run``
    :param facts: What was set up
    """

    run: Callable[[int], dict[str, float] | None]
    multiple_of: int = POLICY_DELAY
    facts: dict[str, Any] = field(default_factory=dict)


def use_cores(threads: int) -> list[int]:
    """
    Keep this process on as many cores as it has threads, the same ones for all candidates; Linux only.

    :param threads: Number of cores
    :return: Their numbers, none where the system does not allow it
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    # The first processor of each core before the second ones; from the end, since the first ones often serve interrupts
    processors = sorted(os.sched_getaffinity(0), reverse=True)
    first_seen: dict[str, int] = {}
    for processor in processors:
        path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        first_seen.setdefault(path.read_text().strip() if path.exists() else str(processor), processor)
    ordered = [*first_seen.values(), *(processor for processor in processors if processor not in first_seen.values())]
    chosen = ordered[:threads]
    if len(chosen) < threads:
        raise CannotMeasureError(f"{threads} threads need as many processors, found {len(chosen)}: use --threads 1")
    os.sched_setaffinity(0, chosen)
    return chosen


def columns(shape: str, rows: int = ROWS) -> tuple[Any, ...]:
    """
    :param shape: Name of a shape
    :param rows: Number of transitions
    :return: Observations, actions, rewards, next observations and terminations: noise, in episodes of 1,000 steps
    """
    import numpy as np

    sizes, rng = SHAPES[shape], np.random.default_rng(0)
    observations = rng.normal(size=(rows, sizes.observation)).astype(np.float32)
    next_observations = np.concatenate([observations[1:], observations[:1]])
    actions = rng.uniform(-1, 1, size=(rows, sizes.action)).astype(np.float32)
    rewards = rng.normal(size=rows).astype(np.float32)
    return observations, actions, rewards, next_observations, np.zeros(rows, dtype=bool)


def synthetic_env(observation_space: Any, action_dim: int) -> Any:
    """
    :param observation_space: Space of observations
    :param action_dim: Length of an action
    :return: An environment with these spaces that is never stepped in
    """
    import gymnasium as gym
    import numpy as np

    class SyntheticEnv(gym.Env[Any, np.ndarray]):
        def __init__(self) -> None:
            self.observation_space = observation_space
            self.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.observation_space.sample(), 0.0, False, False, {}

    return SyntheticEnv()


def vector_env(shape: str) -> Any:
    """
    :param shape: Name of a shape
    :return: An environment with MuJoCo's spaces of that shape, float64 observations
    """
    import gymnasium as gym
    import numpy as np

    space = gym.spaces.Box(-np.inf, np.inf, (SHAPES[shape].observation,), np.float64)
    return synthetic_env(space, SHAPES[shape].action)


def fill(buffer: Any, observations: Iterable[Any], next_observations: Iterable[Any], actions: Any, rewards: Any) -> None:
    """
    Put transitions into a replay buffer of SB3, one by one as a run does.

    :param buffer: The buffer
    :param observations: Observations, of one environment each
    :param next_observations: Next observations
    :param actions: Actions
    :param rewards: Rewards
    """
    import numpy as np

    never = np.zeros(1, dtype=bool)
    rows = zip(observations, next_observations, actions[:, None], rewards[:, None], strict=True)
    for observation, next_observation, action, reward in rows:
        buffer.add(observation, next_observation, action, reward, never, [{}])


def fill_vectors(buffer: Any, shape: str, rows: int = ROWS) -> None:
    """
    :param buffer: A replay buffer of SB3
    :param shape: Name of a shape
    :param rows: Number of transitions
    """
    observations, actions, rewards, next_observations, _ = columns(shape, rows)
    fill(buffer, observations[:, None], next_observations[:, None], actions, rewards)


def silence(model: Any) -> None:
    """
    :param model: A model of SB3 whose `train` shall log, but print nothing
    """
    from stable_baselines3.common.logger import Logger

    model.set_logger(Logger(None, []))


def sb3_train(shape: str) -> Session:
    """
    :param shape: Name of a shape
    :return: SB3's TD3
    """
    from stable_baselines3 import TD3

    policy_kwargs = {"net_arch": [HIDDEN, HIDDEN]}
    model = TD3("MlpPolicy", vector_env(shape), buffer_size=ROWS, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    silence(model)
    fill_vectors(model.replay_buffer, shape)
    return Session(updating(model, lambda steps: model.train(steps, BATCH_SIZE)))


def sbx_train(shape: str) -> Session:
    """
    :param shape: Name of a shape
    :return: SBX's TD3, all steps of a call in one compiled loop
    """
    import jax
    from sbx import TD3

    if jax.default_backend() != "cpu":
        raise CannotMeasureError(f"JAX uses {jax.default_backend()}: only CPUs are compared")
    policy_kwargs = {"net_arch": [HIDDEN, HIDDEN]}
    model = TD3(
        "MlpPolicy", vector_env(shape), buffer_size=ROWS, policy_kwargs=policy_kwargs, policy_delay=POLICY_DELAY, seed=0
    )
    silence(model)
    fill_vectors(model.replay_buffer, shape)

    def run(steps: int) -> None:
        for _ in range(steps // SBX_STEPS):
            model.train(SBX_STEPS, BATCH_SIZE)

    return Session(run, SBX_STEPS, {"steps per call": SBX_STEPS})


def d3rlpy_update(shape: str) -> Session:
    """
    :param shape: Name of a shape
    :return: d3rlpy's TD3+BC
    """
    import d3rlpy
    import numpy as np

    observations, actions, rewards, _, terminations = columns(shape)
    timeouts = np.arange(1, ROWS + 1) % EPISODE == 0
    dataset = d3rlpy.dataset.MDPDataset(observations, actions, rewards, terminations.astype(np.float32), timeouts)
    algorithm = d3rlpy.algos.TD3PlusBCConfig(batch_size=BATCH_SIZE, update_actor_interval=POLICY_DELAY).create(device="cpu:0")
    algorithm.build_with_dataset(dataset)

    def run(steps: int) -> None:
        for _ in range(steps):
            algorithm.update(dataset.sample_transition_batch(BATCH_SIZE))

    return Session(run)


def single_file(shape: str) -> Session:
    """
    :param shape: Name of a shape
    :return: TD3+BC in the style of single-file implementations
    """
    from single_file import Trainer, TransitionBuffer

    observations, actions, rewards, next_observations, terminations = columns(shape)
    buffer = TransitionBuffer(observations, actions, rewards[:, None], next_observations, terminations[:, None])
    sizes = SHAPES[shape]
    trainer = Trainer(buffer, sizes.observation, sizes.action, HIDDEN, BATCH_SIZE, POLICY_DELAY)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.update()

    return Session(run)


def own_algorithm(name: str, keywords: Iterable[str] = ()) -> Any:
    """
    :param name: A class of this package
    :param keywords: Arguments that its constructor must have
    :return: The class
    :raises CannotMeasureError: It does not have one of them
    """
    import sb3_offline_ft

    algorithm = getattr(sb3_offline_ft, name)
    missing = sorted(set(keywords) - inspect.signature(algorithm.__init__).parameters.keys())
    if missing:
        raise CannotMeasureError(f"{name} has no argument `{'`, `'.join(missing)}` in this version of the package")
    return algorithm


def check_updates(model: Any, before: int, expected: int) -> None:
    """
    :param model: A model
    :param before: Its number of updates before
    :param expected: How many more it should have now
    :raises CannotMeasureError: It has others: who leaves updates out is fast
    """
    made = model._n_updates - before
    if made != expected:
        raise CannotMeasureError(f"{made} updates were made, expected {expected}")


def updating(model: Any, advance: Callable[[int], object]) -> Callable[[int], None]:
    """
    :param model: A model
    :param advance: Makes a number of its updates
    :return: The same, which fails if these are others
    """

    def run(steps: int) -> None:
        before = model._n_updates
        advance(steps)
        check_updates(model, before, steps)

    return run


def kernel_facts(model: Any) -> dict[str, Any]:
    """
    :param model: A model of this package
    :return: What its updates are computed by, as far as it says
    """
    kernel = next((value for value in vars(model).values() if type(value).__name__.endswith("Kernel")), None)
    if kernel is None:
        return {}
    products = next((value for value in vars(kernel).values() if type(value).__name__ == "Products"), None)
    facts = {"kernel": getattr(kernel, "name", None), "products": getattr(products, "name", None)}
    return {name: value for name, value in facts.items() if isinstance(value, str)}


def pretrain(shape: str, algorithm: str, layer_norm: bool, **keywords: str) -> Session:
    """
    :param shape: Name of a shape
    :param algorithm: Class of this package
    :param layer_norm: Whether the critics have LayerNorm
    :param keywords: More arguments of its constructor
    :return: Its pretraining
    """
    import numpy as np

    from sb3_offline_ft import OfflineDataset

    observations, actions, rewards, next_observations, terminations = columns(shape)
    env, timeouts = vector_env(shape), np.arange(1, ROWS + 1) % EPISODE == 0
    dataset = OfflineDataset.from_columns(
        observations, actions, rewards, next_observations, terminations, timeouts, action_space=env.action_space
    )
    make = own_algorithm(algorithm, keywords)
    model = make(
        "MlpPolicy",
        env,
        buffer_size=1_000,
        policy_kwargs={"net_arch": [HIDDEN, HIDDEN], "layer_norm": layer_norm},
        seed=0,
        device="cpu",
        dataset=dataset,
        **keywords,
    )
    model.pretrain(POLICY_DELAY)
    return Session(updating(model, model.pretrain), facts=kernel_facts(model))


def learn(
    algorithm: str, noise: float | None, gradient_steps: int, dataset: bool = False, layer_norm: bool | None = None
) -> Session:
    """
    :param algorithm: ``"TD3"`` for SB3's, else a class of this package
    :param noise: Standard deviation of the action noise, None for none
    :param gradient_steps: Updates after each step
    :param dataset: Whether batches hold logged data too
    :param layer_norm: Whether the critics have LayerNorm, None for the default
    :return: `learn` on Hopper-v5
    """
    import gymnasium as gym
    import numpy as np
    from stable_baselines3 import TD3
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.noise import NormalActionNoise

    policy_kwargs: dict[str, Any] = {"net_arch": [HIDDEN, HIDDEN]}
    if layer_norm is not None:
        policy_kwargs["layer_norm"] = layer_norm
    settings: dict[str, Any] = {}
    if dataset:
        settings = {"dataset": "bundled:hopper-medium", "warmup_steps": 0}
    if algorithm == "TD3C" and dataset:
        settings["constraint_reference"] = "pretrained"
    make: Any = TD3 if algorithm == "TD3" else own_algorithm(algorithm)
    # The same seed gives the same policy to all of them; the lengths of episodes, which part as they learn, are reported
    model = make(
        "MlpPolicy",
        Monitor(gym.make("Hopper-v5")),
        buffer_size=ROWS,
        learning_starts=0,
        batch_size=BATCH_SIZE,
        gradient_steps=gradient_steps,
        action_noise=None if noise is None else NormalActionNoise(np.zeros(3), np.full(3, noise)),
        policy_kwargs=policy_kwargs,
        seed=0,
        device="cpu",
        **settings,
    )
    if dataset:
        model.pretrain(OFFLINE_BEFORE_ONLINE)
    # More than a batch, so that each later step is followed by its updates
    model.learn(2 * BATCH_SIZE)

    def run(steps: int) -> dict[str, float]:
        updates = model._n_updates
        model.learn(steps, reset_num_timesteps=False)
        check_updates(model, updates, steps * gradient_steps)
        lengths = [episode["l"] for episode in model.ep_info_buffer]
        return {"updates": model._n_updates - updates, "episode_length": float(np.mean(lengths)) if lengths else float(steps)}

    return Session(run, 1, kernel_facts(model))


def online_train(algorithm: str, network: str) -> Session:
    """
    :param algorithm: ``"TD3"`` for SB3's, else a class of this package
    :param network: ``"mlp"``, ``"elu"``, ``"dict"`` or ``"cnn"``
    :return: `train` on online data, with the same policy for all algorithms
    """
    import gymnasium as gym
    import numpy as np
    from stable_baselines3 import TD3
    from torch import nn

    box, float32 = gym.spaces.Box, np.float32
    policy, policy_kwargs = "MlpPolicy", dict[str, Any](net_arch=[HIDDEN, HIDDEN])
    rows, batch_size = ROWS, BATCH_SIZE
    space: Any = box(-np.inf, np.inf, (SHAPES["hopper"].observation,), np.float64)
    if algorithm != "TD3":
        policy_kwargs["layer_norm"] = False
    if network == "elu":
        policy_kwargs["activation_fn"] = nn.ELU
    elif network == "dict":
        policy = "MultiInputPolicy"
        space = gym.spaces.Dict(
            {"position": box(-np.inf, np.inf, (5,), float32), "speed": box(-np.inf, np.inf, (6,), float32)}
        )
    elif network == "cnn":
        policy, rows, batch_size = "CnnPolicy", IMAGE_ROWS, IMAGE_BATCH_SIZE
        space = box(0, 255, (1, 36, 36), np.uint8)
    make: Any = TD3 if algorithm == "TD3" else own_algorithm(algorithm)
    env = synthetic_env(space, SHAPES["hopper"].action)
    model = make(policy, env, buffer_size=rows, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    silence(model)
    observations, actions, rewards, next_observations, _ = columns("hopper", rows)
    if network == "dict":
        fill(model.replay_buffer, _as_dicts(observations), _as_dicts(next_observations), actions, rewards)
    elif network == "cnn":
        images = np.random.default_rng(0).integers(0, 256, size=(rows, 1, *space.shape), dtype=np.uint8)
        fill(model.replay_buffer, images, np.roll(images, -1, axis=0), actions, rewards)
    else:
        fill(model.replay_buffer, observations[:, None], next_observations[:, None], actions, rewards)
    model.train(POLICY_DELAY, batch_size)
    return Session(updating(model, lambda steps: model.train(steps, batch_size)), facts=kernel_facts(model))


def _as_dicts(observations: Any) -> list[dict[str, Any]]:
    return [{"position": row[None, :5], "speed": row[None, 5:]} for row in observations]


def gemm(arithmetic: str, library: str) -> Session:
    """
    :param arithmetic: ``"float32"`` or ``"bfloat16"``
    :param library: ``"default"``, or ``"onednn"`` for what torch does when reduced precision is allowed: on a CPU without
        units for it, oneDNN's single precision
    :return: Products of two square matrices
    """
    import torch as th

    if library == "onednn":
        try:
            th.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        except AttributeError as error:
            raise CannotMeasureError(f"torch {th.__version__} has no switch for it") from error
    dtype = th.bfloat16 if arithmetic == "bfloat16" else th.float32
    generator = th.Generator().manual_seed(0)
    a, b = (th.randn(GEMM_SIZE, GEMM_SIZE, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    a, b = a.to(dtype), b.to(dtype)
    out = th.empty(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    largest_error = float(((a @ b).double() - exact).abs().max())
    if dtype == th.float32 and largest_error > 1e-3:
        raise CannotMeasureError(
            f"it is not single precision here: error {largest_error:.1e} on numbers of size {GEMM_SIZE**0.5:g}"
        )

    def run(steps: int) -> dict[str, float]:
        shortest = float("inf")
        for _ in range(steps // 50):
            start = time.perf_counter()
            for _ in range(50):
                th.mm(a, b, out=out)
            shortest = min(shortest, time.perf_counter() - start)
        return {"shortest": shortest / 50}

    return Session(run, 50, {"error": largest_error})


KINDS: dict[str, Callable[..., Session]] = {
    function.__name__: function
    for function in (sb3_train, sbx_train, d3rlpy_update, single_file, pretrain, learn, online_train, gemm)
}


def set_up(group: str, name: str, threads: int) -> Session:
    """
    :param group: Name of a group
    :param name: Name of a candidate in it
    :param threads: Number of threads
    :return: The candidate, set up
    """
    cores = use_cores(threads)
    warnings.simplefilter("ignore")
    candidate = find_group(group).find(name)
    if candidate.environment != "sbx":
        import torch as th

        th.set_num_threads(threads)
    session = KINDS[candidate.kind](**candidate.settings)
    session.facts["cores"] = cores
    return session


def versions() -> dict[str, str]:
    """
    :return: Versions of what is installed here and matters
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidate", help="group and name, such as offline/hopper/sb3")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    # What libraries print must not mix with the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    group, name = arguments.candidate.rsplit("/", 1)
    try:
        session = set_up(group, name, arguments.threads)
    except (CannotMeasureError, ImportError) as error:
        answers.write(json.dumps({"not_measured": str(error)}) + "\n")
        return
    answers.write(json.dumps({"multiple_of": session.multiple_of, "facts": session.facts, "versions": versions()}) + "\n")
    for line in sys.stdin:
        cpu_before = time.process_time()
        steps = json.loads(line)["steps"]
        gc.collect()
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            extra = session.run(steps) or {}
        except CannotMeasureError as error:
            answers.write(json.dumps({"not_measured": str(error)}) + "\n")
            return
        seconds, cpu_end = time.perf_counter() - start, time.process_time()
        answer = {
            "steps": steps,
            "seconds": seconds,
            "cpu_seconds": cpu_end - cpu_start,
            "turn_cpu_seconds": cpu_end - cpu_before,
        }
        answers.write(json.dumps(answer | extra) + "\n")


if __name__ == "__main__":
    main()
