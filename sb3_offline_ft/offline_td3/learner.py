"""What becomes of Stable-Baselines3's TD3 when it is pretrained on logged data, warmed up and finetuned."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.td3.policies import TD3Policy

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.callbacks import BestEvaluation, InitialEvaluation, as_list, callbacks_with, find_callbacks
from sb3_offline_ft.common.callbacks import progress_bar as make_progress_bar
from sb3_offline_ft.common.checks import known_keywords, show_constructor, whole_number
from sb3_offline_ft.common.logger import OfflineLogger
from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import ScheduleLike
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets import DatasetSpec, OfflineDataset
from sb3_offline_ft.offline_td3 import data
from sb3_offline_ft.offline_td3.acting import Acting
from sb3_offline_ft.offline_td3.life_cycle import LifeCycle, Phase
from sb3_offline_ft.offline_td3.updates import OfflineRandomness, Updater, check_kernel
from sb3_offline_ft.policies.guide import GuideLike, check_guide

SB3_LEARNING_STARTS = 100
PROGRESS_CHUNK = 50
"""Gradient steps between two updates of the progress bar."""


class OfflineLearner(TD3):
    """
    A TD3 that is made of parts, each with one state, and goes through the phases of a :class:`LifeCycle`.

    Its arguments, and what an update is, are those of :class:`OfflineTD3`.
    """

    policy: TD3Policy
    dataset: DatasetSpec | None
    offline_steps: int
    offline_fraction: ScheduleLike
    warmup_steps: int
    warmup_action_noise: bool
    critic_warmup_steps: int
    reset_optimizers: bool
    normalize_observations: bool
    kernel: str
    update_precision: str
    guide_policy: GuideLike
    guide_steps: ScheduleLike
    policy_averaging: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_constructor(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before __init__, since Python's own message names neither near matches nor what is known
        known_keywords(cls, kwargs, cls.__name__)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.dataset_fingerprint: str | None = None
        self.flattened_keys: list[str] | None = None
        self.life_cycle = LifeCycle()
        self.updater = Updater()
        self.evaluations = BestEvaluation()
        self.room = data.Room()
        try:
            super().__init__(*args, **{**kwargs, "_init_setup_model": False})
        except AssertionError as error:
            action_space = getattr(self, "action_space", None)
            if action_space is None or isinstance(action_space, spaces.Box):
                raise
            raise ValueError(
                f"{type(self).__name__} needs a Box action space with finite bounds, the environment has {action_space}: "
                "use an environment with continuous actions, or an algorithm for discrete ones such as DQN."
            ) from error

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
        self.acting = Acting(self, self.guide_policy, self._guide_steps_schedule)
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

    # Phases

    def _run_offline(
        self,
        gradient_steps: int,
        callback: BaseCallback | None,
        progress_bar: bool,
        log_interval: int = 1000,
        listeners: BaseCallback | None = None,
    ) -> None:
        """
        :param listeners: Callbacks of which those that have ``on_offline_start`` are called before updates, with all of them,
            and those that have ``after_offline_updates`` after them, although others do not run yet
        """
        bar = make_progress_bar(gradient_steps, f"{type(self).__name__} offline") if progress_bar else None
        before: list[Any] = list(callbacks_with(listeners, "on_offline_start"))
        after: list[Any] = list(callbacks_with(listeners, "after_offline_updates"))
        start_time, start, last = time.monotonic(), self.offline_steps_done, self.offline_steps_done + gradient_steps
        try:
            while self.offline_steps_done < last:
                for listener in before:
                    listener.on_offline_start(listeners)
                until_log = log_interval - self.offline_steps_done % log_interval
                chunk = 1 if callback is not None else min(PROGRESS_CHUNK, until_log, last - self.offline_steps_done)
                self._update_offline(chunk)
                if bar is not None:
                    bar.update(chunk)
                for listener in after:
                    listener.after_offline_updates()
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

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._check_run(goes_on=self.life_cycle.went_online and not reset_num_timesteps)
        data.check_dataset_is_there(self)
        self.acting.prepare()
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
        self.evaluations.follow(started)
        if self.remaining_offline_steps > 0:
            show = progress_bar or any(True for _ in find_callbacks(started, ProgressBarCallback))
            try:
                with self._offline_phase():
                    self._run_offline(self.remaining_offline_steps, None, show, listeners=started)
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

    def _check_run(self, goes_on: bool) -> None:
        """Called before anything is done in ``learn``: whether the run can be what is asked, goes on or begins."""

    def _begin_finetuning(self, total_timesteps: int) -> None:
        pretrained = self.life_cycle.begin_run(
            self.num_timesteps, self._n_updates, self.dataset is not None, self.warmup_steps, self.critic_warmup_steps
        )
        if not self.life_cycle.is_finetuning:
            warn(f"{type(self).__name__} has neither a dataset nor pretrained weights: it trains online like TD3.")
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
                warn(
                    f"`learning_starts={self.learning_starts}` would replace the pretrained policy by random actions: "
                    "0 is used. To let the pretrained policy act before the first update, use `warmup_steps`."
                )
            self.learning_starts = 0
        if self.reset_optimizers:
            self.actor.optimizer.state.clear()
            self.critic.optimizer.state.clear()
        if 0 < total_timesteps <= self.warmup_steps:
            warn(
                f"The warm-up ({self.warmup_steps} steps) is as long as the run ({total_timesteps} steps): nothing will be "
                "learned online. Use more steps or a smaller `warmup_steps`."
            )

    def _on_finetuning_start(self, pretrained: bool) -> None:
        """
        Called once at the start of a finetuning run, before its first interaction.

        :param pretrained: Whether the agent has weights worth keeping
        """

    def _on_new_best(self) -> None:
        """Called before the next update when an ``EvalCallback`` has found the current policy better than all before."""

    def _may_update(self, batch_size: int) -> bool:
        self._look_for_new_best()
        if isinstance(self.replay_buffer, OfflineToOnlineReplayBuffer):
            self.replay_buffer.update_progress_remaining(self._current_progress_remaining)
        is_frozen = 0 < self.num_timesteps <= self.life_cycle.frozen_until
        return not is_frozen and self.room.has_a_batch(self, batch_size)

    def _look_for_new_best(self) -> None:
        # Evaluations run inside `collect_rollouts`; the weights have not changed since
        if self.evaluations.has_new(self):
            self._on_new_best()

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
        others = self.acting.others(self._current_progress_remaining)
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
