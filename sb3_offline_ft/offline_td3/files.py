"""What saving and loading translate: a learner's parts to a file's names and back, and files of others to ours."""

import copy
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, load_from_zip_file, open_path
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import TD3Policy

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.checkpoints import resume
from sb3_offline_ft.common.checks import constructor_arguments, known_keywords
from sb3_offline_ft.common.io import arrays_from_text, arrays_to_text, atomic_write, naming_damage
from sb3_offline_ft.common.plain_settings import add_plain_settings, naming_misfit, without_pickle
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets import load_dataset, without_trust
from sb3_offline_ft.offline_td3.acting import LEARNED_PREFIX
from sb3_offline_ft.offline_td3.data import N_STEP_KEYWORDS, has_own_buffer_class, refuse_keywords
from sb3_offline_ft.offline_td3.learner import OfflineLearner
from sb3_offline_ft.offline_td3.life_cycle import SAVED_AS
from sb3_offline_ft.policies.averaging import LearnedWeights
from sb3_offline_ft.policies.frozen import weights_from_arrays
from sb3_offline_ft.policies.guide import NOT_SAVED
from sb3_offline_ft.policies.policies import OfflinePolicy

SelfSavedLearner = TypeVar("SelfSavedLearner", bound="SavedLearner")
File = str | pathlib.Path | io.BufferedIOBase
ZIP_MAGIC = b"PK"
TRUST_VARIABLE = "SB3_OFFLINE_FT_TRUST_PICKLE"


# Models


@contextmanager
def written_whole(path: File, suffix: str) -> Iterator[Any]:
    """Open what SB3 would, under the name that it would choose, to be written whole or not at all; a stream is kept."""
    if isinstance(path, io.BufferedIOBase):
        yield path
        return
    file = pathlib.Path(path)
    file = file if file.suffix else pathlib.Path(f"{file}.{suffix}")
    if file.is_dir():
        warn(f"Path '{file}' is a folder. Will save instead to {file}_2")
        file = pathlib.Path(f"{file}_2")
    with atomic_write(file) as stream:
        yield stream


@contextmanager
def as_in_file(learner: "SavedLearner") -> Iterator[None]:
    """For the duration of the block, the learner's attributes are what a file shall hold, under their names there."""
    cycle = learner.life_cycle
    # A file whose pretraining is complete counts as pretrained, whatever `offline_steps` a preset gives to `load`
    cycle.offline_is_finished |= learner.offline_steps_done > 0 and learner.remaining_offline_steps == 0
    facts = {
        "has_trained_weights": np.array(learner.has_trained_weights),
        "defaults": np.array(json.dumps(_own_defaults(type(learner)), default=repr)),
    }
    shown: dict[str, Any] = {
        **cycle.state_dict(),
        "_episode_steps": learner.acting.episode_steps,
        "_extra_state": arrays_to_text(learner.extra_state() | facts),
    }
    if learner.dataset is not None and not isinstance(learner.dataset, str):
        given = learner.offline_dataset or load_dataset(learner.dataset)
        # Without the fingerprint the file would not tell that there was data
        learner.dataset_fingerprint = learner.dataset_fingerprint or given.fingerprint
        shown["dataset"] = given.spec
    elif learner.dataset is not None:
        shown["dataset"] = without_trust(learner.dataset)
    if has_own_buffer_class(learner) and learner.n_steps > 1:
        # So that SB3's TD3, too, makes the buffer for n-step returns
        n_step = {"n_steps": learner.n_steps, "gamma": learner.gamma}
        shown["replay_buffer_kwargs"] = {**learner.replay_buffer_kwargs, **n_step}
    if learner.guide_policy is not None and not isinstance(learner.guide_policy, str):
        shown["guide_policy"] = NOT_SAVED
    if cycle.environment_steps is not None:
        shown["num_timesteps"] = cycle.environment_steps
    live = {name: vars(learner)[name] for name in shown.keys() & vars(learner).keys()}
    vars(learner).update(shown)
    try:
        yield
    finally:
        for name in shown:
            del vars(learner)[name]
        vars(learner).update(live)


def take_up(learner: "SavedLearner", replaced: Mapping[str, Any], is_dataset_given: bool) -> None:
    """Turn what SB3 has read from a file into the learner's parts; some arguments were given instead of the file's."""
    read, cycle = vars(learner), learner.life_cycle
    text = read.pop("_extra_state", None)
    state = {} if text is None else arrays_from_text(text)
    cycle.load_state_dict({name: read.pop(name) for name in SAVED_AS if name in read})
    learner.acting.episode_steps = read.pop("_episode_steps", learner.acting.episode_steps)
    # Former versions wrote it here too
    read.pop("_best_mean_reward", None)
    # What SB3's TD3 saved is pretrained elsewhere
    cycle.offline_is_finished |= text is None
    cycle.is_pretrained = bool(state.get("has_trained_weights", True))
    if not is_dataset_given:
        # Whoever made the file cannot say that its user trusts the data
        learner.dataset = without_trust(learner.dataset)
    if "dataset" in replaced and replaced["dataset"] is None:
        learner.dataset_fingerprint = None
    if cycle.is_pretrained and "learning_starts" not in replaced:
        # Random actions were for the saved run's beginning, not for weights that are trained
        learner.learning_starts = 0
    if cycle.offline_is_finished and learner.dataset is not None and learner.offline_steps > cycle.offline_steps_done:
        if learner.verbose >= 1:
            print("The loaded model counts as pretrained: no offline steps are left to do. For more, call `pretrain`.")
    learner.load_extra_state(state)


def arguments_for(
    cls: type["SavedLearner"],
    path: File,
    replaced: dict[str, Any],
    given: Mapping[str, Any],
    objects: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    All arguments that shall replace a file's: those that are given, and what another algorithm left at its default, which is
    here at ours, as for a learner that is constructed.
    """
    # Those in the file are written by `save`
    refuse_keywords(replaced.get("replay_buffer_kwargs") or {}, *N_STEP_KEYWORDS)
    if cls.policy_defaults and "policy_kwargs" in replaced:
        others = {name: value for name, value in given.items() if name != "policy_kwargs"}
        stored, _, _ = load_from_zip_file(path, custom_objects=others | dict(objects or {}), device="cpu")
        complete = None if stored is None else with_policy_defaults(cls, stored["policy_class"], replaced["policy_kwargs"])
        if stored is not None and complete == stored["policy_kwargs"]:
            replaced = replaced | {"policy_kwargs": complete}
    settings = _read_settings(path)
    state = arrays_from_text(settings["_extra_state"]) if settings.get("_extra_state") is not None else {}
    if "defaults" not in state:
        return replaced
    saved, own, common = json.loads(str(state["defaults"])), _own_defaults(cls), _common_arguments(cls)
    # A loaded agent takes no random actions, and an average that there is goes on
    kept = {"learning_starts"} | ({"policy_averaging"} if weights_from_arrays(state, LEARNED_PREFIX) else set())
    names = [name for name in common if name in saved.keys() | own.keys() and name not in given.keys() | kept]
    return {
        name: own.get(name, common[name]) for name in names if settings.get(name) == saved.get(name, common[name])
    } | replaced


def with_policy_defaults(
    cls: type["SavedLearner"], policy: str | type[TD3Policy], policy_kwargs: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The arguments of a policy, with the algorithm's own defaults if it is one of this package's."""
    if cls.policy_defaults and (isinstance(policy, str) or issubclass(policy, OfflinePolicy)):
        return {**cls.policy_defaults, **(policy_kwargs or {})}
    return policy_kwargs


def _common_arguments(cls: type["SavedLearner"]) -> dict[str, Any]:
    """The arguments that all algorithms share, those of :class:`OfflineTD3`, with its defaults."""
    return constructor_arguments([base for base in cls.__mro__ if issubclass(base, SavedLearner)][-2])


def _own_defaults(cls: type["SavedLearner"]) -> dict[str, Any]:
    """Defaults of arguments of :class:`OfflineTD3` that an algorithm changes."""
    own = constructor_arguments(cls)
    return {name: own[name] for name, default in _common_arguments(cls).items() if name in own and own[name] != default}


def _read_settings(path: File) -> dict[str, Any]:
    """The plain settings in a zip file that SB3 saved; nothing is unpickled. Of a damaged one SB3 tells what is wrong."""
    if not isinstance(path, io.BufferedIOBase):
        with open_path(path, "r", verbose=0, suffix="zip") as file:
            return _read_settings(file)
    start = path.tell()
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(json.loads(archive.read("data")))
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError):
        return {}
    finally:
        path.seek(start)


# Replay buffers


def buffer_file(path: File) -> File:
    """What a path means under which a replay buffer is saved: without a suffix, a file of ours."""
    if isinstance(path, io.BufferedIOBase):
        return path
    path = pathlib.Path(path)
    return path if path.suffix else path.with_suffix(".npz")


def existing_buffer_file(path: File) -> File:
    """What a path means under which a replay buffer was saved: without a suffix, our file, or else SB3's."""
    if isinstance(path, io.BufferedIOBase) or pathlib.Path(path).suffix or pathlib.Path(path).exists():
        return path if isinstance(path, io.BufferedIOBase) else pathlib.Path(path)
    ours, theirs = pathlib.Path(path).with_suffix(".npz"), pathlib.Path(path).with_suffix(".pkl")
    return theirs if theirs.exists() and not ours.exists() else ours


def is_pickle(path: File) -> bool:
    """Whether a replay buffer is SB3's: rl-zoo3 names ours ``.pkl`` too."""
    if isinstance(path, io.BufferedIOBase):
        start = path.read(len(ZIP_MAGIC))
        path.seek(-len(start), io.SEEK_CUR)
        return start != ZIP_MAGIC
    with open(path, "rb") as file:
        return pathlib.Path(path).suffix == ".pkl" and file.read(len(ZIP_MAGIC)) != ZIP_MAGIC


def check_is_trusted(path: File, trust_pickle: bool) -> None:
    """Check that the caller or the environment variable says that a pickle is trusted."""
    if not (trust_pickle or os.environ.get(TRUST_VARIABLE) == "1"):
        raise ValueError(
            f"{path} is no replay buffer of this package but a pickle file, which runs whatever code it holds when it is "
            "read. If you trust it, say so: `load_replay_buffer(path, trust_pickle=True)`, or set the environment "
            f"variable {TRUST_VARIABLE}=1 for the file that rl-zoo3 finds beside `-i`; else move it away."
        )


def unpickle_buffer(path: File) -> ReplayBuffer:
    """The replay buffer in a pickle that is trusted."""
    # SB3 leaves a file open that it cannot read
    with open(path, "rb") if isinstance(path, str | pathlib.Path) else nullcontext(path) as stream:
        with naming_damage(str(path), "a replay buffer"):
            loaded = load_from_pkl(stream)
    if not isinstance(loaded, ReplayBuffer):
        raise ValueError(f"{path} holds a {type(loaded).__name__}: expected a ReplayBuffer.")
    return loaded


class SavedLearner(OfflineLearner):
    """A learner whose files hold its parts, and are exchanged with those of Stable-Baselines3's TD3."""

    policy_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Defaults that ``policy_kwargs`` have with the policies of this package."""
    moved_settings: ClassVar[tuple[str, ...]] = ("offline_fraction",)
    """Arguments that a remedy may change in a run."""

    def _excluded_save_params(self) -> list[str]:
        parts = ["life_cycle", "updater", "evaluations", "room", "acting", "_noise_generator", "_guide_steps_schedule"]
        return [*super()._excluded_save_params(), *parts]

    def _stateful_parts(self) -> dict[str, Any]:
        """
        What a learner keeps besides networks, optimizers and counters, by name: objects with ``state_dict()``, which returns
        arrays by names that no other part has, and ``load_state_dict(state)``, which is given the arrays of all parts, or none
        of a file of another algorithm.
        """
        return {"randomness": self._randomness, "evaluations": self.evaluations, "acting": self.acting}

    def extra_state(self) -> dict[str, np.ndarray]:
        """The state of what a learner keeps besides networks, optimizers and counters; its memory may be the learner's."""
        return self._get_extra_state()

    def load_extra_state(self, state: Mapping[str, np.ndarray], generators: bool = True) -> None:
        """
        :param state: What :meth:`extra_state` of this or a related algorithm returned; empty for a file saved by SB3's TD3
        :param generators: Whether to restore the streams of random numbers too
        """
        skipped = () if generators else self._randomness.state_dict()
        self._set_extra_state({name: array for name, array in state.items() if name not in skipped})

    def _get_extra_state(self) -> dict[str, np.ndarray]:
        """The arrays of all parts, to which a subclass may add its own."""
        return {name: array for part in self._stateful_parts().values() for name, array in part.state_dict().items()}

    def _set_extra_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what :meth:`_get_extra_state` of this or a related algorithm returned, perhaps without random streams."""
        for part in self._stateful_parts().values():
            part.load_state_dict(state)

    @classmethod
    def resume(cls: type[SelfSavedLearner], folder: str | pathlib.Path, env: GymEnv, **arguments: Any) -> SelfSavedLearner:
        """
        Make the learner of a run that has died, from the newest intact checkpoint that a
        :class:`~sb3_offline_ft.CheckpointRun` wrote. Its next call of ``learn`` or ``pretrain``, which is to be given what the
        call that died was given, goes on there (see :func:`sb3_offline_ft.resume`).

        :param folder: The run's folder
        :param env: The environment, made as it was made for the run
        :param arguments: Arguments of the constructor that a checkpoint cannot hold, such as data that is an object
        :return: The learner
        :raises ValueError: There is no intact checkpoint, or it is of another algorithm, version, environment or dataset
        """
        return cast(SelfSavedLearner, resume(folder, env, cls, **arguments))

    def arguments_for_files(self) -> dict[str, Any]:
        """Arguments that a file shall hold in another form: whoever reads it has not said that the data is trusted."""
        return {"dataset": None if self.dataset is None else without_trust(self.dataset)}

    def run_state(self) -> dict[str, Any]:
        """What a run in progress has beyond what a snapshot of the learner holds, as plain values and arrays."""
        cycle = self.life_cycle
        return {
            "life_cycle": cycle.state_dict(),
            "environment_steps": cycle.environment_steps,
            "episode_steps": self.acting.episode_steps.copy(),
            "best_mean_reward": self.evaluations.mean_reward,
            "dataset_fingerprint": self.dataset_fingerprint,
            "settings": {name: getattr(self, name) for name in self.moved_settings if not callable(getattr(self, name))},
        }

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`run_state` returned, but for the phase, which is that of the present call."""
        self.life_cycle.load_state_dict(state["life_cycle"])
        self.acting.episode_steps = state["episode_steps"].copy()
        self.evaluations.mean_reward = state["best_mean_reward"]
        for name, value in state["settings"].items():
            self._move_setting(name, value)

    def episodes_are_cut(self) -> None:
        """Other episodes have begun in place of those that ran."""
        self.acting.episode_steps = np.zeros(self.n_envs, dtype=int)
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.cut_episodes()

    def _move_setting(self, name: str, value: Any) -> None:
        """Set an argument of :attr:`moved_settings` again."""
        setattr(self, name, value)
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.offline_fraction = self.offline_fraction

    def position(self) -> dict[str, Any]:
        """What says how updates are done, but for what counts progress."""
        return {"learning_starts": self.learning_starts, **self.life_cycle.position()}

    def set_position(self, position: Mapping[str, Any]) -> None:
        """Take up what :meth:`position` returned; other names are ignored."""
        self.learning_starts = position.get("learning_starts", self.learning_starts)
        self.life_cycle.load_state_dict(position)

    def save(self, path: File, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file, whole or not at all: a full disk or a
        kill leaves the file that was there.

        The dataset is not in it, only its fingerprint and its spec, without any ``trust_pickle``. SB3's ``TD3.load`` and the
        ``load`` of the other algorithms of this package open the file too.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        content = io.BytesIO()
        with as_in_file(self):
            super().save(content, exclude, include)
            add_plain_settings(content, self)
        with written_whole(path, "zip") as file:
            file.write(content.getbuffer())

    @classmethod
    def load(
        cls: type[SelfSavedLearner],
        path: File,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        safe_load: bool = False,
        **kwargs: Any,
    ) -> SelfSavedLearner:
        """
        Load a model saved by this class, by another algorithm of this package or by SB3's TD3. As SB3's own, this unpickles
        settings, which runs whatever code the file holds; with ``safe_load`` nothing is unpickled.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on (can be None if you only need prediction)
        :param device: Device on which the code should run
        :param custom_objects: Dictionary of objects to replace upon loading
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training
        :param safe_load: Whether to read settings from plain JSON and text only, see :func:`sb3_offline_ft.safe_load`
        :param kwargs: constructor arguments that shall replace the saved ones
        :return: new model instance with loaded parameters
        :raises TypeError: A keyword is not an argument of the constructor
        :raises ValueError: With ``safe_load``, the file needs something that cannot be made without unpickling; names it
        """
        known_keywords(cls, kwargs, f"{cls.__name__}.load", excluded=("policy", "env", "device", "_init_setup_model"))
        given = {**(custom_objects or {}), **kwargs}
        named = path
        if safe_load:
            path, objects = without_pickle(path, cls, env, given)
            custom_objects = objects | (custom_objects or {})
        with naming_misfit(named) if safe_load else nullcontext():
            kwargs = arguments_for(cls, path, kwargs, given, custom_objects)
            model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
            take_up(model, kwargs, "dataset" in given)
        if kwargs.get("seed") is not None:
            # A new seed asks for new random streams, not for the saved ones
            model._randomness.seed(kwargs["seed"])
        return model

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, as in SB3. The agent counts as pretrained then.

        :param load_path_or_dict: Location of the saved data, or a nested dictionary (see ``get_parameters``)
        :param exact_match: Whether the parameters of each module must be given
        :param device: Device on which the code should run
        """
        if isinstance(load_path_or_dict, dict):
            # Optimizers keep the tensors that they are given, which may be those of another learner
            load_path_or_dict = copy.deepcopy(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)
        self.life_cycle.is_pretrained = True
        if self.acting.learned_weights is not None:
            self.acting.learned_weights = LearnedWeights(self.actor)

    def save_replay_buffer(self, path: File) -> None:
        """
        Save the online part of the replay buffer and the state of the offline sampler, without pickle.

        :param path: The file, to which ``.npz`` is added if it has no suffix, or a binary stream
        """
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            # A binary stream is one in all but name
            self.replay_buffer.save_online(buffer_file(path))  # type: ignore[arg-type]
        else:
            with written_whole(path, "pkl") as file:
                super().save_replay_buffer(file)

    def load_replay_buffer(self, path: File, truncate_last_traj: bool = True, trust_pickle: bool = False) -> None:
        """
        Load the online part of the replay buffer. The offline part comes from the dataset and stays.

        A pickle saved by SB3 is accepted as well if you trust it.

        :param path: The file or binary stream
        :param truncate_last_traj: For SB3's ``HerReplayBuffer`` only
        :param trust_pickle: Whether a pickle may be read: that runs code which it holds. The environment variable
            ``SB3_OFFLINE_FT_TRUST_PICKLE=1`` says so too, for the file that rl-zoo3 loads beside ``-i``
        :raises ValueError: It is damaged, or a pickle that is not trusted, or was saved for other spaces or another number of
            environments; nothing is changed then
        """
        path, buffer = existing_buffer_file(path), self.replay_buffer
        if isinstance(buffer, OfflineToOnlineReplayBuffer) and not is_pickle(path):
            buffer.load_online(path)  # type: ignore[arg-type]
            return
        check_is_trusted(path, trust_pickle)
        if isinstance(buffer, OfflineToOnlineReplayBuffer):
            buffer.copy_online(unpickle_buffer(path), str(path))
        else:
            super().load_replay_buffer(path, truncate_last_traj)
