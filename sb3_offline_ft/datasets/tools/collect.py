"""New datasets from agents: roll out, record what the environment itself saw, and write a Minari dataset."""

import hashlib
import importlib
import importlib.metadata
import io
import json
import platform
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
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
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.datasets.files.minari_writing import check_new_id, write_minari
from sb3_offline_ft.datasets.files.zoo import ARGUMENTS, read_zoo_yaml, saved_hyperparams
from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.datasets.spaces import check_spaces_supported
from sb3_offline_ft.datasets.tools.convert import progress_bar

RANDOM = "random"
"""Name of the uniformly random policy."""

_EXPLORATION_STREAM = 1 << 31
_VERSIONS = ("stable-baselines3", "gymnasium", "mujoco", "numpy", "torch", "rl_zoo3", "sb3-offline-ft")


@dataclass(frozen=True)
class CollectedDataset:
    """What came of a collection.

    :param dataset_id: The Minari id.
    :param folder: Where the dataset is, ``None`` if no episode was complete when it was interrupted.
    :param transitions: Number of rows.
    :param returns: Undiscounted return of each episode.
    :param interrupted: Whether it was ended by Ctrl-C (SIGINT) or SIGTERM.
    """

    dataset_id: str
    folder: Path | None
    transitions: int
    returns: npt.NDArray[np.float64]
    interrupted: bool


@dataclass(frozen=True)
class Behaviour:
    """How an agent acts while it is recorded.

    :param deterministic: Take the mean or mode of a stochastic policy instead of drawing from it.
    :param noise_std: Standard deviation of Gaussian noise added to the actions, on the scale where their bounds are -1 and 1;
        the sum is clipped to the bounds.
    :param epsilon: Probability of a uniformly random action in place of the agent's.
    :raises ValueError: if the noise is negative or epsilon no probability.
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
        """
        :return: What it does, for descriptions.
        """
        words = ["deterministic actions" if self.deterministic else "actions drawn from the policy"]
        if self.noise_std:
            words.append(f"Gaussian noise of standard deviation {self.noise_std:g} (bounds at -1 and 1)")
        if self.epsilon:
            words.append(f"a uniformly random action with probability {self.epsilon:g}")
        return ", ".join(words)


class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """Records the episodes of an environment, and seeds each of them.

    Used as the innermost wrapper it sees what the environment itself sees, whatever wrappers the agent needs around it. Where
    an episode ends it is told (:meth:`end`), as those wrappers may end episodes, or let them go on.
    Minari's ``DataCollector`` needs jax, and draws its seeds from the operating system whenever a vectorised environment
    resets itself.

    :param env: The environment; a ``Monitor`` around it is taken off, as the spec of one with it cannot be recovered.
    :param seed: The number that the seeds of the episodes are derived from.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int = 0) -> None:
        super().__init__(env.env if isinstance(env, Monitor) else env)
        self.seed, self.n_resets = seed, 0
        self.n_steps = self.n_ended = 0
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
        self._begin([_copied(observation)], episode_seed)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Record a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(np.array(action))
        self._rewards.append(float(reward))
        self._observations.append(_copied(observation))
        self.n_steps += 1
        self._has_terminated = bool(terminated)
        return observation, reward, bool(terminated), bool(truncated), info

    def end(self, terminated: bool) -> None:
        """End the running episode here, if it has steps. Without a reset the next one begins at its last observation.

        :param terminated: Whether it is a termination, else a truncation.
        """
        length = len(self._rewards)
        if not length:
            return
        self.n_ended += 1
        terminations, truncations = np.zeros((2, length), np.bool_)
        terminations[-1], truncations[-1] = terminated, not terminated
        first = self._observations[0]
        observations = (
            {key: np.stack([one[key] for one in self._observations]) for key in first}
            if isinstance(first, dict)
            else np.stack(self._observations)
        )
        self.complete.append(
            EpisodeBuffer(
                seed=self._episode_seed,
                observations=observations,
                actions=np.stack(self._actions),
                rewards=np.array(self._rewards),
                terminations=terminations,
                truncations=truncations,
            )
        )
        self._begin(self._observations[-1:], None)

    def cut(self) -> None:
        """End the running episode here, as a truncation."""
        self.end(terminated=False)


class _EpisodeEnds(gym.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper: it tells the recorder where episodes end for the agent."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.recorder = _recorder(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.recorder.end(bool(terminated))
        return observation, reward, bool(terminated), bool(truncated), info


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
    """Record an agent of rl-zoo3 or SB3, or a uniformly random policy, as a Minari dataset.

    The same arguments give the same data to the bit, on the same machine with the same versions. Whole episodes are
    recorded, with the ends that the agent saw, whichever of its wrappers they came from; the last one may go beyond
    ``n_steps``, or is cut there if there is no time limit. On Ctrl-C the episodes that are complete are written.

    :param dataset_id: The new dataset's id.
    :param env_id: Gymnasium id of the environment; ``module:id`` imports the module first.
    :param algorithm: rl-zoo3's name of the agent's algorithm, such as ``sac``, or ``random`` for a uniformly random policy.
        May be left out with an ``agent`` of SB3 or sb3-contrib.
    :param log_folder: rl-zoo3's folder with trained agents.
    :param agent: The agent's ``.zip``, instead of looking for it in ``log_folder``.
    :param exp_id: rl-zoo3's number of the run; 0 is the latest, -1 a folder without runs.
    :param load_best: Take the run's best model instead of the last one.
    :param vecnormalize: Statistics of a ``VecNormalize`` for an ``agent`` that was trained with one. For agents in a folder
        of rl-zoo3's form its own are found.
    :param n_steps: Number of steps to record.
    :param n_episodes: Number of episodes to record, instead of ``n_steps``.
    :param behaviour: How the agent acts.
    :param seed: Seed of everything: torch's, NumPy's and Python's generators are seeded too.
    :param device: Torch device of the agent.
    :param facts: Metadata: any of ``algorithm_name, author, author_email, code_permalink, description, requirements``.
    :param command: The command line, for the description.
    :param overwrite: Replace a dataset with this id.
    :param keep_in: Folder that gets the dataset if it cannot be written to its place, as on a full disk. ``OSError`` is raised
        then too.
    :param console: Where to show the progress; nothing is shown if omitted.
    :return: What was recorded.
    :raises OSError: if there is no such agent, or the dataset cannot be written: the message says what became of it.
    :raises FileExistsError: if there is such a dataset already, or there is one by the end: then the new one is kept, in
        ``keep_in`` or under the next free version, and the message says where.
    :raises ValueError: if the arguments do not go together, or the environment cannot be recorded.
    """
    check_new_id(dataset_id, overwrite)
    if (n_steps is None) == (n_episodes is None):
        raise ValueError("Say how much to record: either a number of steps or a number of episodes.")
    if (wanted := n_episodes if n_steps is None else n_steps) is not None and wanted < 1:
        raise ValueError(f"Record at least one step or episode, found {wanted}.")
    behaviour = behaviour or Behaviour()
    is_random = algorithm == RANDOM
    if is_random and (agent is not None or behaviour != Behaviour()):
        raise ValueError("A random policy has no agent, no noise and is not deterministic: leave these options out.")
    console = console or Console(quiet=True)
    env_id = _import_environment(env_id)
    # The zoo prints what it does
    with redirect_stdout(io.StringIO()):
        loaded = _Agent.random() if is_random else _Agent.find(env_id, algorithm, Path(log_folder), agent, exp_id, load_best)
        venv = loaded.environment(env_id, seed, vecnormalize)
    try:
        recorder = _recorder(venv.unwrapped.envs[0])  # type: ignore[attr-defined]
        check_spaces_supported(recorder.observation_space, recorder.action_space, f"Environment {env_id!r}")
        assert isinstance(recorder.action_space, spaces.Box)
        model = None if is_random else loaded.load(venv, seed, device)
        if loaded.file is not None:
            console.print(Text(f"Agent: {loaded.file}"))
        set_random_seed(seed)
        actor = _Actor(model, venv, behaviour, derive_seed(seed, _EXPLORATION_STREAM))
        rollout = _Rollout(recorder, venv, actor, n_steps, n_episodes, console)
        spec = recorder.env.spec
        scores = None if spec is None else reference_scores_for(spec.id)
        described = {
            "algorithm_name": loaded.name,
            "description": _description(env_id, loaded, behaviour, n_steps, seed, command),
            "requirements": _requirements(recorder.env),
            **({} if scores is None else {"ref_min_score": scores.random, "ref_max_score": scores.expert}),
            **{key: value for key, value in (facts or {}).items() if value is not None},
        }
        folder: Path | None = None
        try:
            folder = write_minari(
                dataset_id,
                rollout,
                observation_space=recorder.observation_space,
                action_space=recorder.action_space,
                env=recorder.env,
                facts=described,
                overwrite=overwrite,
                keep_in=keep_in,
            )
        except ValueError:
            if not rollout.interrupted or rollout.returns:
                raise
    finally:
        venv.close()
    return CollectedDataset(dataset_id, folder, rollout.n_steps, np.array(rollout.returns), rollout.interrupted)


@dataclass(frozen=True)
class _Agent:
    """An agent on disk, and what rl-zoo3 knows about how it was trained."""

    name: str
    file: Path | None
    algorithm: str | None
    hyperparams: dict[str, Any]
    env_kwargs: dict[str, Any]
    stats_folder: str | None

    @classmethod
    def random(cls) -> "_Agent":
        return cls("uniformly random", None, None, {}, {}, None)

    @classmethod
    def find(
        cls, env_id: str, algorithm: str | None, log_folder: Path, agent: str | Path | None, exp_id: int, load_best: bool
    ) -> "_Agent":
        from huggingface_sb3 import EnvironmentName  # type: ignore[import-untyped]
        from rl_zoo3 import ALGOS
        from rl_zoo3.utils import get_model_path

        env_name = EnvironmentName(env_id)
        if agent is not None:
            file = Path(agent).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"No agent {str(file.absolute())!r}: expected a .zip saved by SB3's model.save().")
            algorithm = algorithm or _algorithm_of(file, ALGOS)
            folder = file.parent
        else:
            if algorithm is None:
                raise ValueError(f"Name the agent's algorithm, one of {', '.join([RANDOM, *ALGOS])}, or its file.")
            if algorithm in ALGOS:
                try:
                    _, path, log_path = get_model_path(exp_id, str(log_folder), algorithm, env_name, load_best)
                except (AssertionError, ValueError) as error:
                    raise FileNotFoundError(
                        f"No trained agent: {str(error).rstrip('.')}. Expected rl-zoo3's form, "
                        f"{log_folder / algorithm / (env_name + '_1') / (env_name + '.zip')}; another file can be named with "
                        "--agent."
                    ) from None
                file, folder = Path(path), Path(log_path)
        if algorithm not in ALGOS:
            raise ValueError(f"Unknown algorithm {algorithm!r}: expected one of {', '.join([RANDOM, *ALGOS])}.")
        stats = folder / env_name
        hyperparams, stats_folder = saved_hyperparams(stats)
        env_kwargs = dict(hyperparams.pop("env_kwargs", None) or {})
        arguments = stats / ARGUMENTS
        if arguments.is_file():
            env_kwargs |= read_zoo_yaml(arguments, ("env_kwargs",)).get("env_kwargs") or {}
        cls_name = ALGOS[algorithm].__name__
        package = ALGOS[algorithm].__module__.partition(".")[0].replace("_", "-")
        return cls(f"{cls_name} ({package})", file, algorithm, hyperparams, env_kwargs, stats_folder)

    def environment(self, env_id: str, seed: int, vecnormalize: str | Path | None) -> VecEnv:
        from rl_zoo3 import create_test_env

        hyperparams = dict(self.hyperparams)
        wrappers = hyperparams.get("env_wrapper") or []
        wrappers = list(wrappers) if isinstance(wrappers, list) else [wrappers]
        hyperparams["env_wrapper"] = [{EpisodeRecorder: {"seed": seed}}, *wrappers, _EpisodeEnds]
        try:
            venv: VecEnv = create_test_env(
                env_id,
                stats_path=self.stats_folder,
                seed=seed,
                should_render=False,
                hyperparams=hyperparams,
                env_kwargs=self.env_kwargs,
            )
        except gym.error.Error as error:
            raise ValueError(f"Cannot make the environment {env_id!r} ({type(error).__name__}: {error}).") from error
        if vecnormalize is not None:
            if self.stats_folder is not None and self.hyperparams.get("normalize"):
                venv.close()
                raise ValueError(
                    f"The agent's folder {self.stats_folder!r} has its own VecNormalize: leave --vecnormalize out."
                )
            if not Path(vecnormalize).is_file():
                venv.close()
                raise FileNotFoundError(f"No VecNormalize {str(Path(vecnormalize).absolute())!r}.")
            venv = VecNormalize.load(str(vecnormalize), venv)
            venv.training = venv.norm_reward = False
        return venv

    def load(self, venv: VecEnv, seed: int, device: str) -> BaseAlgorithm:
        from rl_zoo3 import ALGOS

        assert self.algorithm is not None and self.file is not None
        algorithm: type[BaseAlgorithm] = ALGOS[self.algorithm]
        options: dict[str, Any] = {"seed": seed}
        if issubclass(algorithm, OffPolicyAlgorithm):
            options["buffer_size"] = 1
            if "optimize_memory_usage" in self.hyperparams:
                options["optimize_memory_usage"] = False
        if "HerReplayBuffer" in str(self.hyperparams.get("replay_buffer_class", "")):
            options["env"] = venv
        objects: dict[str, Any] = {"learning_rate": 0.0, "lr_schedule": _zero, "clip_range": _zero}
        try:
            try:
                model = algorithm.load(self.file, custom_objects=objects, device=device, **options)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] != "gym":
                    raise
                # Agents from the time of gym have its spaces inside
                objects |= {"observation_space": venv.observation_space, "action_space": venv.action_space}
                model = algorithm.load(self.file, custom_objects=objects, device=device, **options)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"Cannot load {str(self.file)!r} as {self.algorithm} ({type(error).__name__}: {error})."
            ) from error
        for what in ("observation", "action"):
            ours, theirs = getattr(model, f"{what}_space"), getattr(venv, f"{what}_space")
            if ours.shape != theirs.shape or type(ours) is not type(theirs):
                raise ValueError(
                    f"The agent {str(self.file)!r} does not fit the environment: it was trained with {what}s {ours}, the "
                    f"environment has {theirs}."
                )
        return model


class _Actor:
    """Chooses actions: the agent's, with what the behaviour adds to them."""

    def __init__(self, model: BaseAlgorithm | None, venv: VecEnv, behaviour: Behaviour, seed: int) -> None:
        self.model, self.behaviour = model, behaviour
        self.generator = np.random.default_rng(seed)
        assert isinstance(venv.action_space, spaces.Box)
        self.low, self.high = venv.action_space.low, venv.action_space.high
        self.dtype = venv.action_space.dtype
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()) and (
            model is None or behaviour.noise_std or behaviour.epsilon
        ):
            raise ValueError(f"Random actions and noise need actions with finite bounds, found {venv.action_space}.")
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
            actions = np.clip(actions + noise, self.low, self.high).astype(self.dtype)
        if self.behaviour.epsilon and self.generator.random() < self.behaviour.epsilon:
            actions = self._uniform()
        return actions

    def _uniform(self) -> npt.NDArray[Any]:
        return self.generator.uniform(self.low, self.high, (1, *self.low.shape)).astype(self.dtype)


class _Rollout:
    """Runs the environment and hands out episodes as they are completed, once."""

    def __init__(
        self,
        recorder: EpisodeRecorder,
        venv: VecEnv,
        actor: _Actor,
        n_steps: int | None,
        n_episodes: int | None,
        console: Console,
    ) -> None:
        self.recorder, self.venv, self.actor = recorder, venv, actor
        self.most_steps, self.most_episodes, self.console = n_steps, n_episodes, console
        self.returns: list[float] = []
        self.n_steps = 0
        self.interrupted = False
        spec = venv.unwrapped.envs[0].spec or recorder.env.spec  # type: ignore[attr-defined]
        self.time_limit: int = 0 if spec is None else spec.max_episode_steps or 0

    def __iter__(self) -> Iterator[EpisodeBuffer]:
        mean = TextColumn("{task.fields[mean]}")
        with stop_on_signals() as stop, progress_bar(self.console, mean) as progress:
            total = self.most_steps or self.most_episodes
            unit = "steps" if self.most_steps is not None else "episodes"
            task = progress.add_task(f"recording {unit}", total=total, mean="")
            observation = self.venv.reset()
            n_beyond = 0
            while not self._is_enough():
                if stop():
                    self.interrupted = True
                    return
                n_ended = self.recorder.n_ended
                observation, _, dones, infos = self.venv.step(self.actor.act(observation))
                self.actor.starts = np.asarray(dones, np.bool_)
                if dones[0] and self.recorder.n_ended == n_ended:
                    # A wrapper of the vectorised environment ended it
                    self.recorder.end(terminated=not infos[0].get("TimeLimit.truncated", False))
                n_beyond += self.most_steps is not None and self.recorder.n_steps >= self.most_steps
                if n_beyond > self.time_limit:
                    self.recorder.cut()
                while self.recorder.complete:
                    episode = self.recorder.complete.pop(0)
                    self.returns.append(float(np.sum(episode.rewards)))
                    self.n_steps += len(episode)
                    progress.update(task, mean=f"mean return {np.mean(self.returns):.1f}")
                    yield episode
                done = self.recorder.n_steps if self.most_steps is not None else len(self.returns)
                progress.update(task, completed=min(done, total or done))

    def _is_enough(self) -> bool:
        if self.most_episodes is not None:
            return len(self.returns) >= self.most_episodes
        return self.n_steps >= (self.most_steps or 0)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGINT (Ctrl-C) and SIGTERM ask for an end instead of ending the program at once; a second one does.

    :return: Says whether an end was asked for. Outside the main thread, signals do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copied(observation: Any) -> Any:
    # Environments may change the array that they returned
    if isinstance(observation, dict):
        return {key: np.array(value) for key, value in observation.items()}
    return np.array(observation)


def _zero(_: float) -> float:
    return 0.0


def _import_environment(env_id: str) -> str:
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    if name not in gym.registry:
        try:
            gym.spec(name)
        except gym.error.Error as error:
            raise ValueError(f"Unknown environment {name!r} ({error})") from None
    return name


def _recorder(env: Any) -> EpisodeRecorder:
    while not isinstance(env, EpisodeRecorder):
        env = env.env
    return env


def _algorithm_of(file: Path, known: dict[str, Any]) -> str:
    """Find out from the module of its policy which algorithm saved a model; nothing is unpickled."""
    module = ""
    try:
        with zipfile.ZipFile(file) as archive:
            module = str(json.loads(archive.read("data"))["policy_class"].get("__module__", ""))
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    for name, algorithm in known.items():
        if module and module == f"{algorithm.__module__.rpartition('.')[0]}.policies":
            return name
    raise ValueError(f"{str(file)!r} does not say which algorithm saved it: name it with --algo, one of {', '.join(known)}.")


def _description(env_id: str, agent: _Agent, behaviour: Behaviour, n_steps: int | None, seed: int, command: str | None) -> str:
    if agent.file is None:
        who = "a uniformly random policy"
    else:
        digest = hashlib.sha256(agent.file.read_bytes()).hexdigest()
        who = f"the {agent.name} agent {agent.file.name} (SHA-256 {digest}), {behaviour.in_words()}"
    how = f" Command: {command}." if command else ""
    installed = [f"Python {platform.python_version()}"]
    for package in _VERSIONS:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cut = "" if n_steps is None else f", but the last one may be cut once there are {n_steps} steps"
    return f"{env_id} driven by {who}; whole episodes{cut}, seed {seed}.{how} Versions: {', '.join(installed)}."


def _requirements(env: gym.Env[Any, Any]) -> list[str]:
    packages = ["gymnasium"]
    if "mujoco" in str(env.spec.entry_point if env.spec is not None else ""):
        packages.append("mujoco")
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]
