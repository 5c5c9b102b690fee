"""TD3 with logged data: offline pretraining, warm-up with the frozen policy, online finetuning."""

import copy
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.td3.policies import TD3Policy

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.callbacks import (
    BestEvaluation,
    InitialEvaluation,
    PretrainingLocals,
    as_list,
    check_needs_no_episodes,
    find_callbacks,
    telling_of_episodes,
)
from sb3_offline_ft.common.callbacks import progress_bar as make_progress_bar
from sb3_offline_ft.common.checks import known_keywords, show_constructor, whole_number
from sb3_offline_ft.common.logger import OfflineLogger
from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.datasets import DatasetSpec, OfflineDataset
from sb3_offline_ft.offline_td3 import data, files
from sb3_offline_ft.offline_td3.acting import Acting
from sb3_offline_ft.offline_td3.life_cycle import LifeCycle, Phase
from sb3_offline_ft.offline_td3.updates import OfflineRandomness, Updater, check_kernel
from sb3_offline_ft.policies.averaging import LearnedWeights
from sb3_offline_ft.policies.guide import GuideLike, check_guide
from sb3_offline_ft.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_offline_ft.update import ActorObjective, Batch
from sb3_offline_ft.update.kernel import target_critics_of

SelfOfflineTD3 = TypeVar("SelfOfflineTD3", bound="OfflineTD3")

SB3_LEARNING_STARTS = 100
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
    policy_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Defaults that ``policy_kwargs`` have with the policies of this package."""
    online_only_arguments: ClassVar[frozenset[str]] = frozenset(
        "buffer_size learning_starts train_freq gradient_steps action_noise stats_window_size tensorboard_log verbose "
        "offline_fraction warmup_steps warmup_action_noise critic_warmup_steps reset_optimizers guide_policy guide_steps "
        "policy_averaging".split()
    )
    """Arguments that do not act before the first interaction; each class names those that it adds."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_constructor(cls)

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
                policy_kwargs=files.with_policy_defaults(type(self), policy, policy_kwargs),
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
        # Parts that are not in a saved model as they are, see `files`
        self.life_cycle = LifeCycle()
        self.updater = Updater()
        self.evaluations = BestEvaluation()
        self.room = data.Room()
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_settings()
        data.choose_buffer_class(self)
        self._noise_generator = th.Generator(device=self.device)
        n_steps = self.n_steps
        try:
            if data.has_own_buffer_class(self):
                # SB3 would warn that it does not tell the buffer, which is done below
                self.n_steps = 1
            super()._setup_model()
        finally:
            self.n_steps = n_steps
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.offline_fraction = self.offline_fraction
            self.replay_buffer.set_n_steps(self.n_steps, self.gamma)
        self._randomness.seed(self.seed)
        self.acting = Acting(self.policy, self.guide_policy, self._guide_steps_schedule)
        self.updater.check(self)

    def _check_settings(self) -> None:
        """Check and convert what is settable in the constructor and in ``load``."""
        for name in ("offline_steps", "warmup_steps", "critic_warmup_steps"):
            setattr(self, name, whole_number(getattr(self, name), name))
        make_schedule(self.offline_fraction, "offline_fraction", 0.0, 1.0)
        check_kernel(self.kernel, self.update_precision)
        self.guide_policy, self._guide_steps_schedule = check_guide(self.guide_policy, self.guide_steps)
        if not isinstance(self.policy_averaging, int | float) or not 0 <= self.policy_averaging < 1:
            raise ValueError(
                "`policy_averaging` must be at least 0 and less than 1, such as 0.999, or 0 for no averaging, found "
                f"{self.policy_averaging!r}."
            )
        self.n_steps = whole_number(self.n_steps, "n_steps", least=1)
        data.check_buffer_keywords(self)
        data.check_dataset(self)

    @property
    def _randomness(self) -> OfflineRandomness:
        return OfflineRandomness(self._noise_generator, self.replay_buffer)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo random generators (python, numpy, pytorch, gym, action_space, and our own)

        :param seed: The seed; None changes nothing
        """
        super().set_random_seed(seed)
        if seed is not None:
            self._randomness.seed(seed)

    # Where the learner is

    @property
    def phase(self) -> Phase:
        """What the learner does at present."""
        return self.life_cycle.phase(self.num_timesteps, self._n_updates)

    @property
    def offline_steps_done(self) -> int:
        """Gradient steps of pretraining so far."""
        return self.life_cycle.offline_steps_done

    @property
    def remaining_offline_steps(self) -> int:
        """Gradient steps of pretraining that :meth:`learn` still has to do before it goes online."""
        if self.dataset is None or self.life_cycle.offline_is_finished:
            return 0
        return max(0, self.offline_steps - self.offline_steps_done)

    @property
    def has_trained_weights(self) -> bool:
        """Whether the weights come from updates, of this learner or of another."""
        return self.life_cycle.has_trained_weights(self._n_updates)

    @property
    def first_warmup_end(self) -> int:
        """Environment steps (``num_timesteps``) until which the policy of this finetuning run has not been updated at all."""
        return self.life_cycle.first_warmup_end

    def begin_warmup(self, steps: int) -> None:
        """
        From now on let the policy of a run in progress act unchanged, without an update, such as after a rollback. Within a
        warm-up, this can only prolong it.

        :param steps: Number of environment steps
        """
        self.life_cycle.begin_warmup(self.num_timesteps, whole_number(steps, "steps"))

    # Data

    @property
    def offline_dataset(self) -> OfflineDataset | None:
        """The loaded dataset, None before the first use."""
        buffer = self.replay_buffer
        return buffer.offline_data if isinstance(buffer, OfflineToOnlineReplayBuffer) else None

    def load_offline_data(self) -> None:
        """
        Load the dataset into the replay buffer, if there is one and it has not been loaded yet.

        Called by :meth:`pretrain` and :meth:`learn`. Fits the observation normalizer before the first update.

        :raises ValueError: The dataset cannot be read or does not fit the environment; nothing is changed then
        """
        if self.dataset is not None and self.offline_dataset is None:
            data.load_into_buffer(self)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Checks the validity of the environment, and if it is coherent, set it as the current environment.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training
        :raises ValueError: Its spaces are others, or it flattens the keys of its observations in another order than the data
            was put into
        """
        wrapped = self._wrap_env(env, self.verbose)
        data.check_order_of_keys(self, wrapped)
        super().set_env(wrapped, force_reset)

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
        data.check_vec_normalize(self)
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
                self._update_offline(chunk)
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

    def _update_offline(self, gradient_steps: int) -> None:
        before = self._n_updates
        try:
            self.train(gradient_steps, self.batch_size)
        finally:
            # Counted from what was really done: an interrupt may come in the middle
            self.life_cycle.offline_steps_done += self._n_updates - before

    @contextmanager
    def _offline_phase(self) -> Iterator[None]:
        """For the duration of the block, log under ``offline/`` and count gradient steps instead of environment steps."""
        logger, progress_remaining, num_timesteps = self._logger, self._current_progress_remaining, self.num_timesteps
        self._logger = OfflineLogger(logger)
        self._current_progress_remaining = 1.0
        self.num_timesteps = self.offline_steps_done
        try:
            with self.life_cycle.pretraining(num_timesteps):
                yield
        finally:
            self._logger = logger
            self._current_progress_remaining = progress_remaining
            self.num_timesteps = num_timesteps

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
            self.evaluations.callbacks = []
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        data.check_dataset_is_there(self)
        self.acting.prepare(self)
        self.load_offline_data()
        data.check_augmentation(self)
        data.check_vec_normalize(self)
        initial_evaluation, callbacks = InitialEvaluation(), as_list(callback)
        if any(isinstance(given, BaseCallback) and any(find_callbacks(given, EvalCallback)) for given in callbacks):
            callbacks = [*callbacks, initial_evaluation]
        is_reset = reset_num_timesteps or self._last_obs is None
        total_timesteps, started = super()._setup_learn(
            total_timesteps, callbacks, reset_num_timesteps, tb_log_name, progress_bar
        )
        if is_reset or self.acting.episode_steps.size != self.n_envs:
            # A file of an older version does not tell how far its episodes are
            self.acting.episode_steps = np.zeros(self.n_envs, dtype=int)
        if is_reset and isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.cut_episodes()
        self.evaluations.callbacks = list(find_callbacks(started, EvalCallback))
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
        if reset_num_timesteps or not self.life_cycle.went_online:
            if self.has_trained_weights:
                initial_evaluation.evaluations = self.evaluations.callbacks
            self._begin_finetuning(total_timesteps - self.num_timesteps)
        else:
            self.room.compare_with_run(self, total_timesteps, goes_on=True)
        return total_timesteps, started

    def _begin_finetuning(self, total_timesteps: int) -> None:
        pretrained = self.life_cycle.begin_run(
            self.num_timesteps, self._n_updates, self.dataset is not None, self.warmup_steps, self.critic_warmup_steps
        )
        if not self.life_cycle.is_finetuning:
            warnings.warn(
                f"{type(self).__name__} has neither a dataset nor pretrained weights: it trains online like TD3.", stacklevel=5
            )
        if pretrained:
            self._begin_with_trained_weights(total_timesteps)
        self.room.begin_run()
        self.room.compare_with_run(self, total_timesteps)
        self.acting.begin_run(averages=pretrained and self.policy_averaging > 0)
        self.evaluations.begin_run()
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
        if 0 < total_timesteps <= self.warmup_steps:
            warnings.warn(
                f"The warm-up ({self.warmup_steps} steps) is as long as the run ({total_timesteps} steps): nothing will be "
                "learned online. Use more steps or a smaller `warmup_steps`.",
                stacklevel=6,
            )

    def _on_finetuning_start(self, pretrained: bool) -> None:
        """
        Called once at the start of a finetuning run, before its first interaction.

        :param pretrained: Whether the agent has weights worth keeping
        """

    def _on_new_best(self) -> None:
        """Called before the next update when an ``EvalCallback`` has found the current policy better than all before."""

    # Acting

    def let_act(self, policy: BaseAlgorithm | BasePolicy | None) -> None:
        """
        Let another policy act in training episodes from now on, without noise; a guide still begins them. It is not saved.

        :param policy: The policy, with this learner's spaces; None for the learner itself
        """
        self.acting.substitute = policy

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        in_warmup = self.num_timesteps < self.life_cycle.frozen_until
        if (in_warmup and not self.warmup_action_noise) or self.acting.substitute is not None:
            action_noise = None
        others = self.acting.others(self, self._current_progress_remaining)
        if others is None:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        _, scaled_actions = super()._sample_action(learning_starts, None, n_envs)
        scaled_actions = scaled_actions.copy()
        scaled_actions[others[0]] = others[1][others[0]]
        if action_noise is not None:
            scaled_actions = np.clip(scaled_actions + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_actions), scaled_actions

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is not None:
            self.acting.count_steps(dones)

    # Updates

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Sample batches and update the networks.

        :param gradient_steps: Number of gradient steps
        :param batch_size: Number of transitions in a batch
        """
        if not hasattr(self, "_logger"):
            self._logger = configure_logger(self.verbose, self.tensorboard_log, type(self).__name__, True)
        if not self.life_cycle.is_pretraining and not self._may_update(batch_size):
            return
        if self.updater.choose_kernel(self).needs_training_mode:
            self.policy.set_training_mode(True)
        self._update_learning_rate([self.policy.actor.optimizer, self.policy.critic.optimizer])
        self.updater.run(self, gradient_steps, batch_size, self._update)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.updater.record(self.replay_buffer, self.logger)

    def _may_update(self, batch_size: int) -> bool:
        self._look_for_new_best()
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.update_progress_remaining(self._current_progress_remaining)
        is_frozen = 0 < self.num_timesteps <= self.life_cycle.frozen_until
        return not is_frozen and self.room.has_a_batch(self, batch_size)

    def _look_for_new_best(self) -> None:
        # Evaluations run inside `collect_rollouts`; the weights have not changed since
        if self.evaluations.has_new():
            self._on_new_best()

    def draw_batch(self, batch_size: int) -> Batch:
        """
        Draw a batch and make it the one that the hooks below work on, as an update does; to try out what they do.

        :param batch_size: Number of transitions
        :return: The batch
        """
        return self.updater.draw_batch(self, batch_size)

    def _update(self, batch: Batch) -> None:
        self._n_updates += 1
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            divergence = self.replay_buffer.update_density_ratio()
            if divergence is not None:
                self._log("train/online_offline_divergence", divergence)
        self._update_critic(batch)
        if self._n_updates % self.policy_delay == 0:
            update_actor = self.life_cycle.is_pretraining or self._n_updates > self.life_cycle.critic_warmup_end
            learned = self.acting.learned_weights if update_actor and not self.life_cycle.is_pretraining else None
            # The actor has the weights that gradient steps change, then it has their average
            with nullcontext() if learned is None else learned.in_place(self.actor, self.policy_averaging):
                if update_actor:
                    self._update_actor(batch)
                self.updater.kernel.update_targets(self.tau, update_actor)

    def _log(self, name: str, value: th.Tensor | float) -> None:
        self.updater.log(name, value)

    @property
    def _generator(self) -> th.Generator | None:
        """
        Of random numbers in the hooks: online SB3's stream, the global one, for which None stands; offline a saved one, so
        that pretraining resumes to the bit.
        """
        return self._noise_generator if self.life_cycle.is_pretraining else None

    def _update_critic(self, batch: Batch) -> None:
        self._log("train/critic_loss", self.updater.kernel.update_critics(self._target_q_values(batch)))

    @th.no_grad()
    def _target_q_values(self, batch: Batch) -> th.Tensor:
        """
        Targets of the critics: reward plus discounted minimum over the target critics at the smoothed target action
        (Fujimoto et al. 2018, algorithm 1), or over a random subset of them (Chen et al. 2021, algorithm 1).

        :param batch: The batch
        :return: Targets, shape ``(batch, 1)``
        """
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        noise = th.empty_like(batch.actions).normal_(0, self.target_policy_noise, generator=self._generator)
        noise.clamp_(-self.target_noise_clip, self.target_noise_clip)
        critics = self._choose_target_critics()
        next_q_values = self.updater.kernel.next_q_values(noise, critics).amin(dim=1, keepdim=True)
        penalty = self._next_value_penalty(batch, self.updater.kernel.next_actions, next_q_values)
        if penalty is not None:
            next_q_values = next_q_values - penalty
        return batch.rewards + (1 - batch.dones) * discounts * next_q_values

    def _choose_target_critics(self) -> th.Tensor | None:
        """Indices of the target critics for this gradient step, None for all."""
        n_critics, n_chosen = len(self.policy.critic_target.q_networks), target_critics_of(self.policy)
        if n_chosen == n_critics:
            return None
        return th.randperm(n_critics, generator=self._generator, device=self.device)[:n_chosen]

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
        loss = self.updater.kernel.update_actor(lambda actions, q_values: self._actor_loss(batch, actions, q_values))
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

    # Saving and loading

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
        """
        :return: The state of what a learner keeps besides networks, optimizers and counters; its memory may be the learner's
        """
        return {name: array for part in self._stateful_parts().values() for name, array in part.state_dict().items()}

    def load_extra_state(self, state: Mapping[str, np.ndarray], generators: bool = True) -> None:
        """
        :param state: What :meth:`extra_state` of this or a related algorithm returned; empty for a file saved by SB3's TD3
        :param generators: Whether to restore the streams of random numbers too
        """
        for name, part in self._stateful_parts().items():
            if generators or name != "randomness":
                part.load_state_dict(state)

    def position(self) -> dict[str, Any]:
        """
        :return: What says how updates are done, but for what counts progress
        """
        return {"learning_starts": self.learning_starts, **self.life_cycle.position()}

    def set_position(self, position: Mapping[str, Any]) -> None:
        """
        :param position: What :meth:`position` returned; other names are ignored
        """
        self.learning_starts = position.get("learning_starts", self.learning_starts)
        self.life_cycle.load_state_dict(position)

    def save(self, path: files.File, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file.

        The dataset is not in it, only its fingerprint and its spec, without any ``trust_pickle``. SB3's ``TD3.load`` and the
        ``load`` of the other algorithms of this package open the file too.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        with files.as_in_file(self):
            super().save(path, exclude, include)

    @classmethod
    def load(
        cls: type[SelfOfflineTD3],
        path: files.File,
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
        given = {**(custom_objects or {}), **kwargs}
        kwargs = files.arguments_for(cls, path, kwargs, given)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        files.take_up(model, kwargs, "dataset" in given)
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
        :param device: Device on which the code should run.
        """
        if isinstance(load_path_or_dict, dict):
            # Optimizers keep the tensors that they are given, which may be those of another learner
            load_path_or_dict = copy.deepcopy(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)
        self.life_cycle.is_pretrained = True
        if self.acting.learned_weights is not None:
            self.acting.learned_weights = LearnedWeights(self.actor)

    def save_replay_buffer(self, path: files.File) -> None:
        """
        Save the online part of the replay buffer and the state of the offline sampler, without pickle.

        :param path: The file, to which ``.npz`` is added if it has no suffix, or a binary stream
        """
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            # A binary stream is one in all but name
            self.replay_buffer.save_online(files.buffer_file(path))  # type: ignore[arg-type]
        else:
            super().save_replay_buffer(path)

    def load_replay_buffer(self, path: files.File, truncate_last_traj: bool = True, trust_pickle: bool = False) -> None:
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
        path, buffer = files.existing_buffer_file(path), self.replay_buffer
        if isinstance(buffer, OfflineToOnlineReplayBuffer) and not files.is_pickle(path):
            buffer.load_online(path)  # type: ignore[arg-type]
            return
        files.check_is_trusted(path, trust_pickle)
        if isinstance(buffer, OfflineToOnlineReplayBuffer):
            buffer.copy_online(files.unpickle_buffer(path), str(path))
        else:
            super().load_replay_buffer(path, truncate_last_traj)


show_constructor(OfflineTD3)
