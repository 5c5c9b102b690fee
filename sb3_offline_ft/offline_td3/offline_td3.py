"""TD3 with logged data: offline pretraining, warm-up with the frozen policy, online finetuning."""

import copy
import inspect
import io
import json
import math
import os
import pathlib
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from minari import MinariDataset
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl, open_path
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.td3.policies import Actor, TD3Policy

from sb3_offline_ft.buffers import DictOfflineToOnlineReplayBuffer, OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.callbacks import (
    InitialEvaluation,
    PretrainingLocals,
    as_list,
    check_needs_no_episodes,
    find_callbacks,
    telling_of_episodes,
)
from sb3_offline_ft.common.callbacks import progress_bar as make_progress_bar
from sb3_offline_ft.common.checks import constructor_arguments, known_keywords, whole_number
from sb3_offline_ft.common.io import arrays_from_text, arrays_to_text, naming_damage
from sb3_offline_ft.common.logger import OfflineLogger
from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.datasets import (
    DatasetSpec,
    OfflineDataset,
    as_flattened_by,
    check_spaces_supported,
    load_dataset,
    spec_text,
    without_trust,
)
from sb3_offline_ft.datasets.keys import flattened_space, leaf_spaces
from sb3_offline_ft.policies.averaging import LearnedWeights
from sb3_offline_ft.policies.frozen import frozen_actor, tensors_to_arrays, weights_from_arrays, weights_to_arrays
from sb3_offline_ft.policies.guide import NOT_SAVED, PRETRAINED, GuideLike, check_guide, find_guide, guide_actions
from sb3_offline_ft.policies.layers import is_vector_space
from sb3_offline_ft.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, OfflinePolicy
from sb3_offline_ft.update import ActorObjective, AutogradKernel, Batch, FastKernel, NotSupportedError, UpdateKernel
from sb3_offline_ft.update.kernel import target_critics_of
from sb3_offline_ft.update.products import UPDATE_PRECISIONS

SelfOfflineTD3 = TypeVar("SelfOfflineTD3", bound="OfflineTD3")

SB3_LEARNING_STARTS = 100
ZIP_MAGIC = b"PK"
N_STEP_KEYWORDS = ("n_steps", "gamma")
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
GUIDE_PREFIX = "guide_actor."
TRUST_VARIABLE = "SB3_OFFLINE_FT_TRUST_PICKLE"
LEARNED_PREFIX = "learned_actor."
KERNELS = ("auto", "fast", "autograd")
BATCHES_AT_ONCE = 64
BYTES_AT_ONCE = 2**24
"""Batches drawn at once share their overhead, but large ones, such as those of images, shall not fill the memory."""
SMALL_BUFFER, SMALL_SHARE = 100_000, 0.1
"""A replay buffer below both, in transitions and as a share of the run's, is rather forgotten than meant."""
PROGRESS_CHUNK = 50
"""Gradient steps between two updates of the progress bar."""


class OfflineTD3(TD3):
    """
    TD3 with logged data: the life cycle that the algorithms of this package share, with TD3's own objective.

    A run has four phases: offline *pretraining* on the dataset (:meth:`pretrain`), a *warm-up* in which the frozen
    policy acts and nothing is updated, an optional *critic warm-up*, and *finetuning* on batches that mix offline and
    online transitions. :meth:`learn` goes through all of them. Without a dataset and without pretrained weights it is
    SB3's TD3 for the same networks, hyper-parameters and seed: to the bit with ``kernel="autograd"``, else up to rounding.

    A pretrained agent never takes random actions: ``learning_starts`` becomes 0 when it starts to act. A loaded model
    counts as pretrained if it was saved after its pretraining or by SB3; one saved in the middle of it goes on.
    Each call of :meth:`learn` with ``reset_num_timesteps=True`` (SB3's default) begins a finetuning run of its own:
    warm-up, fresh optimizer state, new reference. With ``reset_num_timesteps=False`` the run goes on.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate for adam optimizer, the same for all networks; it can be a function of the
        current progress remaining (from 1 to 0), which stays 1 while pretraining
    :param buffer_size: size of the online part of the replay buffer
    :param learning_starts: random actions before learning starts, for an agent that is not pretrained
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple such as ``(5, "step")``
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` means as many as steps done
    :param action_noise: the action noise type (None by default, as in SB3)
    :param replay_buffer_class: Replay buffer class, :class:`OfflineToOnlineReplayBuffer` by default, for ``Dict``
        observations :class:`DictOfflineToOnlineReplayBuffer`; a dataset needs one of these or a subclass
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation, such as
        ``dict(augmentation="gaussian_noise")`` or ``dict(offline_sampling="balanced")``
    :param optimize_memory_usage: Not supported together with a dataset
    :param n_steps: Number of steps of the n-step return
    :param policy_delay: Policy and target networks will only be updated once every policy_delay steps
    :param target_policy_noise: Standard deviation of Gaussian noise added to target policy (smoothing noise)
    :param target_noise_clip: Limit for absolute value of target policy smoothing noise.
    :param stats_window_size: Window size for the rollout logging
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param dataset: The logged data: a spec such as ``"mujoco/hopper/medium-v0"``, a list of specs (see
        :func:`sb3_offline_ft.load_dataset`), an :class:`OfflineDataset` or a ``minari.MinariDataset``. Loaded at the
        first use; a saved model holds its spec and fingerprint, not the data
    :param offline_steps: Gradient steps of pretraining before the first interaction; :meth:`learn` does what is left
    :param offline_fraction: Share of offline transitions in each online batch, exact, in [0, 1]:
        a number or a schedule (see :func:`sb3_offline_ft.common.schedules.make_schedule`)
    :param warmup_steps: Environment steps at the start of a finetuning run in which the pretrained policy acts unchanged
        and nothing is updated: they measure its return and put its data into the buffer
    :param warmup_action_noise: Whether to add ``action_noise`` during the warm-up
    :param critic_warmup_steps: Gradient steps after the warm-up that update the critics only
    :param reset_optimizers: Whether to forget the optimizers' moments when finetuning starts
    :param normalize_observations: Whether the policy normalizes observations by the dataset's mean and standard
        deviation; the statistics are fitted once, before the first update, and are part of the policy
    :param kernel: How gradient steps are computed. ``"auto"``: written out for MLP actors and critics trained by Adam, which
        is faster and agrees with autograd up to rounding; by autograd for other networks. ``"autograd"``: always by autograd,
        with SB3's results to the bit. ``"fast"``: written out, or an error if the networks do not allow it
    :param update_precision: ``"float32"``, or ``"bfloat16"`` for the matrix products of hidden layers (parameters, sums and
        losses stay float32), which is faster on CPUs with units for it
    :param guide_policy: A policy that acts at the start of each training episode (Uchendu et al. 2023, "Jump-Start
        Reinforcement Learning"): ``"pretrained"``, a copy of the policy as it is when the finetuning run begins; the path of a
        zip file that a Stable-Baselines3 algorithm saved; an algorithm or a policy, which a saved model does not hold; or None
    :param guide_steps: Number of steps at the start of each episode of each environment that it acts: a number, or a schedule
        such as ``"lin_200_0"``, by which the learner takes over
    :param policy_averaging: While a pretrained agent is finetuned, its policy is the exponential moving average of what
        gradient steps have made of it, in which the past weighs this much at each step of the actor: 0.99 averages over the
        last 100 or so. The average acts, is evaluated and saved; gradient steps go on from their own weights. 0 is for none
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: TD3Policy
    _generator_state_names: ClassVar[tuple[str, ...]] = ("noise_generator", "offline_sampler")
    """What in the extra state is the state of a random generator."""
    _position_names: ClassVar[tuple[str, ...]] = (
        "learning_starts",
        "_pretrained",
        "_offline_finished",
        "_went_online",
        "_finetuning",
        "_critic_warmup_end",
    )
    """What says how updates are done, but for what counts progress (``offline_steps_done``, ``_warmup_end``, ...)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before __init__, since Python's own message names neither near matches nor what is known
        known_keywords(cls, kwargs, cls.__name__)
        return super().__new__(cls)

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = SB3_LEARNING_STARTS,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        policy_delay: int = 2,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.5,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        dataset: DatasetSpec | None = None,
        offline_steps: int = 0,
        offline_fraction: ScheduleLike = 0.5,
        warmup_steps: int = 2000,
        warmup_action_noise: bool = False,
        critic_warmup_steps: int = 0,
        reset_optimizers: bool = True,
        normalize_observations: bool = True,
        kernel: str = "auto",
        update_precision: str = "float32",
        guide_policy: GuideLike = None,
        guide_steps: ScheduleLike = 0,
        policy_averaging: float = 0.0,
    ) -> None:
        try:
            super().__init__(
                policy,
                env,
                learning_rate,
                buffer_size,
                learning_starts,
                batch_size,
                tau,
                gamma,
                train_freq,
                gradient_steps,
                action_noise=action_noise,
                replay_buffer_class=replay_buffer_class,
                replay_buffer_kwargs=replay_buffer_kwargs,
                optimize_memory_usage=optimize_memory_usage,
                n_steps=n_steps,
                policy_delay=policy_delay,
                target_policy_noise=target_policy_noise,
                target_noise_clip=target_noise_clip,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                seed=seed,
                device=device,
                _init_setup_model=False,
            )
        except AssertionError as error:
            action_space = getattr(self, "action_space", None)
            if action_space is None or isinstance(action_space, spaces.Box):
                raise
            raise ValueError(
                f"{type(self).__name__} needs a Box action space with finite bounds, the environment has {action_space}: "
                "use an environment with continuous actions, or an algorithm for discrete ones such as DQN."
            ) from error
        self.dataset = dataset
        self.dataset_fingerprint: str | None = None
        self.flattened_keys: list[str] | None = None
        self.offline_steps = offline_steps
        self.offline_fraction = offline_fraction
        self.warmup_steps = warmup_steps
        self.warmup_action_noise = warmup_action_noise
        self.critic_warmup_steps = critic_warmup_steps
        self.reset_optimizers = reset_optimizers
        self.normalize_observations = normalize_observations
        self.kernel = kernel
        self.update_precision = update_precision
        self.guide_policy = guide_policy
        self.guide_steps = guide_steps
        self.policy_averaging = policy_averaging

        self.offline_steps_done = 0
        # Position in the life cycle; all of it is saved with the model
        self._pretrained = False
        self._offline_finished = False
        self._went_online = False
        self._finetuning = False
        self._warmup_end = 0
        self._later_warmup_end = 0
        self._critic_warmup_end = 0
        self._extra_state: str | None = None
        self._pretraining = False
        self._warned_of_buffer = False
        self._online_timesteps: int | None = None
        self._eval_callbacks: list[EvalCallback] = []
        self._guide: BaseAlgorithm | BasePolicy | None = None
        self._learned_weights: LearnedWeights | None = None
        self._episode_steps = np.zeros(0, dtype=int)
        self._best_mean_reward = -math.inf
        self._kernel: UpdateKernel = None  # type: ignore[assignment]  # chosen by the first `train`

        if _init_setup_model:
            self._setup_model()

    # Set-up, data

    def _setup_model(self) -> None:
        self._check_settings()
        self._choose_replay_buffer_class()
        self._noise_generator = th.Generator(device=self.device)
        n_steps = self.n_steps
        try:
            if self._has_own_buffer_class:
                # SB3 would warn that it does not tell the buffer, which is done below
                self.n_steps = 1
            super()._setup_model()
        finally:
            self.n_steps = n_steps
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.offline_fraction = self.offline_fraction
            self.replay_buffer.set_n_steps(self.n_steps, self.gamma)
        self._seed_generators(self.seed)
        if self.kernel == "fast" or self.update_precision != "float32":
            # Said now rather than at the first update
            try:
                FastKernel.check(self.policy)
            except NotSupportedError as error:
                self._fall_back(error)
        self._logged: dict[str, list[th.Tensor | float]] = {}

    @property
    def _has_own_buffer_class(self) -> bool:
        return self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, OfflineToOnlineReplayBuffer)

    def _classes_chosen_by_sb3(self) -> list[type[ReplayBuffer] | None]:
        """Classes that stand for none in particular: a zip saved by SB3's TD3 names the one that SB3 chose itself."""
        n_step = self.n_steps > 1 and self.replay_buffer_kwargs.get("n_steps") == self.n_steps
        return [None, ReplayBuffer, DictReplayBuffer, *([NStepReplayBuffer] if n_step else [])]

    def _choose_replay_buffer_class(self) -> None:
        if self.replay_buffer_class in self._classes_chosen_by_sb3() and not self.optimize_memory_usage:
            if isinstance(self.observation_space, spaces.Box):
                self.replay_buffer_class = OfflineToOnlineReplayBuffer
            elif isinstance(self.observation_space, spaces.Dict):
                self.replay_buffer_class = DictOfflineToOnlineReplayBuffer
        if self.replay_buffer_class is None:
            self._check_own_buffer_is_not_needed()
        if self._has_own_buffer_class:
            # They are in a zip's keywords for SB3's sake; here they are those of the algorithm
            self.replay_buffer_kwargs = {
                name: value for name, value in self.replay_buffer_kwargs.items() if name not in N_STEP_KEYWORDS
            }

    def _check_own_buffer_is_not_needed(self) -> None:
        ours = {
            name for name, one in inspect.signature(OfflineToOnlineReplayBuffer).parameters.items() if one.kind == KEYWORD_ONLY
        }
        for name in sorted((ours - set(N_STEP_KEYWORDS)) & self.replay_buffer_kwargs.keys()):
            reason = "with `optimize_memory_usage=True`" if self.optimize_memory_usage else f"for {self.observation_space}"
            raise ValueError(
                f"`replay_buffer_kwargs` has {name!r}, an option of OfflineToOnlineReplayBuffer, which is not used {reason}: "
                "it needs Box or Dict observations and `optimize_memory_usage=False`. Change that, or leave the option out."
            )

    def _seed_generators(self, seed: int | None) -> None:
        self._noise_generator.manual_seed(derive_seed(seed, stream=1))
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.seed_sampler(seed)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo random generators (python, numpy, pytorch, gym, action_space, and our own)

        :param seed: The seed; None changes nothing
        """
        super().set_random_seed(seed)
        if seed is not None:
            self._seed_generators(seed)

    def _check_settings(self) -> None:
        """Check and convert what is settable in the constructor and in ``load``."""
        for name in ("offline_steps", "warmup_steps", "critic_warmup_steps"):
            setattr(self, name, whole_number(getattr(self, name), name))
        make_schedule(self.offline_fraction, "offline_fraction", 0.0, 1.0)
        for name, known in (("kernel", KERNELS), ("update_precision", UPDATE_PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, found {getattr(self, name)!r}.")
        if self.kernel == "autograd" and self.update_precision != "float32":
            raise ValueError("`update_precision='bfloat16'` needs the fast kernel: leave out `kernel='autograd'`.")
        self.guide_policy, self._guide_steps_schedule = check_guide(self.guide_policy, self.guide_steps)
        if not isinstance(self.policy_averaging, int | float) or not 0 <= self.policy_averaging < 1:
            raise ValueError(
                "`policy_averaging` must be at least 0 and less than 1, such as 0.999, or 0 for no averaging, found "
                f"{self.policy_averaging!r}."
            )
        self.n_steps = whole_number(self.n_steps, "n_steps", least=1)
        self._check_replay_buffer_kwargs()
        if self.dataset is None:
            return
        if isinstance(self.dataset, os.PathLike):
            # Absolute, so that a saved model finds it from any folder
            self.dataset = os.path.abspath(self.dataset)
        if not isinstance(self.dataset, str | OfflineDataset | MinariDataset | Mapping | Sequence):
            raise TypeError(
                "`dataset` must be a spec such as 'mujoco/hopper/medium-v0', a list of specs, an OfflineDataset or a "
                f"MinariDataset, found {self.dataset!r}."
            )
        if not isinstance(self.dataset, str | OfflineDataset):
            # A string can be saved; a list that holds data cannot
            self.dataset = spec_text(self.dataset) or self.dataset
        check_spaces_supported(self.observation_space, None, "With a dataset, the environment")
        problem = None
        if self.optimize_memory_usage:
            problem = "`optimize_memory_usage` must be False, since time limits in the data need their own next observation"
        elif not self._has_own_buffer_class and self.replay_buffer_class not in self._classes_chosen_by_sb3():
            assert self.replay_buffer_class is not None
            wanted = "DictOfflineToOnline" if isinstance(self.observation_space, spaces.Dict) else "OfflineToOnline"
            found = self.replay_buffer_class.__name__
            problem = f"`replay_buffer_class` must be {wanted}ReplayBuffer or a subclass, found {found}"
        if problem is not None:
            raise ValueError(f"With a dataset, {problem}. Change it, or leave out `dataset`.")

    def _check_replay_buffer_kwargs(self) -> None:
        own_class = self.replay_buffer_class is None or self._has_own_buffer_class
        _refuse_keywords(self.replay_buffer_kwargs, "offline_fraction", "seed")
        if own_class and self._extra_state is None:
            _refuse_keywords(self.replay_buffer_kwargs, *N_STEP_KEYWORDS)

    @property
    def offline_dataset(self) -> OfflineDataset | None:
        """The loaded dataset, None before the first use."""
        buffer = self.replay_buffer
        return buffer.offline_data if isinstance(buffer, OfflineToOnlineReplayBuffer) else None

    @property
    def remaining_offline_steps(self) -> int:
        """Gradient steps of pretraining that :meth:`learn` still has to do before it goes online."""
        if self.dataset is None or self._offline_finished:
            return 0
        return max(0, self.offline_steps - self.offline_steps_done)

    def load_offline_data(self) -> None:
        """
        Load the dataset into the replay buffer, if there is one and it has not been loaded yet.

        Called by :meth:`pretrain` and :meth:`learn`. Fits the observation normalizer before the first update.

        :raises ValueError: The dataset cannot be read or does not fit the environment; nothing is changed then
        """
        if self.dataset is None or self.offline_dataset is not None:
            return
        assert isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer)
        dataset = load_dataset(self.dataset)
        self.replay_buffer.set_offline_data(self._in_order_of_environment(dataset))
        fitted = self.replay_buffer.offline_data
        assert fitted is not None
        if self.dataset_fingerprint not in (None, dataset.fingerprint) and self.offline_steps_done > 0:
            warnings.warn(
                f"The dataset {dataset.name} is not the one this model was pretrained on: its fingerprint is "
                f"{dataset.fingerprint[:12]}, expected {str(self.dataset_fingerprint)[:12]}.",
                stacklevel=2,
            )
        self.dataset_fingerprint = dataset.fingerprint
        if isinstance(self.dataset, str) and dataset.spec is not None:
            # Its paths are absolute
            self.dataset = dataset.spec
        if self.verbose >= 1:
            print(
                f"Offline data: {dataset.name}, {len(dataset):,} transitions in {dataset.n_episodes:,} episodes, "
                f"mean return {np.mean(dataset.episode_returns):.1f}"
            )
            if clipped := fitted.provenance.get("actions_clipped"):
                print(f"Actions clipped to their bounds: in {clipped['rows']:,} of {clipped['of_rows']:,} transitions")
        if self.normalize_observations and not self._has_trained_weights:
            self._fit_normalizer(fitted)

    def _in_order_of_environment(self, dataset: OfflineDataset) -> OfflineDataset:
        if not isinstance(dataset.observations, dict) or isinstance(self.observation_space, spaces.Dict):
            return dataset
        if self.env is not None:
            dataset = as_flattened_by(dataset, self.env)
            # For a model that is loaded without an environment, or gets another one
            self.flattened_keys = list(dataset.observations) if isinstance(dataset.observations, dict) else None
        elif self.flattened_keys is not None and set(self.flattened_keys) == set(dataset.observations):
            dataset = dataset.select_keys(self.flattened_keys)
        return dataset

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Checks the validity of the environment, and if it is coherent, set it as the current environment.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training
        :raises ValueError: Its spaces are others, or it flattens the keys of its observations in another order than the data
            was put into
        """
        wrapped = self._wrap_env(env, self.verbose)
        found = flattened_space(wrapped) if self.flattened_keys is not None and self.offline_dataset is not None else None
        if isinstance(found, spaces.Dict) and (order := list(leaf_spaces(found))) != self.flattened_keys:
            raise ValueError(
                f"The environment flattens its observations in the order {', '.join(order)}, and the data was put into the "
                f"order {', '.join(self.flattened_keys or ())}: use an environment with that order, or load the model with "
                "this one (`load(path, env=...)`)."
            )
        super().set_env(wrapped, force_reset)

    def _fit_normalizer(self, dataset: OfflineDataset) -> None:
        vec_normalize = self._vec_normalize_env
        if vec_normalize is not None and vec_normalize.norm_obs:
            # The policy sees what VecNormalize returns, to which the dataset's statistics do not apply
            return
        if isinstance(self.policy, OfflinePolicy) and self.policy.fit_normalizers(dataset.observations):
            return
        space = self.observation_space
        if any(is_vector_space(each) for each in (space.values() if isinstance(space, spaces.Dict) else (space,))):
            warnings.warn(
                f"`normalize_observations` is not applied: {type(self.policy).__name__} with "
                f"{self.policy.features_extractor_class.__name__} has no observation normalizer. Use MlpPolicy or "
                "MultiInputPolicy with its default features extractor, or `normalize_observations=False`.",
                stacklevel=3,
            )

    def _check_vec_normalize(self) -> None:
        vec_normalize = self._vec_normalize_env
        if vec_normalize is None:
            return
        if vec_normalize.norm_obs and isinstance(self.policy, OfflinePolicy) and self.policy.has_fitted_normalizer:
            raise ValueError(
                "The policy normalizes observations by the statistics of its dataset, and VecNormalize would normalize them "
                "a second time: use the environment without VecNormalize, or with `norm_obs=False`."
            )
        if self.dataset is None:
            return
        if vec_normalize.norm_obs and vec_normalize.training:
            warnings.warn(
                "VecNormalize updates its statistics online, so the same offline observations mean something else to the "
                "policy after each step. Use `normalize_observations=True` without VecNormalize, or fit VecNormalize "
                "beforehand and set its `training=False`.",
                stacklevel=3,
            )
        if vec_normalize.norm_reward:
            warnings.warn(
                "VecNormalize divides rewards by the spread of the online returns, offline rewards too, by another number "
                "at each step. Use `norm_reward=False` with a dataset.",
                stacklevel=3,
            )

    @property
    def _has_trained_weights(self) -> bool:
        return self._pretrained or self._n_updates > 0

    # Offline phase

    def pretrain(
        self: SelfOfflineTD3,
        gradient_steps: int | None = None,
        callback: MaybeCallback = None,
        progress_bar: bool = False,
        log_interval: int = 1000,
    ) -> SelfOfflineTD3:
        """
        Train on the dataset alone.

        Values are logged under ``offline/`` against the number of gradient steps. Callbacks run after every gradient
        step, with ``num_timesteps`` counting gradient steps meanwhile, so that ``EvalCallback`` and
        ``CheckpointCallback`` work as usual; if one returns False, pretraining stops. There are no episodes for them to read.
        May be called several times, and interrupted: the steps done are counted in ``offline_steps_done`` and saved with the
        model.

        :param gradient_steps: Number of gradient steps, by default what is left of ``offline_steps``
        :param callback: Callback(s) called after every gradient step
        :param progress_bar: Display a progress bar using tqdm and rich.
        :param log_interval: Gradient steps between two dumps of the logger
        :return: The model itself
        :raises ValueError: There is no dataset, it does not fit the environment, a number is out of range, or a callback asks
            for steps of the environment
        """
        check_needs_no_episodes(callback)
        if gradient_steps is None:
            gradient_steps = self.remaining_offline_steps
        gradient_steps = whole_number(gradient_steps, "gradient_steps")
        log_interval = whole_number(log_interval, "log_interval", least=1)
        if self.dataset is None:
            was_given = "" if self.dataset_fingerprint is None else " (this model was pretrained on data given as an object)"
            raise ValueError(
                f"{type(self).__name__}.pretrain needs a dataset, found None{was_given}: pass "
                "`dataset='mujoco/hopper/medium-v0'`, say, to the constructor or to `load`."
            )
        self.load_offline_data()
        self._check_vec_normalize()
        if self.ep_info_buffer is None:
            # SB3's `dump_logs`, which callbacks may call, needs them
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if not self._custom_logger:
            first = self.offline_steps_done == 0
            self._logger = configure_logger(self.verbose, self.tensorboard_log, type(self).__name__, first)
        with self._offline_phase(), telling_of_episodes():
            started = None if callback is None else self._init_callback(callback)
            total_timesteps = self.offline_steps_done + gradient_steps
            if not self.start_time:
                # SB3's callbacks and logs derive the speed from them
                self.start_time, self._num_timesteps_at_start = time.time_ns(), self.num_timesteps
            if started is not None:
                started.on_training_start(PretrainingLocals(locals()), globals())
            self._run_offline(gradient_steps, started, progress_bar, log_interval)
            if started is not None:
                started.on_training_end()
        return self

    def _run_offline(
        self, gradient_steps: int, callback: BaseCallback | None, progress_bar: bool, log_interval: int = 1000
    ) -> None:
        bar = make_progress_bar(gradient_steps, f"{type(self).__name__} offline") if progress_bar else None
        start_time, start, last = time.monotonic(), self.offline_steps_done, self.offline_steps_done + gradient_steps
        try:
            while self.offline_steps_done < last:
                until_log = log_interval - self.offline_steps_done % log_interval
                chunk = 1 if callback is not None else min(PROGRESS_CHUNK, until_log, last - self.offline_steps_done)
                self._count_offline_updates(chunk)
                if bar is not None:
                    bar.update(chunk)
                if self.offline_steps_done % log_interval == 0 or self.offline_steps_done == last:
                    elapsed = max(time.monotonic() - start_time, 1e-9)
                    self.logger.record("offline/gradient_steps", self.offline_steps_done)
                    self.logger.record("offline/steps_per_second", (self.offline_steps_done - start) / elapsed)
                    self.logger.dump(self.offline_steps_done)
                if callback is not None:
                    self.num_timesteps = self.offline_steps_done
                    callback.update_locals(locals())
                    if not callback.on_step():
                        break
        finally:
            if bar is not None:
                bar.close()

    def _count_offline_updates(self, gradient_steps: int) -> None:
        before = self._n_updates
        try:
            self.train(gradient_steps, self.batch_size)
        finally:
            # Counted from what was really done: an interrupt may come in the middle
            self.offline_steps_done += self._n_updates - before

    @contextmanager
    def _offline_phase(self) -> Iterator[None]:
        """For the duration of the block, log under ``offline/`` and count gradient steps instead of environment steps."""
        logger, progress_remaining = self._logger, self._current_progress_remaining
        self._online_timesteps = self.num_timesteps
        self._pretraining = True
        self._logger = OfflineLogger(logger)
        self._current_progress_remaining = 1.0
        self.num_timesteps = self.offline_steps_done
        try:
            yield
        finally:
            self.num_timesteps = self._online_timesteps
            self._online_timesteps = None
            self._pretraining = False
            self._logger = logger
            self._current_progress_remaining = progress_remaining

    # Online phase

    def learn(
        self: SelfOfflineTD3,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineTD3:
        """
        Do what is left of the pretraining, then finetune online.

        Callbacks count environment steps and run in the online phase only; to evaluate while pretraining, call
        :meth:`pretrain` with a callback. An ``EvalCallback`` also evaluates a pretrained agent before its first step.
        If a progress bar is shown for the online phase, the offline phase has one too.

        :param total_timesteps: The number of environment steps
        :param callback: Callback(s) called at every environment step
        :param log_interval: Episodes between two dumps of the logger, None for no automatic dump
        :param tb_log_name: the name of the run for TensorBoard logging, the algorithm's name by default
        :param reset_num_timesteps: whether to begin a finetuning run (True) or to go on with the last one (False)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: The trained model
        :raises ValueError: The dataset does not fit the environment, or a number is out of range
        """
        try:
            super().learn(
                total_timesteps=whole_number(total_timesteps, "total_timesteps"),
                callback=callback,
                log_interval=log_interval,  # type: ignore[arg-type]  # SB3 documents None but does not type it
                tb_log_name=tb_log_name or type(self).__name__,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
            self._look_for_new_best()
        finally:
            # Callbacks hold environments, which can be neither copied nor kept alive for ever
            self._eval_callbacks = []
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._check_dataset_is_there()
        self._prepare_guide()
        self.load_offline_data()
        self._check_augmentation()
        self._check_vec_normalize()
        initial_evaluation, callbacks = InitialEvaluation(), as_list(callback)
        if any(isinstance(given, BaseCallback) and any(find_callbacks(given, EvalCallback)) for given in callbacks):
            callbacks = [*callbacks, initial_evaluation]
        is_reset = reset_num_timesteps or self._last_obs is None
        total_timesteps, started = super()._setup_learn(
            total_timesteps, callbacks, reset_num_timesteps, tb_log_name, progress_bar
        )
        if is_reset or self._episode_steps.size != self.n_envs:
            # A file of an older version does not tell how far its episodes are
            self._episode_steps = np.zeros(self.n_envs, dtype=int)
        if is_reset and isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.cut_episodes()
        self._eval_callbacks = list(find_callbacks(started, EvalCallback))
        if self.remaining_offline_steps > 0:
            show = progress_bar or any(True for _ in find_callbacks(started, ProgressBarCallback))
            try:
                with self._offline_phase():
                    self._run_offline(self.remaining_offline_steps, None, show)
            except KeyboardInterrupt:
                # rl-zoo3 ends its callbacks after an interrupt, and SB3's progress bar cannot end before it has started
                for bar in find_callbacks(started, ProgressBarCallback):
                    bar.on_training_start(locals(), globals())
                    bar.on_training_end()
                raise
            # SB3 derives the speed of the online phase from it
            self.start_time = time.time_ns()
        if reset_num_timesteps or not self._went_online:
            if self._has_trained_weights:
                initial_evaluation.evaluations = self._eval_callbacks
            self._begin_finetuning(total_timesteps - self.num_timesteps)
        else:
            self._compare_buffer_with_run(total_timesteps, goes_on=True)
        return total_timesteps, started

    def _check_dataset_is_there(self) -> None:
        if self.dataset is not None or self.dataset_fingerprint is None:
            return
        if not self._offline_finished and self.offline_steps > self.offline_steps_done:
            raise ValueError(
                f"{self.offline_steps - self.offline_steps_done} of {self.offline_steps} offline steps are left to do, but "
                "the dataset was given as an object, which a saved model does not hold: pass `dataset=...` to `load`."
            )
        warnings.warn(
            "This model was pretrained on a dataset that was given as an object, and goes on without it: online batches hold "
            "no offline transitions. To have them, pass `dataset=...` to `load`.",
            stacklevel=4,
        )

    def _check_augmentation(self) -> None:
        buffer = self.replay_buffer
        if isinstance(buffer, OfflineToOnlineReplayBuffer) and buffer.needs_offline_data:
            name = self.replay_buffer_kwargs["augmentation"]
            raise ValueError(
                f"The augmentation {name!r} is in units of the dataset's standard deviations, and there is no dataset: pass "
                "`dataset=...`, or use another augmentation or none."
            )

    def _begin_finetuning(self, total_timesteps: int) -> None:
        pretrained = self._has_trained_weights
        self._went_online = self._offline_finished = True
        self._finetuning = pretrained or self.dataset is not None
        self._warmup_end = self.num_timesteps
        self._later_warmup_end = 0
        self._critic_warmup_end = self._n_updates
        if not self._finetuning:
            warnings.warn(
                f"{type(self).__name__} has neither a dataset nor pretrained weights: it trains online like TD3.", stacklevel=5
            )
        if pretrained:
            self._begin_with_trained_weights(total_timesteps)
        self._warned_of_buffer = False
        self._compare_buffer_with_run(total_timesteps)
        if self.guide_policy == PRETRAINED:
            self._guide = frozen_actor(self.policy)
        self._learned_weights = LearnedWeights(self.actor) if pretrained and self.policy_averaging > 0 else None
        self._best_mean_reward = max((callback.best_mean_reward for callback in self._eval_callbacks), default=-math.inf)
        self._on_finetuning_start(pretrained)

    def _begin_with_trained_weights(self, total_timesteps: int) -> None:
        if self.learning_starts > 0:
            if self.learning_starts != SB3_LEARNING_STARTS:
                warnings.warn(
                    f"`learning_starts={self.learning_starts}` would replace the pretrained policy by random actions: "
                    "0 is used. To let the pretrained policy act before the first update, use `warmup_steps`.",
                    stacklevel=6,
                )
            self.learning_starts = 0
        if self.reset_optimizers:
            self.actor.optimizer.state.clear()
            self.critic.optimizer.state.clear()
        self._warmup_end += self.warmup_steps
        self._critic_warmup_end += self.critic_warmup_steps
        if 0 < total_timesteps <= self.warmup_steps:
            warnings.warn(
                f"The warm-up ({self.warmup_steps} steps) is as long as the run ({total_timesteps} steps): nothing will be "
                "learned online. Use more steps or a smaller `warmup_steps`.",
                stacklevel=6,
            )

    @property
    def _capacity(self) -> int:
        """Number of transitions that the online part of the replay buffer can hold."""
        buffer = self.replay_buffer
        assert buffer is not None
        return buffer.buffer_size * buffer.n_envs

    def _online_part(self, batch_size: int) -> int:
        """Number of online transitions in the next batch."""
        buffer = self.replay_buffer
        if not isinstance(buffer, OfflineToOnlineReplayBuffer) or buffer.offline_size == 0:
            return batch_size
        return batch_size - round(buffer.offline_fraction * batch_size)

    def _compare_buffer_with_run(self, total_timesteps: int, goes_on: bool = False) -> None:
        capacity = self._capacity
        if not self._finetuning or capacity >= total_timesteps or self._warned_of_buffer:
            return
        message = (
            f"The replay buffer (`buffer_size={self.buffer_size}`) holds the last {capacity:,} transitions, and the run has "
            f"{total_timesteps:,} steps: older transitions are forgotten, those of the warm-up first."
        )
        if capacity < self._online_part(self.batch_size) or capacity < min(SMALL_BUFFER, SMALL_SHARE * total_timesteps):
            self._warned_of_buffer = True
            warnings.warn(f"{message} To learn from all of them, use `buffer_size={total_timesteps}` or more.", stacklevel=5)
        elif self.verbose >= 1 and not goes_on:
            print(message)

    def begin_warmup(self, steps: int) -> None:
        """
        From now on let the policy of a run in progress act unchanged, without an update, such as after a rollback. Within a
        warm-up, this can only prolong it.

        :param steps: Number of environment steps
        """
        end = self.num_timesteps + whole_number(steps, "steps")
        if self.num_timesteps <= self._warmup_end:
            self._warmup_end = max(self._warmup_end, end)
        else:
            self._later_warmup_end = max(self._later_warmup_end, end)

    @property
    def first_warmup_end(self) -> int:
        """Environment steps (``num_timesteps``) until which the policy of this finetuning run has not been updated at all."""
        return self._warmup_end

    @property
    def _frozen_until(self) -> int:
        """Environment steps until which nothing is updated, in the first warm-up or in a later one."""
        return max(self._warmup_end, self._later_warmup_end)

    def _on_finetuning_start(self, pretrained: bool) -> None:
        """
        Called once at the start of a finetuning run, before its first interaction.

        :param pretrained: Whether the agent has weights worth keeping
        """

    def _on_new_best(self) -> None:
        """Called before the next update when an ``EvalCallback`` has found the current policy better than all before."""

    # Guide

    def _prepare_guide(self) -> None:
        """Called before anything else is done, so that a guide that cannot be used costs no time."""
        if self.guide_policy is None:
            self._guide = None
        elif self.guide_policy != PRETRAINED:
            assert isinstance(self.action_space, spaces.Box)
            self._guide = find_guide(self.guide_policy, self.observation_space, self.action_space, self.device)
        elif not self._has_trained_weights and self.remaining_offline_steps == 0:
            raise ValueError(
                "`guide_policy='pretrained'` needs a pretrained policy, and this one has not been trained: pretrain it with "
                "`offline_steps` or `pretrain()`, or give another guide."
            )

    def _guided_environments(self) -> np.ndarray | None:
        """Which environments the guide acts in now, shape ``(n_envs,)``; None for none."""
        if self.guide_policy is None:
            return None
        guided = self._episode_steps < self._guide_steps_schedule(self._current_progress_remaining)
        self.logger.record_mean("rollout/guide_share", float(guided.mean()))
        return guided if guided.any() else None

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < self._frozen_until and not self.warmup_action_noise:
            action_noise = None
        guided = self._guided_environments()
        if guided is None:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        if self._guide is None:
            # The run went on with another guide than it was saved with
            self._guide = frozen_actor(self.policy)
        _, scaled_actions = super()._sample_action(learning_starts, None, n_envs)
        assert self._last_obs is not None
        guides = self.policy.scale_action(guide_actions(self._guide, self._last_obs))
        scaled_actions = scaled_actions.copy()
        scaled_actions[guided] = guides[guided]
        if action_noise is not None:
            scaled_actions = np.clip(scaled_actions + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_actions), scaled_actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._episode_steps = np.where(dones, 0, self._episode_steps + 1)

    def _may_update(self, batch_size: int) -> bool:
        if 0 < self.num_timesteps <= self._frozen_until:
            return False
        buffer, n_online = self.replay_buffer, self._online_part(batch_size)
        assert buffer is not None
        if self._finetuning and n_online > self._capacity and not self._warned_of_buffer:
            self._warned_of_buffer = True
            warnings.warn(
                f"The replay buffer (`buffer_size={self.buffer_size}`) holds {self._capacity:,} transitions, fewer than the "
                f"{n_online} online ones of a batch, which are the same again and again: use a larger `buffer_size`.",
                stacklevel=3,
            )
        if self.learning_starts > 0 or not self._finetuning:
            # SB3's own rule has been applied by `learn`
            return True
        return buffer.size() * buffer.n_envs >= min(n_online, self._capacity)

    # Updates

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Sample batches and update the networks.

        :param gradient_steps: Number of gradient steps
        :param batch_size: Number of transitions in a batch
        """
        if not hasattr(self, "_logger"):
            self._logger = configure_logger(self.verbose, self.tensorboard_log, type(self).__name__, True)
        if not self._pretraining:
            self._look_for_new_best()
            if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
                self.replay_buffer.update_progress_remaining(self._current_progress_remaining)
            if not self._may_update(batch_size):
                return
        self._kernel = self._choose_kernel()
        if self._kernel.needs_training_mode:
            self.policy.set_training_mode(True)
        self._update_learning_rate([self.policy.actor.optimizer, self.policy.critic.optimizer])
        at_once = self._batches_at_once(batch_size)
        for start in range(0, gradient_steps, at_once):
            self._do_updates(min(at_once, gradient_steps - start), batch_size)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, values in self._logged.items():
            self.logger.record(name, _mean(values))
        self._logged.clear()
        self._log_sources()

    def _log_sources(self) -> None:
        if not isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            return
        rows = self.replay_buffer.sampled_rows_by_source()
        if len(rows) > 1:
            for number, (name, count) in enumerate(rows.items()):
                # Numbered, since SB3's logger refuses names whose first 30 characters or so are the same
                self.logger.record(f"replay/{number}: {name}", count)

    def _batches_at_once(self, batch_size: int) -> int:
        buffer = self.replay_buffer
        if not isinstance(buffer, OfflineToOnlineReplayBuffer):
            return BATCHES_AT_ONCE
        bytes_per_batch = buffer.nbytes_per_row * batch_size
        return max(1, min(BATCHES_AT_ONCE, BYTES_AT_ONCE // max(bytes_per_batch, 1)))

    def _do_updates(self, gradient_steps: int, batch_size: int) -> None:
        buffer, before = self.replay_buffer, self._n_updates
        position = buffer.sampler_position() if isinstance(buffer, OfflineToOnlineReplayBuffer) and self._pretraining else None
        try:
            for rows, n_rows in self._sample_rows(gradient_steps, batch_size):
                for batch in self._kernel.batches(rows, n_rows):
                    self._update(batch)
        except BaseException:
            done = self._n_updates - before
            if isinstance(buffer, OfflineToOnlineReplayBuffer) and position is not None and done < gradient_steps:
                # Batches that have been drawn and not been used are drawn again when pretraining goes on
                buffer.rewind(position)
                for _ in self._sample_rows(done, batch_size) if done > 0 else ():
                    pass
            raise

    def _update(self, batch: Batch) -> None:
        self._n_updates += 1
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            divergence = self.replay_buffer.update_density_ratio()
            if divergence is not None:
                self._log("train/online_offline_divergence", divergence)
        self._update_critic(batch)
        if self._n_updates % self.policy_delay == 0:
            update_actor = self._pretraining or self._n_updates > self._critic_warmup_end
            with self._averaging() if update_actor else nullcontext():
                if update_actor:
                    self._update_actor(batch)
                self._kernel.update_targets(self.tau, update_actor)

    def _averaging(self) -> AbstractContextManager[None]:
        """For the duration of the block the actor has the weights that gradient steps change; then it is their average."""
        if self._learned_weights is None or self._pretraining:
            return nullcontext()
        return self._learned_weights.in_place(self.actor, self.policy_averaging)

    def _choose_kernel(self) -> UpdateKernel:
        """The kernel for the next updates: the one in use if it still serves."""
        kernel = self._kernel if self._kernel is not None and self._kernel.policy is self.policy else None
        if self.kernel == "autograd":
            return kernel if isinstance(kernel, AutogradKernel) else AutogradKernel(self.policy)
        try:
            if not isinstance(kernel, FastKernel) or not kernel.is_current or kernel.precision != self.update_precision:
                kernel = FastKernel(self.policy, self.update_precision)
            kernel.prepare()
        except NotSupportedError as error:
            return self._fall_back(error)
        if self.verbose >= 1 and not isinstance(self._kernel, FastKernel):
            print(f"Update kernel: fast ({kernel.products.name})")
        return kernel

    def _fall_back(self, error: NotSupportedError) -> UpdateKernel:
        if self.kernel == "fast" or self.update_precision != "float32":
            option = "kernel='fast'" if self.kernel == "fast" else f"update_precision={self.update_precision!r}"
            raise ValueError(f"`{option}` cannot be used: {error}. Change that, or leave the option out.") from error
        if isinstance(self._kernel, AutogradKernel) and self._kernel.policy is self.policy:
            return self._kernel
        if error.surprising:
            warnings.warn(f"Updates are done by autograd, which is slower, since {error}.", stacklevel=4)
        elif self.verbose >= 1:
            print(f"Update kernel: autograd, since {error}")
        return AutogradKernel(self.policy)

    def _log(self, name: str, value: th.Tensor | float) -> None:
        # Tensors are kept as they are: reading their values here would stall each gradient step
        self._logged.setdefault(name, []).append(value.detach() if isinstance(value, th.Tensor) else value)

    def _sample_rows(self, n_batches: int, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """The next batches, batch after batch, in as few pieces as the buffer allows, and the number of rows of a batch."""
        buffer = self.replay_buffer
        assert buffer is not None
        fraction = 1.0 if self._pretraining else None
        if not isinstance(buffer, OfflineToOnlineReplayBuffer):
            for _ in range(n_batches):
                rows = buffer.sample(batch_size, env=self._vec_normalize_env)
                yield rows, len(rows.actions)
        elif getattr(buffer.sample, "__func__", None) is OfflineToOnlineReplayBuffer.sample:
            yield buffer.sample_batches(n_batches, batch_size, self._vec_normalize_env, fraction), batch_size
        else:
            # Somebody chooses rows in another way, perhaps by what was learned from the last ones
            for _ in range(n_batches):
                chosen = buffer.sample(batch_size, self._vec_normalize_env, fraction)
                yield chosen, len(chosen.actions)

    def _update_critic(self, batch: Batch) -> None:
        self._log("train/critic_loss", self._kernel.update_critics(self._target_q_values(batch)))

    @th.no_grad()
    def _target_q_values(self, batch: Batch) -> th.Tensor:
        """
        Targets of the critics: reward plus discounted minimum over the target critics at the smoothed target action
        (Fujimoto et al. 2018, algorithm 1), or over a random subset of them (Chen et al. 2021, algorithm 1).

        :param batch: The batch
        :return: Targets, shape ``(batch, 1)``
        """
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        # Online, SB3's stream (the global generator); offline a saved one, so that pretraining resumes to the bit
        generator = self._noise_generator if self._pretraining else None
        noise = th.empty_like(batch.actions).normal_(0, self.target_policy_noise, generator=generator)
        noise.clamp_(-self.target_noise_clip, self.target_noise_clip)
        critics = self._choose_target_critics(generator)
        next_q_values = self._kernel.next_q_values(noise, critics).amin(dim=1, keepdim=True)
        penalty = self._next_value_penalty(batch, self._kernel.next_actions, next_q_values)
        if penalty is not None:
            next_q_values = next_q_values - penalty
        return batch.rewards + (1 - batch.dones) * discounts * next_q_values

    def _choose_target_critics(self, generator: th.Generator | None) -> th.Tensor | None:
        """Indices of the target critics for this gradient step, None for all."""
        n_critics, n_chosen = len(self.policy.critic_target.q_networks), target_critics_of(self.policy)
        if n_chosen == n_critics:
            return None
        return th.randperm(n_critics, generator=generator, device=self.device)[:n_chosen]

    def _next_value_penalty(self, batch: Batch, next_actions: th.Tensor, next_q_values: th.Tensor) -> th.Tensor | None:
        """
        What the critics' targets take off the value of the next observation, such as a distance to other actions.

        :param batch: The batch
        :param next_actions: Smoothed target actions at the next observations, shape ``(batch, action_dim)``, in [-1, 1]
        :param next_q_values: Their values, shape ``(batch, 1)``
        :return: In the unit of the values, shape ``(batch, 1)``; None for nothing
        """
        return None

    def _update_actor(self, batch: Batch) -> None:
        loss = self._kernel.update_actor(lambda actions, q_values: self._actor_loss(batch, actions, q_values))
        self._log("train/actor_loss", loss)
        self._after_actor_update()

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective | th.Tensor:
        """
        The objective of the policy, to be minimised: the one method in which the algorithms differ.

        It is stated once for all kernels: as an ``ActorObjective``, or as a scalar built of differentiable operations on
        ``actions`` and ``q_values``, through which the gradient reaches the policy.

        :param batch: The batch
        :param actions: The policy's actions at the batch's observations, shape ``(batch, action_dim)``, in [-1, 1]
        :param q_values: The values of these actions that the policy maximises, shape ``(batch, 1)``: the first critic's, or
            the mean or minimum of all critics' if the policy's ``actor_value`` says so
        :return: The loss
        """
        return ActorObjective()

    def _after_actor_update(self) -> None:
        """Called after each step of the actor's optimizer."""

    def _look_for_new_best(self) -> None:
        # Evaluations run inside `collect_rollouts`; the weights have not changed since
        best = max((callback.best_mean_reward for callback in self._eval_callbacks), default=-math.inf)
        if best > self._best_mean_reward:
            self._best_mean_reward = best
            self._on_new_best()

    # Saving and loading

    def _excluded_save_params(self) -> list[str]:
        live = ["_noise_generator", "_logged", "_eval_callbacks", "_pretraining", "_online_timesteps", "_kernel"]
        others = ["_guide", "_guide_steps_schedule", "_learned_weights", "_warned_of_buffer"]
        return [*super()._excluded_save_params(), *live, *others]

    def _get_extra_state(self) -> dict[str, np.ndarray]:
        """
        What the learner needs to go on, beyond networks, optimizers and plain attributes.

        It is kept out of SB3's own parameter lists so that a plain ``TD3.load`` opens the file.

        :return: Arrays by name
        """
        state = {
            "noise_generator": self._noise_generator.get_state().numpy(),
            "has_trained_weights": np.array(self._has_trained_weights),
            "best_mean_reward": np.array(self._best_mean_reward),
            "defaults": np.array(json.dumps(_own_defaults(type(self)), default=repr)),
        }
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            state["offline_sampler"] = np.array(self.replay_buffer.get_sampler_state())
        if self.guide_policy == PRETRAINED and isinstance(self._guide, Actor):
            state |= weights_to_arrays(self._guide, GUIDE_PREFIX)
        if self._learned_weights is not None:
            state |= tensors_to_arrays(self._learned_weights.values, LEARNED_PREFIX)
        return state

    def _set_extra_state(self, state: dict[str, np.ndarray]) -> None:
        """
        Take up what :meth:`_get_extra_state` of this or a related algorithm returned.

        :param state: Arrays by name; empty for a file saved by SB3's TD3
        """
        # The state of a generator on another kind of device has another size, and its stream cannot go on here
        if "noise_generator" in state and state["noise_generator"].size == self._noise_generator.get_state().numel():
            self._noise_generator.set_state(th.from_numpy(state["noise_generator"].copy()))
        if "offline_sampler" in state and isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.set_sampler_state(str(state["offline_sampler"]))
        if self.guide_policy == PRETRAINED:
            weights = weights_from_arrays(state, GUIDE_PREFIX)
            self._guide = frozen_actor(self.policy) if weights else None
            if self._guide is not None:
                self._guide.load_state_dict(weights)
        self._learned_weights = None
        learned = weights_from_arrays(state, LEARNED_PREFIX)
        if learned:
            self._learned_weights = LearnedWeights(self.actor)
            self._learned_weights.load(learned)
        if "best_mean_reward" in state:
            # What an EvalCallback has seen since then was another policy
            seen = [float(state["best_mean_reward"]), *(callback.best_mean_reward for callback in self._eval_callbacks)]
            self._best_mean_reward = max(self._best_mean_reward, *seen)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file.

        The dataset is not in it, only its fingerprint and its spec, without any ``trust_pickle``. SB3's ``TD3.load`` and the
        ``load`` of the other algorithms of this package open the file too.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        # A file whose pretraining is complete counts as pretrained, whatever `offline_steps` a preset gives to `load`
        self._offline_finished |= self.offline_steps_done > 0 and self.remaining_offline_steps == 0
        live: dict[str, Any] = {"_extra_state": None}
        self._extra_state = arrays_to_text(self._get_extra_state())
        if self.dataset is not None and not isinstance(self.dataset, str):
            live["dataset"] = self.dataset
            given = self.offline_dataset or load_dataset(self.dataset)
            self.dataset = given.spec
            # Without it the file would not tell that there was data
            self.dataset_fingerprint = self.dataset_fingerprint or given.fingerprint
        elif self.dataset is not None:
            live["dataset"] = self.dataset
            self.dataset = without_trust(self.dataset)
        if self._has_own_buffer_class and self.n_steps > 1:
            # So that SB3's TD3, too, makes the buffer for n-step returns
            live["replay_buffer_kwargs"] = self.replay_buffer_kwargs
            self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "n_steps": self.n_steps, "gamma": self.gamma}
        if self.guide_policy is not None and not isinstance(self.guide_policy, str):
            live["guide_policy"] = self.guide_policy
            self.guide_policy = NOT_SAVED
        if self._online_timesteps is not None:
            live["num_timesteps"] = self.num_timesteps
            self.num_timesteps = self._online_timesteps
        try:
            super().save(path, exclude, include)
        finally:
            self.__dict__.update(live)

    @classmethod
    def load(
        cls: type[SelfOfflineTD3],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfOfflineTD3:
        """
        Load a model saved by this class, by another algorithm of this package or by SB3's TD3.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on (can be None if you only need prediction)
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading.
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training
        :param kwargs: constructor arguments that shall replace the saved ones
        :return: new model instance with loaded parameters
        :raises TypeError: A keyword is not an argument of the constructor
        """
        known_keywords(cls, kwargs, f"{cls.__name__}.load", excluded=("policy", "env", "device", "_init_setup_model"))
        # Those in the file are written by `save`
        _refuse_keywords(kwargs.get("replay_buffer_kwargs") or {}, *N_STEP_KEYWORDS)
        given = {**(custom_objects or {}), **kwargs}
        kwargs = _defaults_instead_of(path, cls, given) | kwargs
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if "dataset" not in given:
            # Whoever made the file cannot say that its user trusts the data
            model.dataset = without_trust(model.dataset)
        text = model._extra_state
        model._extra_state = None
        state = {} if text is None else arrays_from_text(text)
        # What SB3's TD3 saved is pretrained elsewhere
        model._offline_finished |= text is None
        model._pretrained = bool(state.get("has_trained_weights", True))
        if "dataset" in kwargs and kwargs["dataset"] is None:
            model.dataset_fingerprint = None
        if model._pretrained and "learning_starts" not in kwargs:
            # Random actions were for the saved run's beginning, not for weights that are trained
            model.learning_starts = 0
        if model._offline_finished and model.dataset is not None and model.offline_steps > model.offline_steps_done:
            if model.verbose >= 1:
                print("The loaded model counts as pretrained: no offline steps are left to do. For more, call `pretrain`.")
        model._set_extra_state(state)
        if kwargs.get("seed") is not None:
            # A new seed asks for new random streams, not for the saved ones
            model._seed_generators(kwargs["seed"])
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
        :param device: Device on which the code should run.
        """
        if isinstance(load_path_or_dict, dict):
            # Optimizers keep the tensors that they are given, which may be those of another learner
            load_path_or_dict = copy.deepcopy(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._pretrained = True
        if self._learned_weights is not None:
            self._learned_weights = LearnedWeights(self.actor)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the online part of the replay buffer and the state of the offline sampler, without pickle.

        :param path: The file, to which ``.npz`` is added if it has no suffix, or a binary stream
        """
        if not isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            super().save_replay_buffer(path)
        elif isinstance(path, io.BufferedIOBase):
            self.replay_buffer.save_online(path)  # type: ignore[arg-type]  # a binary stream in all but name
        else:
            path = pathlib.Path(path)
            self.replay_buffer.save_online(path if path.suffix else path.with_suffix(".npz"))

    def load_replay_buffer(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        truncate_last_traj: bool = True,
        trust_pickle: bool = False,
    ) -> None:
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
        buffer = self.replay_buffer
        if not isinstance(path, io.BufferedIOBase):
            path = _with_suffix(pathlib.Path(path))
        if isinstance(buffer, OfflineToOnlineReplayBuffer) and not _is_pickle(path):
            buffer.load_online(path)  # type: ignore[arg-type]  # a path or a binary stream in all but name
            return
        if not (trust_pickle or os.environ.get(TRUST_VARIABLE) == "1"):
            raise ValueError(
                f"{path} is no replay buffer of this package but a pickle file, which runs whatever code it holds when it is "
                "read. If you trust it, say so: `load_replay_buffer(path, trust_pickle=True)`, or set the environment "
                f"variable {TRUST_VARIABLE}=1 for the file that rl-zoo3 finds beside `-i`; else move it away."
            )
        if not isinstance(buffer, OfflineToOnlineReplayBuffer):
            super().load_replay_buffer(path, truncate_last_traj)
            return
        with path.open("rb") if isinstance(path, pathlib.Path) else nullcontext(path) as stream:
            buffer.copy_online(_unpickle_buffer(stream, str(path)), str(path))


def _own_defaults(cls: type[OfflineTD3]) -> dict[str, Any]:
    """Defaults of arguments of :class:`OfflineTD3` that an algorithm changes."""
    common, own = constructor_arguments(OfflineTD3), constructor_arguments(cls)
    return {name: own[name] for name in common if name in own and own[name] != common[name]}


def _defaults_instead_of(
    path: str | pathlib.Path | io.BufferedIOBase, cls: type[OfflineTD3], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What another algorithm left at its default in a file is here at ours, as for a learner that is constructed."""
    settings = _read_settings(path)
    state = arrays_from_text(settings["_extra_state"]) if settings.get("_extra_state") is not None else {}
    if "defaults" not in state:
        return {}
    saved, own, common = json.loads(str(state["defaults"])), _own_defaults(cls), constructor_arguments(OfflineTD3)
    # A loaded agent takes no random actions, and an average that there is goes on
    kept = {"learning_starts"} | ({"policy_averaging"} if weights_from_arrays(state, LEARNED_PREFIX) else set())
    names = [name for name in common if name in saved.keys() | own.keys() and name not in given.keys() | kept]
    return {name: own.get(name, common[name]) for name in names if settings.get(name) == saved.get(name, common[name])}


def _read_settings(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
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


def _refuse_keywords(replay_buffer_kwargs: Mapping[str, Any], *refused: str) -> None:
    for name in sorted(replay_buffer_kwargs.keys() & set(refused)):
        raise ValueError(f"`replay_buffer_kwargs` has {name!r}, which the algorithm sets: use its own `{name}`.")


def _mean(values: list[th.Tensor | float]) -> float:
    if len(values) == 1:
        return float(values[0])
    return float(th.stack([th.as_tensor(value, dtype=th.float64) for value in values]).mean())


def _with_suffix(path: pathlib.Path) -> pathlib.Path:
    """What a path without a suffix means: our file, or else SB3's."""
    if path.suffix or path.exists():
        return path
    ours, theirs = path.with_suffix(".npz"), path.with_suffix(".pkl")
    return theirs if theirs.exists() and not ours.exists() else ours


def _is_pickle(path: pathlib.Path | io.BufferedIOBase) -> bool:
    """Whether a replay buffer is SB3's: rl-zoo3 names ours ``.pkl`` too."""
    if isinstance(path, io.BufferedIOBase):
        start = path.read(len(ZIP_MAGIC))
        path.seek(-len(start), io.SEEK_CUR)
        return start != ZIP_MAGIC
    with path.open("rb") as file:
        return path.suffix == ".pkl" and file.read(len(ZIP_MAGIC)) != ZIP_MAGIC


def _unpickle_buffer(stream: io.BufferedIOBase, name: str) -> ReplayBuffer:
    with naming_damage(name, "a replay buffer"):
        loaded = load_from_pkl(stream)
    if not isinstance(loaded, ReplayBuffer):
        raise ValueError(f"{name} holds a {type(loaded).__name__}: expected a ReplayBuffer.")
    return loaded
