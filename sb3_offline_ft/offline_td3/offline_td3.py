"""TD3 with logged data: offline pretraining, warm-up with the frozen policy, online finetuning."""

import time
from collections import deque
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.td3.policies import TD3Policy

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.callbacks import PretrainingLocals, check_needs_no_episodes, telling_of_episodes
from sb3_offline_ft.common.checks import show_constructor, whole_number
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.offline_td3.data import check_vec_normalize
from sb3_offline_ft.offline_td3.files import SavedLearner, with_policy_defaults
from sb3_offline_ft.offline_td3.learner import SB3_LEARNING_STARTS
from sb3_offline_ft.policies.guide import GuideLike
from sb3_offline_ft.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_offline_ft.update import ActorObjective, Batch
from sb3_offline_ft.update.kernel import target_critics_of

SelfOfflineTD3 = TypeVar("SelfOfflineTD3", bound="OfflineTD3")


class OfflineTD3(SavedLearner):
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
    :param target_noise_clip: Limit for absolute value of target policy smoothing noise
    :param stats_window_size: Window size for the rollout logging
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
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
    online_only_arguments: ClassVar[frozenset[str]] = frozenset(
        "buffer_size learning_starts train_freq gradient_steps action_noise stats_window_size tensorboard_log verbose "
        "offline_fraction warmup_steps warmup_action_noise critic_warmup_steps reset_optimizers guide_policy guide_steps "
        "policy_averaging".split()
    )
    """Arguments that do not act before the first interaction; each class names those that it adds."""

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
            policy_kwargs=with_policy_defaults(type(self), policy, policy_kwargs),
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.dataset = dataset
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
        if _init_setup_model:
            self._setup_model()

    # Phases

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
        :param progress_bar: Display a progress bar using tqdm and rich
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
        check_vec_normalize(self)
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
            self._run_offline(gradient_steps, started, progress_bar, log_interval, listeners=started)
            if started is not None:
                started.on_training_end()
        return self

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
        :param progress_bar: Display a progress bar using tqdm and rich
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
            self.evaluations.follow(None)
        return self

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
    def _pretraining(self) -> bool:
        """Whether the update is an offline one."""
        return self.life_cycle.is_pretraining

    @property
    def _finetuning(self) -> bool:
        """Whether the present run has data or began with trained weights."""
        return self.life_cycle.is_finetuning

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


show_constructor(OfflineTD3)
