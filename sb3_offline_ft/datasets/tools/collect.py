"""New datasets from agents: roll out, record what the environment itself saw, and write a Minari dataset."""

import hashlib
import importlib
import importlib.metadata
import io
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.common.termination import Terminated
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.datasets.files.minari_writing import check_new_id, write_minari
from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.datasets.spaces import check_spaces_supported
from sb3_offline_ft.datasets.tools.agents import RANDOM, SavedAgent, find_agent
from sb3_offline_ft.datasets.tools.recorder import EpisodeRecorder, recorder_in
from sb3_offline_ft.datasets.tools.show import progress_bar

_EXPLORATION_STREAM = 1 << 31
_VERSIONS = ("stable-baselines3", "gymnasium", "mujoco", "numpy", "torch", "rl_zoo3", "sb3-offline-ft")


@dataclass(frozen=True)
class CollectedDataset:
    """
    What came of a collection.

    :param dataset_id: The Minari id
    :param folder: Where the dataset is, ``None`` if no episode was complete when it was interrupted
    :param transitions: Number of rows
    :param returns: Undiscounted return of each episode
    :param ended_by: Number of the signal that ended it, Ctrl-C's (SIGINT) or SIGTERM; 0 if none did
    """

    dataset_id: str
    folder: Path | None
    transitions: int
    returns: npt.NDArray[np.float64]
    ended_by: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether it was ended by a signal."""
        return self.ended_by != 0


@dataclass(frozen=True)
class Behaviour:
    """
    How an agent acts while it is recorded.

    :param deterministic: Take the mean or mode of a stochastic policy instead of drawing from it
    :param noise_std: Standard deviation of Gaussian noise added to the actions, on the scale where their bounds are -1 and 1;
        the sum is clipped to the bounds
    :param epsilon: Probability of a uniformly random action in place of the agent's
    :raises ValueError: The noise is negative, or epsilon no probability
    """

    deterministic: bool = False
    noise_std: float = 0.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_std < float("inf"):
            raise ValueError(f"The standard deviation of the noise must be at least 0, found {self.noise_std}.")
        if not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"The probability of a random action must be from 0 to 1, found {self.epsilon}.")

    def in_words(self) -> str:
        """What it does, for descriptions."""
        words = ["deterministic actions" if self.deterministic else "actions drawn from the policy"]
        if self.noise_std:
            words.append(f"Gaussian noise of standard deviation {self.noise_std:g} (bounds at -1 and 1)")
        if self.epsilon:
            words.append(f"a uniformly random action with probability {self.epsilon:g}")
        return ", ".join(words)


def collect_dataset(
    dataset_id: str,
    env_id: str,
    *,
    algorithm: str | None = None,
    log_folder: str | Path = "logs",
    agent: str | Path | None = None,
    exp_id: int = 0,
    load_best: bool = False,
    vecnormalize: str | Path | None = None,
    n_steps: int | None = None,
    n_episodes: int | None = None,
    behaviour: Behaviour | None = None,
    seed: int = 0,
    device: str = "auto",
    facts: dict[str, Any] | None = None,
    command: str | None = None,
    overwrite: bool = False,
    keep_in: str | Path | None = None,
    console: Console | None = None,
) -> CollectedDataset:
    """
    Record an agent of rl-zoo3 or SB3, or a uniformly random policy, as a Minari dataset.

    The same arguments give the same data to the bit, on the same machine with the same versions. Whole episodes are
    recorded, with the ends that the agent saw, whichever of its wrappers they came from; the last one may go beyond
    ``n_steps``, or is cut there if there is no time limit. On Ctrl-C the episodes that are complete are written.

    :param dataset_id: The new dataset's id
    :param env_id: Gymnasium id of the environment; ``module:id`` imports the module first
    :param algorithm: rl-zoo3's name of the agent's algorithm, such as ``sac``, or ``random`` for a uniformly random policy.
        May be left out with an ``agent`` of SB3 or sb3-contrib
    :param log_folder: rl-zoo3's folder with trained agents
    :param agent: The agent's ``.zip``, instead of looking for it in ``log_folder``
    :param exp_id: rl-zoo3's number of the run; 0 is the latest, -1 a folder without runs
    :param load_best: Take the run's best model instead of the last one
    :param vecnormalize: Statistics of a ``VecNormalize`` for an ``agent`` that was trained with one. For agents in a folder
        of rl-zoo3's form its own are found
    :param n_steps: Number of steps to record
    :param n_episodes: Number of episodes to record, instead of ``n_steps``
    :param behaviour: How the agent acts
    :param seed: Seed of everything: torch's, NumPy's and Python's generators are seeded too
    :param device: Torch device of the agent
    :param facts: Metadata: any of ``algorithm_name, author, author_email, code_permalink, description, requirements``
    :param command: The command line, for the description
    :param overwrite: Replace a dataset with this id
    :param keep_in: Folder that gets the dataset if it cannot be written to its place, as on a full disk. ``OSError`` is raised
        then too
    :param console: Where to show the progress; nothing is shown if omitted
    :return: What was recorded
    :raises OSError: There is no such agent, or the dataset cannot be written: the message says what became of it
    :raises FileExistsError: There is such a dataset already, or there is one by the end: then the new one is kept, in
        ``keep_in`` or under the next free version, and the message says where
    :raises ValueError: The arguments do not go together, or the environment cannot be recorded
    """
    check_new_id(dataset_id, overwrite)
    if (n_steps is None) == (n_episodes is None):
        raise ValueError("Say how much to record: either a number of steps or a number of episodes.")
    wanted = (n_episodes if n_steps is None else n_steps) or 0
    if wanted < 1:
        raise ValueError(f"Record at least one step or episode, found {wanted}.")
    behaviour, console = behaviour or Behaviour(), console or PlainConsole(quiet=True)
    if algorithm == RANDOM and (agent is not None or behaviour != Behaviour()):
        raise ValueError("A random policy has no agent, no noise and is not deterministic: leave these options out.")
    env_id = _import_environment(env_id)
    # The zoo prints what it does
    with redirect_stdout(io.StringIO()):
        file = None if agent is None else Path(agent)
        saved = SavedAgent()
        if algorithm != RANDOM:
            saved = find_agent(env_id, algorithm, Path(log_folder), file, exp_id, load_best)
        venv = saved.make_environment(env_id, seed, vecnormalize)
    with closing(venv):
        recorder = recorder_in(venv.unwrapped.envs[0])  # type: ignore[attr-defined]
        check_spaces_supported(recorder.observation_space, recorder.action_space, f"Environment {env_id!r}")
        model = saved.load(venv, seed, device)
        if saved.file is not None:
            console.print(Text(f"Agent: {saved.file}"))
        set_random_seed(seed)
        actor = _Actor(model, venv, behaviour, derive_seed(seed, _EXPLORATION_STREAM))
        rollout = _Rollout(recorder, venv, actor, wanted, n_steps is not None, console)
        description = _description(env_id, saved, behaviour, n_steps, seed, command)
        folder: Path | None = None
        try:
            folder = write_minari(
                dataset_id,
                rollout,
                observation_space=recorder.observation_space,
                action_space=recorder.action_space,
                env=recorder.env,
                facts=_facts(recorder.env, saved, description, facts),
                overwrite=overwrite,
                keep_in=keep_in,
            )
        except ValueError:
            # That there is nothing to write is no mistake after Ctrl-C
            if not rollout.ended_by or rollout.returns:
                raise
    return CollectedDataset(dataset_id, folder, rollout.n_steps, np.array(rollout.returns), rollout.ended_by)


class _Actor:
    """Chooses actions: the agent's, with what the behaviour adds to them."""

    def __init__(self, model: BaseAlgorithm | None, venv: VecEnv, behaviour: Behaviour, seed: int) -> None:
        assert isinstance(venv.action_space, spaces.Box)
        self.model, self.behaviour, self.space = model, behaviour, venv.action_space
        self.low, self.high = self.space.low, self.space.high
        self.generator = np.random.default_rng(seed)
        if not self.space.is_bounded() and (model is None or behaviour.noise_std or behaviour.epsilon):
            raise ValueError(f"Random actions and noise need actions with finite bounds, found {self.space}.")
        self.state: Any = None
        self.starts = np.ones(1, np.bool_)

    def act(self, observation: Any) -> npt.NDArray[Any]:
        if self.model is None:
            return self._uniform()
        actions, self.state = self.model.predict(
            observation, state=self.state, episode_start=self.starts, deterministic=self.behaviour.deterministic
        )
        if self.behaviour.noise_std:
            noise = self.generator.normal(0.0, self.behaviour.noise_std, actions.shape) * (self.high - self.low) / 2
            actions = np.clip(actions + noise, self.low, self.high).astype(self.space.dtype)
        if self.behaviour.epsilon and self.generator.random() < self.behaviour.epsilon:
            actions = self._uniform()
        return actions

    def _uniform(self) -> npt.NDArray[Any]:
        return self.generator.uniform(self.low, self.high, (1, *self.low.shape)).astype(self.space.dtype)


class _Rollout:
    """Runs the environment and hands out so many steps or episodes, as they are completed, once."""

    def __init__(
        self, recorder: EpisodeRecorder, venv: VecEnv, actor: _Actor, wanted: int, counts_steps: bool, console: Console
    ) -> None:
        self.recorder, self.venv, self.actor, self.console = recorder, venv, actor, console
        self.wanted, self.counts_steps = wanted, counts_steps
        self.returns: list[float] = []
        self.n_steps = 0
        self.ended_by = 0
        spec = venv.unwrapped.envs[0].spec or recorder.env.spec  # type: ignore[attr-defined]
        self.time_limit: int = 0 if spec is None else spec.max_episode_steps or 0

    def __iter__(self) -> Iterator[EpisodeBuffer]:
        n_beyond = 0
        mean = TextColumn("{task.fields[mean]}")
        with stop_on_signals() as stop, progress_bar(self.console, mean) as progress:
            unit = "steps" if self.counts_steps else "episodes"
            task = progress.add_task(f"recording {unit}", total=self.wanted, mean="")
            observation = self.venv.reset()
            while (self.n_steps if self.counts_steps else len(self.returns)) < self.wanted:
                if number := stop():
                    self.ended_by = number
                    return
                observation = self._step(observation)
                n_beyond += self.counts_steps and self.recorder.n_steps >= self.wanted
                if n_beyond > self.time_limit:
                    self.recorder.end(terminated=False)
                while self.recorder.complete:
                    episode = self.recorder.complete.pop(0)
                    self.returns.append(float(np.sum(episode.rewards)))
                    self.n_steps += len(episode)
                    progress.update(task, mean=f"mean return {np.mean(self.returns):.1f}")
                    yield episode
                done = self.recorder.n_steps if self.counts_steps else len(self.returns)
                progress.update(task, completed=min(done, self.wanted))

    def _step(self, observation: Any) -> Any:
        n_ended = self.recorder.n_ended
        observation, _, dones, infos = self.venv.step(self.actor.act(observation))
        self.actor.starts = np.asarray(dones, np.bool_)
        if dones[0] and self.recorder.n_ended == n_ended:
            # A wrapper of the vectorised environment ended it
            self.recorder.end(terminated=not infos[0].get("TimeLimit.truncated", False))
        return observation


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Let the first SIGINT (Ctrl-C) or SIGTERM ask for an end instead of making one; what comes says which did, or 0."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked = 0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        asked = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _import_environment(env_id: str) -> str:
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    try:
        gym.spec(name)
    except gym.error.Error as error:
        raise ValueError(f"Unknown environment {name!r} ({error})") from None
    return name


def _facts(env: gym.Env[Any, Any], agent: SavedAgent, description: str, given: dict[str, Any] | None) -> dict[str, Any]:
    scores = None if env.spec is None else reference_scores_for(env.spec.id)
    packages = ["gymnasium"]
    if "mujoco" in str(env.spec.entry_point if env.spec is not None else ""):
        packages.append("mujoco")
    return {
        "algorithm_name": agent.name,
        "description": description,
        "requirements": [f"{package}=={importlib.metadata.version(package)}" for package in packages],
        **({} if scores is None else {"ref_min_score": scores.random, "ref_max_score": scores.expert}),
        **{key: value for key, value in (given or {}).items() if value is not None},
    }


def _description(
    env_id: str, agent: SavedAgent, behaviour: Behaviour, n_steps: int | None, seed: int, command: str | None
) -> str:
    who = "a uniformly random policy"
    if agent.file is not None:
        digest = hashlib.sha256(agent.file.read_bytes()).hexdigest()
        who = f"the {agent.name} agent {agent.file.name} (SHA-256 {digest}), {behaviour.in_words()}"
    how = f" Command: {command}." if command else ""
    versions = {"Python": platform.python_version(), **installed_versions(_VERSIONS)}
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    cut = "" if n_steps is None else f", but the last one may be cut once there are {n_steps} steps"
    return f"{env_id} driven by {who}; whole episodes{cut}, seed {seed}.{how} Versions: {installed}."
