"""What a learner, its dataset, its replay buffer and its environment must agree in."""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces
from minari import MinariDataset
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.buffers import DictOfflineToOnlineReplayBuffer, OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.checks import KEYWORD_ONLY
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets import OfflineDataset, as_flattened_by, check_spaces_supported, load_dataset, spec_text
from sb3_offline_ft.datasets.keys import flattened_space, leaf_spaces
from sb3_offline_ft.policies.layers import is_vector_space
from sb3_offline_ft.policies.policies import OfflinePolicy

if TYPE_CHECKING:
    from sb3_offline_ft.offline_td3.learner import OfflineLearner

N_STEP_KEYWORDS = ("n_steps", "gamma")
SMALL_BUFFER, SMALL_SHARE = 100_000, 0.1
"""A replay buffer below both, in transitions and as a share of the run's, is rather forgotten than meant."""


# The class of the replay buffer


def has_own_buffer_class(learner: "OfflineLearner") -> bool:
    """Whether the replay buffer is one of this package."""
    return learner.replay_buffer_class is not None and issubclass(learner.replay_buffer_class, OfflineToOnlineReplayBuffer)


def _is_chosen_by_sb3(learner: "OfflineLearner") -> bool:
    """Whether no class was asked for: a zip saved by SB3's TD3 names the one that SB3 chose itself."""
    n_step = learner.n_steps > 1 and learner.replay_buffer_kwargs.get("n_steps") == learner.n_steps
    return learner.replay_buffer_class in [None, ReplayBuffer, DictReplayBuffer, *([NStepReplayBuffer] if n_step else [])]


def choose_buffer_class(learner: "OfflineLearner") -> None:
    """Set the class of the replay buffer if none was asked for, and check the keywords that it gets."""
    if _is_chosen_by_sb3(learner) and not learner.optimize_memory_usage:
        if isinstance(learner.observation_space, spaces.Box):
            learner.replay_buffer_class = OfflineToOnlineReplayBuffer
        elif isinstance(learner.observation_space, spaces.Dict):
            learner.replay_buffer_class = DictOfflineToOnlineReplayBuffer
    kwargs = learner.replay_buffer_kwargs
    if learner.replay_buffer_class is None:
        parameters = inspect.signature(OfflineToOnlineReplayBuffer).parameters.values()
        ours = {one.name for one in parameters if one.kind == KEYWORD_ONLY} - set(N_STEP_KEYWORDS)
        for name in sorted(ours & kwargs.keys()):
            space = f"for {learner.observation_space}"
            reason = "with `optimize_memory_usage=True`" if learner.optimize_memory_usage else space
            raise ValueError(
                f"`replay_buffer_kwargs` has {name!r}, an option of OfflineToOnlineReplayBuffer, which is not used {reason}: "
                "it needs Box or Dict observations and `optimize_memory_usage=False`. Change that, or leave the option out."
            )
    if has_own_buffer_class(learner):
        # They are in a zip's keywords for SB3's sake; here they are those of the algorithm
        learner.replay_buffer_kwargs = {name: value for name, value in kwargs.items() if name not in N_STEP_KEYWORDS}


def check_buffer_keywords(learner: "OfflineLearner") -> None:
    """Check that the algorithm sets none of the replay buffer's keywords itself; in a file there are such, for SB3's sake."""
    refuse_keywords(learner.replay_buffer_kwargs, "offline_fraction", "seed")
    own_class = learner.replay_buffer_class is None or has_own_buffer_class(learner)
    if own_class and "_extra_state" not in vars(learner):
        refuse_keywords(learner.replay_buffer_kwargs, *N_STEP_KEYWORDS)


def refuse_keywords(replay_buffer_kwargs: Mapping[str, object], *refused: str) -> None:
    """Check that keywords of the replay buffer are none of those that the algorithm sets itself."""
    for name in sorted(replay_buffer_kwargs.keys() & set(refused)):
        raise ValueError(f"`replay_buffer_kwargs` has {name!r}, which the algorithm sets: use its own `{name}`.")


# The dataset


def check_dataset(learner: "OfflineLearner") -> None:
    """Check the dataset's spec, whose paths become absolute so that a saved model finds it anywhere, and what goes with it."""
    if learner.dataset is None:
        return
    if isinstance(learner.dataset, os.PathLike):
        learner.dataset = os.path.abspath(learner.dataset)
    if not isinstance(learner.dataset, str | OfflineDataset | MinariDataset | Mapping | Sequence):
        raise TypeError(
            "`dataset` must be a spec such as 'mujoco/hopper/medium-v0', a list of specs, an OfflineDataset or a "
            f"MinariDataset, found {learner.dataset!r}."
        )
    if not isinstance(learner.dataset, str | OfflineDataset):
        # A string can be saved; a list that holds data cannot
        learner.dataset = spec_text(learner.dataset) or learner.dataset
    check_spaces_supported(learner.observation_space, None, "With a dataset, the environment")
    problem = None
    if learner.optimize_memory_usage:
        problem = "`optimize_memory_usage` must be False, since time limits in the data need their own next observation"
    elif not has_own_buffer_class(learner) and not _is_chosen_by_sb3(learner):
        assert learner.replay_buffer_class is not None
        wanted = "DictOfflineToOnline" if isinstance(learner.observation_space, spaces.Dict) else "OfflineToOnline"
        found = learner.replay_buffer_class.__name__
        problem = f"`replay_buffer_class` must be {wanted}ReplayBuffer or a subclass, found {found}"
    if problem is not None:
        raise ValueError(f"With a dataset, {problem}. Change it, or leave out `dataset`.")


def load_into_buffer(learner: "OfflineLearner") -> None:
    """Load the learner's dataset into its replay buffer, and fit the policy's normalizer if nothing has been trained yet."""
    buffer = learner.replay_buffer
    assert isinstance(buffer, OfflineToOnlineReplayBuffer) and learner.dataset is not None
    dataset = load_dataset(learner.dataset)
    buffer.set_offline_data(_in_order_of_environment(learner, dataset))
    fitted = buffer.offline_data
    assert fitted is not None
    if learner.dataset_fingerprint not in (None, dataset.fingerprint) and learner.offline_steps_done > 0:
        warn(
            f"The dataset {dataset.name} is not the one this model was pretrained on: its fingerprint is "
            f"{dataset.fingerprint[:12]}, expected {str(learner.dataset_fingerprint)[:12]}."
        )
    learner.dataset_fingerprint = dataset.fingerprint
    if isinstance(learner.dataset, str) and dataset.spec is not None:
        # Its paths are absolute
        learner.dataset = dataset.spec
    if learner.verbose >= 1:
        print(
            f"Offline data: {dataset.name}, {len(dataset):,} transitions in {dataset.n_episodes:,} episodes, "
            f"mean return {np.mean(dataset.episode_returns):.1f}"
        )
        if clipped := fitted.provenance.get("actions_clipped"):
            print(f"Actions clipped to their bounds: in {clipped['rows']:,} of {clipped['of_rows']:,} transitions")
    if learner.normalize_observations and not learner.has_trained_weights:
        _fit_normalizer(learner, fitted)


def _in_order_of_environment(learner: "OfflineLearner", dataset: OfflineDataset) -> OfflineDataset:
    if not isinstance(dataset.observations, dict) or isinstance(learner.observation_space, spaces.Dict):
        return dataset
    if learner.env is not None:
        dataset = as_flattened_by(dataset, learner.env)
        # For a model that is loaded without an environment, or gets another one
        learner.flattened_keys = list(dataset.observations) if isinstance(dataset.observations, dict) else None
    elif learner.flattened_keys is not None and set(learner.flattened_keys) == set(dataset.observations):
        dataset = dataset.select_keys(learner.flattened_keys)
    return dataset


def check_order_of_keys(learner: "OfflineLearner", env: VecEnv) -> None:
    """Check that another environment flattens the keys of its observations in the order that the data was put into."""
    known = learner.flattened_keys
    found = flattened_space(env) if known is not None and learner.offline_dataset is not None else None
    if isinstance(found, spaces.Dict) and (order := list(leaf_spaces(found))) != known:
        raise ValueError(
            f"The environment flattens its observations in the order {', '.join(order)}, and the data was put into the "
            f"order {', '.join(known or ())}: use an environment with that order, or load the model with "
            "this one (`load(path, env=...)`)."
        )


# Normalization


def _fit_normalizer(learner: "OfflineLearner", dataset: OfflineDataset) -> None:
    vec_normalize = learner.get_vec_normalize_env()
    if vec_normalize is not None and vec_normalize.norm_obs:
        # The policy sees what VecNormalize returns, to which the dataset's statistics do not apply
        return
    if isinstance(learner.policy, OfflinePolicy) and learner.policy.fit_normalizers(dataset.observations):
        return
    space = learner.observation_space
    if any(is_vector_space(each) for each in (space.values() if isinstance(space, spaces.Dict) else (space,))):
        warn(
            f"`normalize_observations` is not applied: {type(learner.policy).__name__} with "
            f"{learner.policy.features_extractor_class.__name__} has no observation normalizer. Use MlpPolicy or "
            "MultiInputPolicy with its default features extractor, or `normalize_observations=False`."
        )


def check_vec_normalize(learner: "OfflineLearner") -> None:
    """Refuse a ``VecNormalize`` that normalizes a second time; warn if it gives the data another meaning at each step."""
    vec_normalize = learner.get_vec_normalize_env()
    if vec_normalize is None:
        return
    if vec_normalize.norm_obs and isinstance(learner.policy, OfflinePolicy) and learner.policy.has_fitted_normalizer:
        raise ValueError(
            "The policy normalizes observations by the statistics of its dataset, and VecNormalize would normalize them "
            "a second time: use the environment without VecNormalize, or with `norm_obs=False`."
        )
    if learner.dataset is None:
        return
    if vec_normalize.norm_obs and vec_normalize.training:
        warn(
            "VecNormalize updates its statistics online, so the same offline observations mean something else to the "
            "policy after each step. Use `normalize_observations=True` without VecNormalize, or fit VecNormalize "
            "beforehand and set its `training=False`."
        )
    if vec_normalize.norm_reward:
        warn(
            "VecNormalize divides rewards by the spread of the online returns, offline rewards too, by another number "
            "at each step. Use `norm_reward=False` with a dataset."
        )


# A run's needs


def check_dataset_is_there(learner: "OfflineLearner") -> None:
    """Warn if a loaded model goes on without the data that it was pretrained on; refuse it if pretraining is left to do."""
    if learner.dataset is not None or learner.dataset_fingerprint is None:
        return
    left = learner.offline_steps - learner.offline_steps_done
    if left > 0 and not learner.life_cycle.offline_is_finished:
        raise ValueError(
            f"{left} of {learner.offline_steps} offline steps are left to do, but "
            "the dataset was given as an object, which a saved model does not hold: pass `dataset=...` to `load`."
        )
    warn(
        "This model was pretrained on a dataset that was given as an object, and goes on without it: online batches hold "
        "no offline transitions. To have them, pass `dataset=...` to `load`."
    )


def check_augmentation(learner: "OfflineLearner") -> None:
    """Refuse an augmentation that is in units of a dataset if there is none."""
    buffer = learner.replay_buffer
    if isinstance(buffer, OfflineToOnlineReplayBuffer) and buffer.needs_offline_data:
        name = learner.replay_buffer_kwargs["augmentation"]
        raise ValueError(
            f"The augmentation {name!r} is in units of the dataset's standard deviations, and there is no dataset: pass "
            "`dataset=...`, or use another augmentation or none."
        )


class Room:
    """Whether the replay buffer has room for a run and holds enough for a batch; warns once a run."""

    def __init__(self) -> None:
        self._has_warned = False

    @staticmethod
    def capacity(learner: "OfflineLearner") -> int:
        """Number of transitions that the online part of the replay buffer can hold."""
        assert learner.replay_buffer is not None
        return learner.replay_buffer.buffer_size * learner.replay_buffer.n_envs

    def begin_run(self) -> None:
        """Warn anew."""
        self._has_warned = False

    def compare_with_run(self, learner: "OfflineLearner", total_timesteps: int, goes_on: bool = False) -> None:
        """Warn if the replay buffer cannot hold the transitions of a run, which may have begun before."""
        capacity = self.capacity(learner)
        if not learner.life_cycle.is_finetuning or capacity >= total_timesteps or self._has_warned:
            return
        message = (
            f"The replay buffer (`buffer_size={learner.buffer_size}`) holds the last {capacity:,} transitions, and the run "
            f"has {total_timesteps:,} steps: older transitions are forgotten, those of the warm-up first."
        )
        n_online = _online_part(learner, learner.batch_size)
        if capacity < n_online or capacity < min(SMALL_BUFFER, SMALL_SHARE * total_timesteps):
            self._has_warned = True
            warn(f"{message} To learn from all of them, use `buffer_size={total_timesteps}` or more.")
        elif learner.verbose >= 1 and not goes_on:
            print(message)

    def has_a_batch(self, learner: "OfflineLearner", batch_size: int) -> bool:
        """Whether the replay buffer holds the online transitions of a batch, or as many of them as it can."""
        buffer, capacity, n_online = learner.replay_buffer, self.capacity(learner), _online_part(learner, batch_size)
        assert buffer is not None
        if learner.life_cycle.is_finetuning and n_online > capacity and not self._has_warned:
            self._has_warned = True
            warn(
                f"The replay buffer (`buffer_size={learner.buffer_size}`) holds {capacity:,} transitions, fewer than the "
                f"{n_online} online ones of a batch, which are the same again and again: use a larger `buffer_size`."
            )
        if learner.learning_starts > 0 or not learner.life_cycle.is_finetuning:
            # SB3's own rule has been applied by `learn`
            return True
        return buffer.size() * buffer.n_envs >= min(n_online, capacity)


def _online_part(learner: "OfflineLearner", batch_size: int) -> int:
    """Number of online transitions in the next batch."""
    buffer = learner.replay_buffer
    if not isinstance(buffer, OfflineToOnlineReplayBuffer) or buffer.offline_size == 0:
        return batch_size
    return batch_size - round(buffer.offline_fraction * batch_size)
