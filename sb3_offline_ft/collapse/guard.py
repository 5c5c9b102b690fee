"""A callback that notices policy collapse while a policy is finetuned, and undoes it."""

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import HumanOutputFormat
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.detectors import Alarm, Detector, make_detector
from sb3_offline_ft.collapse.events import EPISODES, EVENTS_FILE, EventLog
from sb3_offline_ft.collapse.figure import draw_events
from sb3_offline_ft.collapse.monitor import EpisodeMonitor
from sb3_offline_ft.collapse.remedies import PolicyBrake, Remedy, make_remedies
from sb3_offline_ft.collapse.replay import ReplayMark, check_can_thin_out, replace_last_if_not_finite, thin_out_since
from sb3_offline_ft.collapse.signals import SignalMonitor
from sb3_offline_ft.collapse.snapshot import LearnerSnapshot
from sb3_offline_ft.common.callbacks import find_callbacks, monitor_folder
from sb3_offline_ft.common.checks import known_keywords, whole_number
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json

FIGURE_FILE = "collapse.png"
SNAPSHOT_FOLDER = "snapshots"
STATE_ATTRIBUTE = "collapse_guard_state"
STATE_VERSION = 1
LEAST_BASELINE = 5
PROMOTION_LEVEL = 0.05
RATCHET_LEVEL = 0.01
WITHIN_FREQ = 5
"""Steps between two looks at a running episode."""
CANDIDATE_LIFE = 4
"""Windows of ``promotion_episodes`` after which an undecided candidate is replaced by a newer one."""
FAILURES_PER_SNAPSHOT = 2
"""Rollbacks to the same snapshot without a promotion in between, after which an older one is tried."""
ENDINGS = ("freeze", "stop", "continue")
POISONED_DATA = {"keep": 1.0, "drop": 0.0}

DEFAULT_REMEDIES: tuple[Mapping[str, Any], ...] = (
    {"critic_warmup": {"steps": 1000}},
    {"trust_region": {"radius": 0.01}},
    {"tighter_constraint": {"factor": 0.5}},
)


@dataclass
class _Good:
    """A state of the learner that was found good, and what was known then."""

    snapshot: LearnerSnapshot
    timestep: int
    reference: list[Any]
    mark: ReplayMark = field(default_factory=lambda: ReplayMark(0, False))
    rows: int = 0
    is_reference: bool = False
    """Whether its policy became the reference of a constrained algorithm when it was promoted."""


def _described(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if isinstance(value, int | float))


class CollapseGuard(BaseCallback):
    """
    Notices the collapse of a policy during finetuning by a calibrated sequential test on the returns of the training
    episodes, and puts the whole learner back to its last good state.

    For every off-policy algorithm of SB3 and sb3-contrib. The *baseline* is what the policy earned before its first update,
    in a warm-up, or is given. As long as nothing is wrong the guard only watches: training with it is the same, to the bit,
    as without it.

    **Promise.** If every episode is distributed as those of the baseline, the probability that the guard raises any alarm of
    the detector in a run of at most ``horizon_episodes`` monitored episodes between two baselines is at most
    ``false_alarm_rate``. The rate is spent over the run: a monitoring period that starts after a rollback or on a raised
    baseline gets its own, smaller share, ``false_alarm_rate / ((i + 1) (i + 2))`` for the i-th, counted from 0; an attempt to
    raise the baseline that is given up spends one too.

    :param detector: ``"cusum"``, ``"betting"`` or ``"deterioration"`` (may fire within an episode), the same with keywords,
        such as ``{"cusum": {"drift": 0.25}}``, or a :class:`Detector`
    :param false_alarm_rate: Probability of a false alarm in the run, in (0, 1)
    :param horizon_episodes: Number of episodes for which it holds
    :param baseline: ``"warmup"``: training episodes before the first update (see ``warmup_steps`` of our algorithms);
        ``"evaluations"``: those of the run's ``EvalCallback``, which are then monitored in place of training episodes;
        or returns of at least 5 episodes of the policy with its exploration noise
    :param tolerance: Losses of less than this share of the distance between the baseline's mean and ``random_return`` are not
        a collapse
    :param random_return: Mean return of a random policy
    :param promotion_episodes: Number of episodes on which a state of the learner is judged before it is promoted
    :param keep_snapshots: Number of promoted states to keep in memory, besides the first one
    :param ratchet: Whether the baseline is raised when the policy has become significantly better
    :param max_rollbacks: Number of rollbacks before the guard gives up
    :param after_max_rollbacks: What is done at the next alarm: ``"freeze"``: restore, and let the policy act unchanged for the
        rest of the run; ``"stop"``: restore and end training; ``"continue"``: only log
    :param remedies: What is changed after a rollback: names, ``{name: {keyword: value}}``, or :class:`Remedy` objects, in this
        order; by default those of ``DEFAULT_REMEDIES`` that the learner supports
    :param poisoned_data: What is done with the transitions gathered since the restored state was promoted: ``"keep"``,
        ``"drop"``, or their weight in (0, 1) relative to the others
    :param secondary_alarms: Limits of heuristic signals (see :class:`SignalMonitor`), above which an alarm is raised, such as
        ``{"policy_shift": 0.5}``; they have no error rate. Non-finite losses, actions and parameters always raise an alarm
    :param signal_freq: Environment steps (of one environment) between two measurements of these signals; 0 for none
    :param update_reference: Whether a promotion with better returns moves the reference policy of a constrained algorithm
        such as TD3C. This is the one option by which the guard takes part in a run without collapse
    :param path: Folder for ``collapse_events.jsonl`` and ``collapse.png``; by default that of the run's ``EvalCallback`` or of
        the logger, if any
    :param save_snapshots: Whether promoted states are also written to ``path``, so that a loaded run can be rolled back to
        them
    :param verbose: 0 for no output, 1 for baselines, alarms and rollbacks, 2 for promotions too
    :raises ValueError: A parameter is out of range
    """

    model: OffPolicyAlgorithm

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before __init__, since Python's own message names neither near matches nor what is known
        known_keywords(cls, kwargs, cls.__name__)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        detector: str | Mapping[str, Any] | Detector = "betting",
        false_alarm_rate: float = 0.01,
        horizon_episodes: int = 1000,
        baseline: str | Sequence[float] | np.ndarray = "warmup",
        tolerance: float = 0.1,
        random_return: float = 0.0,
        promotion_episodes: int = 10,
        keep_snapshots: int = 3,
        ratchet: bool = True,
        max_rollbacks: int = 5,
        after_max_rollbacks: str = "freeze",
        remedies: Sequence[str | Mapping[str, Any] | Remedy] | None = None,
        poisoned_data: str | float = "keep",
        secondary_alarms: Mapping[str, float] | None = None,
        signal_freq: int = 1000,
        update_reference: bool = False,
        path: str | Path | None = None,
        save_snapshots: bool = False,
        verbose: int = 1,
    ) -> None:
        super().__init__(verbose)
        self.false_alarm_rate = false_alarm_rate
        self.horizon_episodes = whole_number(horizon_episodes, "horizon_episodes", least=1)
        self._prototype = make_detector(detector, false_alarm_rate, self.horizon_episodes)
        self.baseline = baseline if isinstance(baseline, str) else [float(value) for value in baseline]
        self.tolerance, self.random_return = float(tolerance), float(random_return)
        self.promotion_episodes = whole_number(promotion_episodes, "promotion_episodes", least=2)
        self.keep_snapshots = whole_number(keep_snapshots, "keep_snapshots", least=1)
        self.ratchet = ratchet
        self.max_rollbacks = whole_number(max_rollbacks, "max_rollbacks")
        self.after_max_rollbacks = after_max_rollbacks
        self._remedies_given = remedies is not None
        self.remedies = make_remedies(DEFAULT_REMEDIES if remedies is None else remedies)
        self.poisoned_data = poisoned_data
        self.secondary_alarms = dict(secondary_alarms or {})
        self.signal_freq = whole_number(signal_freq, "signal_freq")
        self.update_reference = update_reference
        self.path = None if path is None else Path(path)
        self.save_snapshots = save_snapshots
        self._check_settings()
        self._log = EventLog(None)
        self.alarms = self.rollbacks = self.promotions = self.undone_updates = 0
        self._monitor = EpisodeMonitor(self._prototype, self.false_alarm_rate, self.tolerance, self.random_return)
        self._brake: PolicyBrake | None = None
        self._default_path: Path | None = None
        self._rows = self._unstored = 0
        self._go_on = True
        self._running = False
        self._seen_model: OffPolicyAlgorithm | None = None

    def _check_settings(self) -> None:
        if isinstance(self.baseline, str):
            if self.baseline not in ("warmup", "evaluations"):
                raise ValueError(f"`baseline` must be 'warmup', 'evaluations' or a list of returns, found {self.baseline!r}.")
        given = (self._prototype.false_alarm_rate, self._prototype.horizon)
        if given != (self.false_alarm_rate, self.horizon_episodes):
            raise ValueError(
                f"The detector has the false-alarm rate {given[0]} and the horizon {given[1]}, the guard "
                f"{self.false_alarm_rate} and {self.horizon_episodes}: give both to CollapseGuard, as `false_alarm_rate` and "
                "`horizon_episodes`."
            )
        if self._prototype.needs_rewards and self.baseline != "warmup":
            raise ValueError(
                f"The detector {type(self._prototype).__name__} needs the rewards of each step, which only the training "
                "episodes have: use `baseline='warmup'`, or the detector 'cusum' or 'betting'."
            )
        if not isinstance(self.baseline, str):
            # Whatever is wrong with given returns shall be said before training begins
            self._prototype.fresh(self.false_alarm_rate).calibrate(self.baseline)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` must be in [0, 1), found {self.tolerance!r}.")
        if not math.isfinite(self.random_return):
            raise ValueError(f"`random_return` must be finite, found {self.random_return!r}.")
        if self.after_max_rollbacks not in ENDINGS:
            raise ValueError(
                f"`after_max_rollbacks` must be one of {', '.join(map(repr, ENDINGS))}, found {self.after_max_rollbacks!r}."
            )
        self._poisoned_weight = POISONED_DATA.get(self.poisoned_data, self.poisoned_data)  # type: ignore[arg-type]
        if not isinstance(self._poisoned_weight, int | float) or not 0 <= self._poisoned_weight <= 1:
            raise ValueError(f"`poisoned_data` must be 'keep', 'drop' or a weight in [0, 1], found {self.poisoned_data!r}.")
        for name, limit in self.secondary_alarms.items():
            if name not in SignalMonitor.NAMES:
                raise ValueError(f"Unknown signal {name!r} in `secondary_alarms`: known are {', '.join(SignalMonitor.NAMES)}.")
            if not isinstance(limit, int | float) or not math.isfinite(limit):
                raise ValueError(f"The limit of {name!r} in `secondary_alarms` must be a finite number, found {limit!r}.")
        if self.secondary_alarms and self.signal_freq == 0:
            raise ValueError("`secondary_alarms` need measurements: set `signal_freq` to a number above 0.")

    # What can be read

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events of the run, as in ``collapse_events.jsonl``."""
        return self._log.events

    @property
    def detector(self) -> Detector:
        """The detector in use."""
        return self._monitor.detector

    @property
    def brake_facts(self) -> dict[str, Any]:
        """How the policy is slowed, held and confined now: the factor of its learning rate, whether it stays, its radius."""
        brake = self._the_brake
        radius = brake.radius if math.isfinite(brake.radius) else None
        return {"learning_rate_factor": brake.learning_rate_factor, "held": brake.held, "radius": radius}

    def use_default_path(self, path: str | Path) -> None:
        """
        Tell the guard the run's folder, as rl-zoo3's runs do.

        :param path: Folder for its files if it was not given another one
        """
        self._default_path = Path(path)

    def plot(self, path: str | Path | None = None) -> Figure:
        """
        Draw the run: returns, baseline band, statistic and threshold, alarms, rollbacks.

        :param path: Where to write it as PNG; None for no file
        :return: The figure
        """
        return draw_events(self.events, None if path is None else Path(path))

    # Start

    def _init_callback(self) -> None:
        # Before the pretraining that `learn` may begin with
        if not isinstance(self.model, OffPolicyAlgorithm):
            return
        if self._poisoned_weight != 1:
            check_can_thin_out(cast(Any, self.model.replay_buffer))
        for name in sorted(self.secondary_alarms.keys() - set(SignalMonitor(self.model).names)):
            raise ValueError(
                f"`secondary_alarms` has a limit for `{name}`, which {type(self.model).__name__} does not have with the "
                f"action space {self.model.action_space}: leave it out."
            )

    def _on_training_start(self) -> None:
        model = self.model
        if not isinstance(model, OffPolicyAlgorithm):
            raise ValueError(
                f"CollapseGuard needs an off-policy algorithm (TD3BC, TD3C, TD3, DDPG, SAC, DQN, TQC, ...), found "
                f"{type(model).__name__}: it has no replay buffer to go on from after a rollback."
            )
        if getattr(model, "_pretraining", False):
            raise ValueError("CollapseGuard watches interactions, of which `pretrain` has none: pass it to `learn`.")
        self._siblings = self.locals.get("callback")
        if sum(1 for _ in find_callbacks(self._siblings, CollapseGuard)) > 1:
            raise ValueError(
                "There are several CollapseGuards in the list of callbacks, expected one: they would undo each other."
            )
        self._evaluations = [e for e in find_callbacks(self._siblings, EvalCallback) if e.log_path is not None]
        if self.baseline == "evaluations" and not self._evaluations:
            raise ValueError(
                "`baseline='evaluations'` needs an EvalCallback with `log_path=...` in the same list of callbacks (only then "
                "it keeps its returns): pass one to `learn`, or use `baseline='warmup'`."
            )
        self._active_remedies = self._applicable_remedies()
        goes_on = not self.locals.get("reset_num_timesteps", True)
        if goes_on and self._seen_model is model:
            self._go_on_with_run()
            return
        self._start_new(goes_on)
        self._running = True

    def _go_on_with_run(self) -> None:
        """The same guard and learner in another call of ``learn``."""
        # SB3 does not store the step at which a callback ends the run
        self._rows -= self._unstored
        self._unstored = 0
        self._pending_repair = self._bad_observation = False
        self._seen_evaluations = [len(evaluation.evaluations_results) for evaluation in self._evaluations]
        self._begin_episodes()
        self._the_brake.attach()
        self._renew_after_stop()
        self._running = True

    def _renew_after_stop(self) -> None:
        if self._go_on:
            return
        # Who goes on after a stop wants to be guarded again
        self._go_on = True
        self.rollbacks = self._failures = 0
        self._phase = "unwatched"
        if self._monitor.reference:
            self._begin_monitoring(self._monitor.reference, "restored")

    @property
    def _the_brake(self) -> PolicyBrake:
        assert self._brake is not None
        return self._brake

    def _applicable_remedies(self) -> list[Remedy]:
        applicable = []
        for remedy in self.remedies:
            problem = remedy.problem(self.model)
            if problem is None:
                applicable.append(remedy)
            elif self._remedies_given:
                raise ValueError(f"The remedy {remedy.name!r} cannot be applied: {problem}. Leave it out of `remedies`.")
        return applicable

    def _start_new(self, goes_on: bool) -> None:
        model = self.model
        self._seen_model = model
        self._folder = self._find_folder()
        self._log = EventLog(None if self._folder is None else self._folder / EVENTS_FILE)
        self._generator = np.random.default_rng(0)
        if self._brake is not None:
            self._brake.remove()
        self._brake = PolicyBrake(model)
        self._signals = SignalMonitor(model)
        self._monitor = EpisodeMonitor(self._prototype, self.false_alarm_rate, self.tolerance, self.random_return)
        self._pending_removal: tuple[_Good, int] | None = None
        self._pending_repair = self._bad_observation = False
        self._releases: list[tuple[int, Remedy]] = []
        self._good: deque[_Good] = deque()
        self._candidate: _Good | None = None
        self._window: list[float] = []
        self._fresh_reference: list[Any] | None = None
        self._reference: list[Any] = []
        self._phase = "baseline"
        self._episodes = self.alarms = self.rollbacks = self.promotions = self.undone_updates = self._failures = 0
        self._rows = self._unstored = 0
        self._go_on = True
        self._warned_of_disk = self._warned_of_environment = False
        self._updates_at_start = self._checked_updates = model._n_updates
        self._seen_evaluations = [len(evaluation.evaluations_results) for evaluation in self._evaluations]
        self._begin_episodes()
        state = self._saved_state() if goes_on else None
        self._start_log(resume=state is not None)
        if state is None:
            self._remove_old_snapshots()
        self._event(
            "start",
            algorithm=type(model).__name__,
            detector=type(self._prototype).__name__,
            false_alarm_rate=self.false_alarm_rate,
            horizon_episodes=self.horizon_episodes,
            n_envs=model.n_envs,
            resumed=state is not None,
            settings=self._settings(),
        )
        self._warn_of_options_without_effect()
        self._good.append(self._take())
        self._report_to_trial()
        if state is not None:
            self._take_up(state)
        if self._phase in ("baseline", "unwatched") and not isinstance(self.baseline, str):
            self._begin_monitoring(self.baseline, "given")
        self._keep_state()

    def _warn_of_options_without_effect(self) -> None:
        if self.save_snapshots and self._folder is None:
            self._warn("`save_snapshots=True` writes nothing, since there is no folder: give one as `path`.")
        if self.update_reference and not hasattr(self.model, "set_reference_policy"):
            self._warn(f"`update_reference=True` moves nothing, since {type(self.model).__name__} has no reference policy.")

    def _start_log(self, resume: bool) -> None:
        try:
            self._log.start(resume=resume)
        except ValueError as error:
            assert self._folder is not None
            file = self._folder / EVENTS_FILE
            file.replace(file.with_suffix(".damaged"))
            warnings.warn(f"CollapseGuard: {error} It is kept as {file.with_suffix('.damaged')}.", stacklevel=2)
            self._log.start(resume=False)

    def _saved_state(self) -> dict[str, Any] | None:
        text = self.model.__dict__.get(STATE_ATTRIBUTE)
        if text is None:
            return None
        try:
            state: dict[str, Any] = json.loads(text)
            if state["version"] != STATE_VERSION:
                raise ValueError(f"it has version {state['version']}, expected {STATE_VERSION}")
            monitor = EpisodeMonitor(self._prototype, self.false_alarm_rate, self.tolerance, self.random_return)
            monitor.load_state_dict(arrays_from_json(state["monitor"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"CollapseGuard: its state in the model cannot be taken up ({error}), so that it begins anew. The detector, "
                "its rate and its horizon must be those that the state was saved with.",
                stacklevel=2,
            )
            return None
        return state

    def _settings(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline if isinstance(self.baseline, str) else "given",
            "tolerance": self.tolerance,
            "random_return": self.random_return,
            "promotion_episodes": self.promotion_episodes,
            "keep_snapshots": self.keep_snapshots,
            "ratchet": self.ratchet,
            "max_rollbacks": self.max_rollbacks,
            "after_max_rollbacks": self.after_max_rollbacks,
            "remedies": [remedy.name for remedy in self._active_remedies],
            "poisoned_data": self.poisoned_data,
            "secondary_alarms": self.secondary_alarms,
            "signal_freq": self.signal_freq,
            "update_reference": self.update_reference,
            "save_snapshots": self.save_snapshots,
            **{f"detector_{name}": value for name, value in self._prototype.settings.items()},
        }

    def _find_folder(self) -> Path | None:
        if self.path is not None or self._default_path is not None:
            return self.path or self._default_path
        for evaluation in find_callbacks(self._siblings, EvalCallback):
            if evaluation.log_path is not None:
                # SB3 appends the file's name, `evaluations`
                return Path(evaluation.log_path).parent
        # SB3's default logger has a folder too, in which nobody looks
        keeps_files = any(not isinstance(form, HumanOutputFormat) or form.own_file for form in self.logger.output_formats)
        folder = self.logger.get_dir() if keeps_files else None
        return Path(folder) if folder else monitor_folder(self.training_env)

    def _begin_episodes(self) -> None:
        n_envs = self.model.n_envs
        self._returns = np.zeros(n_envs)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._rewards: list[list[float]] = [[] for _ in range(n_envs)]
        # An episode that was running before the guard came is not a whole one
        self._ignored = np.full(n_envs, self.model.num_timesteps > 0)
        self._random = np.full(n_envs, self._acts_randomly())

    def _acts_randomly(self) -> bool:
        return self.model.num_timesteps < self.model.learning_starts

    # Each step

    def _on_rollout_start(self) -> None:
        # The first moment after an update: before a broken policy acts
        if self._phase == "done":
            return
        reason = self._not_finite()
        if reason is not None:
            self._raise_alarm(Alarm(reason, math.inf, 0.0, self._episodes, f"{reason[0].upper()}{reason[1:]}."))

    def _not_finite(self) -> str | None:
        values = self.logger.name_to_value
        for name in ("train/critic_loss", "train/actor_loss", "train/loss"):
            value = values.get(name)
            if value is not None and not math.isfinite(value):
                return f"non-finite {name.removeprefix('train/').replace('_', ' ')}"
        if self.model._n_updates != self._checked_updates:
            self._checked_updates = self.model._n_updates
            parameters = [parameter.detach() for parameter in self._the_brake.module.parameters()]
            if not th.stack([parameter.sum() for parameter in parameters]).isfinite().all():
                return "non-finite policy parameter"
        return None

    def _on_step(self) -> bool:
        self._unstored = 0
        self._remove_poisoned()
        self._rows += 1
        # SB3 stores a step after its callbacks
        self._unstored = 1
        for timestep, remedy in [entry for entry in self._releases if entry[0] <= self.num_timesteps]:
            self._releases.remove((timestep, remedy))
            remedy.release(self.model, self._the_brake)
            self._event("release", name=remedy.name)
        if self._phase == "baseline" and self.model._n_updates != self._updates_at_start:
            self._end_of_baseline()
        alarm = self._observe()
        if alarm is None and self.signal_freq > 0 and self.n_calls % self.signal_freq == 0:
            alarm = self._measure_signals()
        # After the last rollback the guard only keeps records
        if alarm is not None and self._phase != "done":
            self._raise_alarm(alarm)
        return self._go_on

    def _observe(self) -> Alarm | None:
        vec_normalize = self.model.get_vec_normalize_env()
        rewards = self.locals["rewards"] if vec_normalize is None else vec_normalize.get_original_reward()
        dones = self.locals["dones"]
        ended = np.flatnonzero(dones).tolist()
        alarm = self._check_finite(rewards, ended)
        if self._pending_repair:
            # A copy: SB3 stores the array itself, and what is not finite there is to be found
            rewards = np.nan_to_num(rewards, nan=0.0, posinf=0.0, neginf=0.0)
            self._ignored[:] = True
        self._returns += rewards
        self._lengths += 1
        if self._prototype.needs_rewards:
            for index, reward in enumerate(rewards):
                self._rewards[index].append(float(reward))
                if self._phase == "monitoring" and not dones[index] and not self._ignored[index]:
                    if len(self._rewards[index]) % WITHIN_FREQ == 0:
                        alarm = alarm or self._monitor.judge_within(self._rewards[index], index)
        for index in ended:
            at_its_end = self._end_of_episode(index)
            alarm = alarm or at_its_end
        if self.baseline == "evaluations":
            alarm = self._observe_evaluations() or alarm
        return alarm

    def _check_finite(self, rewards: np.ndarray, ended: list[int]) -> Alarm | None:
        observations = self.locals["new_obs"]
        parts = list(observations.values()) if isinstance(observations, dict) else [observations]
        for index in ended:
            last = self.locals["infos"][index].get("terminal_observation")
            parts += [] if last is None else list(last.values()) if isinstance(last, dict) else [last]
        # A sum is finite only if all its terms are
        environment_is_fine = math.isfinite(rewards.sum()) and all(math.isfinite(part.sum()) for part in parts)
        action_is_finite = math.isfinite(self.locals["actions"].sum())
        blameless, self._bad_observation = self._bad_observation, not environment_is_fine
        if environment_is_fine and action_is_finite:
            return None
        self._pending_repair = True
        if not action_is_finite and not blameless:
            return Alarm("non-finite action", math.inf, 0.0, self._episodes, "The policy chose a non-finite action.")
        # Not the policy's fault: the transition is taken out of the replay buffer, and the episode does not count
        if not self._warned_of_environment:
            self._warned_of_environment = True
            message = (
                "The environment gave a non-finite observation or reward. Such transitions are replaced in the replay buffer "
                "by copies of others: look into the environment."
            )
            self._warn(message)
        return None

    def _end_of_episode(self, index: int) -> Alarm | None:
        total, length, rewards = float(self._returns[index]), int(self._lengths[index]), self._rewards[index]
        ignored, random = self._ignored[index], self._random[index]
        self._returns[index] = self._lengths[index] = 0
        self._rewards[index] = []
        self._ignored[index] = False
        # The next episode's first action has been chosen when `num_timesteps` was what it is now
        self._random[index] = self._acts_randomly()
        episode: Any = np.array(rewards) if self._prototype.needs_rewards else total
        self._episodes += 1
        alarm = None
        if ignored or random or self.baseline == "evaluations":
            phase = "ignored"
        elif self._phase == "baseline":
            phase = "baseline"
            self._reference.append(episode)
            self._refresh_first_snapshot()
        else:
            phase = "monitoring" if self._phase == "monitoring" else "unwatched"
            alarm = self._judge(episode, total, index) if phase == "monitoring" else None
        self._event(
            "episode",
            **{"return": total, "length": length},
            statistic=self._statistic(),
            threshold=self._threshold(),
            phase=phase,
        )
        statistic = self._statistic()
        if statistic is not None:
            self.logger.record("collapse/statistic", statistic)
            self.logger.record("collapse/threshold", self._monitor.detector.threshold)
            self.logger.record("collapse/baseline_mean", self._monitor.summary["mean"])
        self._keep_state()
        return alarm

    def _observe_evaluations(self) -> Alarm | None:
        alarm = None
        for number, evaluation in enumerate(self._evaluations):
            for returns in evaluation.evaluations_results[self._seen_evaluations[number] :]:
                for value in np.ravel(returns).tolist():
                    phase = self._phase if self._phase in ("baseline", "monitoring") else "unwatched"
                    if alarm is not None or not math.isfinite(value):
                        phase = "ignored"
                        message = "An evaluation had a non-finite return."
                        alarm = alarm or Alarm("non-finite evaluation", math.inf, 0.0, self._episodes, message)
                    elif phase == "baseline":
                        self._reference.append(value)
                    elif phase == "monitoring":
                        alarm = self._judge(value, value)
                    statistic, threshold = self._statistic(), self._threshold()
                    self._event("evaluation", **{"return": value}, statistic=statistic, threshold=threshold, phase=phase)
            self._seen_evaluations[number] = len(evaluation.evaluations_results)
        return alarm

    def _judge(self, episode: Any, total: float, index: int = 0) -> Alarm | None:
        """Take a monitored episode into account."""
        alarm = self._monitor.judge(episode, index)
        if alarm is not None:
            return alarm
        if self._fresh_reference is not None:
            self._fresh_reference.append(episode)
            self._consider_ratchet()
        self._window.append(total)
        if self._candidate is not None and len(self._window) % self.promotion_episodes == 0:
            self._consider_promotion()
        return None

    def _measure_signals(self) -> Alarm | None:
        signals = self._signals.measure(self._good[-1].snapshot.policy_state)
        if not signals:
            return None
        for name, value in signals.items():
            self.logger.record(f"collapse/{name}", value)
        self._event("signal", **signals)
        if self._phase not in ("monitoring", "unwatched"):
            return None
        for name, limit in self.secondary_alarms.items():
            # A slope is there after two measurements
            value = signals.get(name, -math.inf)
            if not value <= limit:
                return Alarm(
                    name, value, limit, self._episodes, f"The signal {name} is {value:.3g}, above its limit {limit:.3g}."
                )
        return None

    # Baseline and promotion

    def _take(self) -> _Good:
        good = _Good(LearnerSnapshot.take(self.model), self.num_timesteps, self._monitor.reference)
        self._mark(good, ahead=self._unstored)
        return good

    def _mark(self, good: _Good, ahead: int) -> None:
        """Note that what was gathered so far is not poisoned, nor are ``ahead`` steps that are not stored yet."""
        buffer = self.model.replay_buffer
        assert buffer is not None
        good.mark, good.rows = ReplayMark.here(buffer, ahead), self._rows - self._unstored + ahead

    def _refresh_first_snapshot(self) -> None:
        # The networks do not change before the first update, but the statistics of VecNormalize do
        if self.model.get_vec_normalize_env() is not None and len(self._good) == 1:
            self._good[0] = self._take()

    def _end_of_baseline(self) -> None:
        # What the frozen policy gathered is not poisoned; the present step is the first one of a changed policy
        self._mark(self._good[0], ahead=0)
        source = "evaluations" if self.baseline == "evaluations" else "warmup"
        if len(self._reference) >= LEAST_BASELINE:
            try:
                self._begin_monitoring(self._reference, source)
                self._keep_state()
                return
            except ValueError as error:
                problem = str(error)
        else:
            problem = (
                f"The baseline has {len(self._reference)} episodes, expected at least {LEAST_BASELINE}: use a longer "
                "`warmup_steps`, or give returns as `baseline=[...]`."
            )
        self._phase = "unwatched"
        self._report_to_trial()
        message = f"{problem} Returns are not watched in this run, only non-finite values and `secondary_alarms`."
        self._warn(message)
        self._keep_state()

    def _begin_monitoring(self, reference: Sequence[Any], source: str) -> None:
        self._monitor.begin(reference)
        self._phase = "monitoring"
        for good in self._good:
            good.reference = good.reference or self._monitor.reference
        facts = self._monitor.summary
        needed = self._monitor.episodes_to_alarm()
        self._event("baseline", source=source, threshold=self._threshold(), episodes_to_alarm=needed, **facts)
        soon = "not be noticed within 200" if needed is None else f"be noticed after {needed}"
        self._say(
            f"baseline of {facts['n']} episodes ({source}): mean return {facts['mean']:.1f}, "
            f"standard deviation {facts['sd']:.1f}; a total collapse would {soon} episodes."
        )
        if source == "warmup" and self._acts_otherwise_than_in_warmup():
            message = (
                "The baseline was measured without the exploration noise of the episodes to come: false alarms are likely. "
                "Use `warmup_action_noise=True`."
            )
            self._warn(message)
        self._new_candidate()
        self._report_to_trial()

    def _acts_otherwise_than_in_warmup(self) -> bool:
        return self.model.action_noise is not None and not getattr(self.model, "warmup_action_noise", True)

    def _new_candidate(self) -> None:
        self._candidate = self._take()
        self._window = []
        self._event("candidate")

    def _consider_promotion(self) -> None:
        candidate = self._candidate
        assert candidate is not None
        if not self._monitor.is_not_worse(self._window, PROMOTION_LEVEL):
            if len(self._window) >= CANDIDATE_LIFE * self.promotion_episodes:
                self._new_candidate()
            return
        self.promotions += 1
        # The window that speaks for it is not poisoned either
        self._mark(candidate, ahead=self._unstored)
        candidate.reference = self._monitor.reference
        better = self._monitor.is_better(self._window, RATCHET_LEVEL)
        candidate.is_reference = better and self.update_reference
        self._keep(candidate)
        self._failures = 0
        mean = float(np.mean(self._window))
        self._event("promotion", candidate_timestep=candidate.timestep, n_episodes=len(self._window), mean=mean)
        self._say(f"the learner of step {candidate.timestep} is promoted, mean return {mean:.1f}.", level=2)
        self.logger.record("collapse/promotions", self.promotions)
        for remedy in self._active_remedies:
            if self.rollbacks > 0:
                settings = remedy.on_promotion(self._the_brake, candidate.snapshot.policy_state)
                if settings is not None:
                    message = f"{remedy.name} moves with the promotion: {_described(settings)}"
                    self._event("remedy", name=remedy.name, parameters=settings, message=message)
        self._refer_to(candidate)
        if better and self.ratchet and self._fresh_reference is None:
            # Episodes after the decision: those that led to it were chosen for being good
            self._fresh_reference = []
        self._new_candidate()

    def _keep(self, good: _Good) -> None:
        self._good.append(good)
        while len(self._good) > self.keep_snapshots + 1:
            # The first one, from before finetuning, stays
            del self._good[1]
        self._write_snapshots()

    def _consider_ratchet(self) -> None:
        fresh = self._fresh_reference
        assert fresh is not None
        if len(fresh) < max(len(self._monitor.reference), self.promotion_episodes):
            return
        self._fresh_reference = None
        returns = [float(np.sum(episode)) for episode in fresh]
        # An episode below all that were known before may be the first of a collapse, which must not become the measure
        sound = min(returns) >= self._monitor.returns.min() - self._monitor.margin
        if not (sound and self._monitor.is_better(returns, PROMOTION_LEVEL)):
            # Its share is spent all the same: what is accepted has been selected for being high
            self._monitor.periods += 1
            return
        old_mean = float(self._monitor.returns.mean())
        candidate = self._candidate
        try:
            self._begin_monitoring(fresh, "ratchet")
        except ValueError as error:
            self._event("warning", message=f"The baseline is not raised: {error}")
            return
        self._event("ratchet", old_mean=old_mean, new_mean=float(self._monitor.returns.mean()))
        if candidate is not None:
            candidate.reference = self._monitor.reference

    # Alarm and rollback

    def _raise_alarm(self, alarm: Alarm) -> None:
        self.alarms += 1
        self.logger.record("collapse/alarms", self.alarms)
        self._event(
            "alarm", reason=alarm.detector, statistic=alarm.statistic, threshold=alarm.threshold, message=alarm.message
        )
        self._say(f"ALARM at step {self.num_timesteps}, episode {self._episodes}: {alarm.message}")
        if self.rollbacks >= self.max_rollbacks:
            self._give_up()
        else:
            self._roll_back()
        self._checked_updates = self.model._n_updates
        for name in ("train/critic_loss", "train/actor_loss", "train/loss"):
            # A non-finite loss of the past must not raise the alarm again
            self.logger.name_to_value.pop(name, None)
            self.logger.name_to_excluded.pop(name, None)
            self.logger.name_to_count.pop(name, None)
        self._keep_state()

    def _restore(self) -> _Good:
        if self._failures >= FAILURES_PER_SNAPSHOT and len(self._good) > 1:
            self._good.pop()
            self._failures = 0
        good = self._good[-1]
        self.undone_updates += self.model._n_updates - good.snapshot.n_updates
        # Not the random generators: the same batches would lead to the same collapse
        good.snapshot.restore(self.model, generators=False)
        # The snapshot is older than its promotion
        self._refer_to(good)
        return good

    def _refer_to(self, good: _Good) -> None:
        if good.is_reference and hasattr(self.model, "set_reference_policy"):
            self.model.set_reference_policy(good.snapshot.policy_state)

    def _roll_back(self) -> None:
        good = self._restore()
        self.rollbacks += 1
        self._failures += 1
        self._pending_removal = (good, self.rollbacks)
        # What is running was begun by the policy that is gone
        self._ignored |= self._lengths > 0
        self._window = []
        self._candidate = None
        self._fresh_reference = None
        self._signals.reset()
        self.logger.record("collapse/rollbacks", self.rollbacks)
        self._event(
            "rollback",
            number=self.rollbacks,
            to_timestep=good.timestep,
            to_n_updates=good.snapshot.n_updates,
            poisoned_data=self.poisoned_data,
        )
        self._say(
            f"rollback {self.rollbacks} of at most {self.max_rollbacks}: the learner is that of step {good.timestep} again."
        )
        self._releases = []
        self._the_brake.hold(False)
        for remedy in self._active_remedies:
            settings = remedy.apply(self.model, self._the_brake, self.rollbacks, good.snapshot.policy_state)
            if "until" in settings:
                self._releases.append((settings["until"], remedy))
            self._event("remedy", name=remedy.name, parameters=settings, message=f"{remedy.name}: {_described(settings)}")
            self._say(f"remedy {remedy.name}: {_described(settings)}.")
        if self._phase == "monitoring":
            try:
                self._begin_monitoring(good.reference or self._monitor.reference, "restored")
            except ValueError as error:
                self._phase = "unwatched"
                message = f"{error} Returns are not watched any more."
                self._warn(message)
        self._report_to_trial()

    def _give_up(self) -> None:
        action = self.after_max_rollbacks
        message = {
            "freeze": "the last good policy acts unchanged for the rest of the run",
            "stop": "the last good policy is restored and training ends",
            "continue": "training goes on unguarded",
        }[action]
        if action != "continue":
            self._restore()
        if action == "freeze":
            self._releases = []
            self._the_brake.hold(True)
        self._go_on = action != "stop"
        self._phase = "done"
        self._event("escalation", action=action, message=message)
        self._say(f"{self.rollbacks} rollbacks have been made: {message}.")
        self._report_to_trial()

    def _remove_poisoned(self) -> None:
        if self._pending_repair:
            self._pending_repair = False
            buffer = self.model.replay_buffer
            assert buffer is not None
            replace_last_if_not_finite(buffer)
        if self._pending_removal is None:
            return
        good, number = self._pending_removal
        self._pending_removal = None
        if self._poisoned_weight == 1:
            return
        buffer = self.model.replay_buffer
        assert buffer is not None
        added = self._rows - self._unstored - good.rows
        try:
            removed = thin_out_since(
                buffer, good.mark, added=added, weight=float(self._poisoned_weight), generator=self._generator
            )
        except ValueError as error:
            self._event("warning", message=f"The data since step {good.timestep} is kept: {error}")
            return
        if not buffer.full:
            self._rows -= removed // buffer.n_envs
        # Rows have moved, so that marks within the span mean nothing any more
        for other in self._good:
            if other is good or other.rows > good.rows:
                self._mark(other, ahead=0)
        self._event("removal", number=number, removed=removed)

    def _report_to_trial(self) -> None:
        for callback in find_callbacks(self._siblings, EvalCallback):
            # rl-zoo3's TrialEvalCallback
            trial: Any = getattr(callback, "trial", None)
            if trial is not None:
                trial.set_user_attr("collapse_rollbacks", self.rollbacks)
                trial.set_user_attr("collapse_alarms", self.alarms)
                trial.set_user_attr("collapse_watched", self._phase == "monitoring")

    # Records, state

    def _on_rollout_end(self) -> None:
        self._unstored = 0
        self._remove_poisoned()

    def _statistic(self) -> float | None:
        return self._monitor.detector.statistic if self._phase == "monitoring" else None

    def _threshold(self) -> float | None:
        return self._monitor.detector.threshold if self._phase == "monitoring" else None

    def _event(self, event: str, **details: Any) -> None:
        place = {"timestep": self.num_timesteps, "episode": self._episodes, "n_updates": self.model._n_updates}
        self._log.append({"event": event, **place, "time": time.time(), **details})

    def _warn(self, message: str) -> None:
        self._event("warning", message=message)
        warnings.warn(f"CollapseGuard: {message}", stacklevel=3)

    def _say(self, message: str, level: int = 1) -> None:
        if self.verbose >= level:
            print(f"CollapseGuard: {message}")

    def _keep_state(self) -> None:
        """Put the guard's state where SB3's ``save`` finds it: a text attribute of the model, no pickle."""
        state = {
            "version": STATE_VERSION,
            "reference": [np.asarray(episode).tolist() for episode in self._reference] if self._phase == "baseline" else [],
            "monitor": arrays_to_json(self._monitor.state_dict()),
            "phase": self._phase,
            "counts": [self._episodes, self.alarms, self.rollbacks, self.promotions, self._failures],
            "learning_rate_factor": self._the_brake.learning_rate_factor,
            "radius": self._the_brake.radius if math.isfinite(self._the_brake.radius) else None,
            "held": self._the_brake.held,
            "releases": [[timestep, remedy.name] for timestep, remedy in self._releases],
            "stopped": not self._go_on,
            "undone_updates": self.undone_updates,
            "snapshots": [good.timestep for good in self._good],
            "references": [good.timestep for good in self._good if good.is_reference],
        }
        setattr(self.model, STATE_ATTRIBUTE, json.dumps(state))

    def _take_up(self, state: dict[str, Any]) -> None:
        """Go on from the state that was saved with a loaded model."""
        self._monitor.load_state_dict(arrays_from_json(state["monitor"]))
        self._episodes, self.alarms, self.rollbacks, self.promotions, self._failures = state["counts"]
        self.undone_updates = state.get("undone_updates", 0)
        self._phase = state["phase"]
        self._reference = [np.array(episode) if self._prototype.needs_rewards else episode for episode in state["reference"]]
        self._failures = 0
        first = self._good[0]
        # The statistics of a loaded replay buffer are not known; what comes from now on is
        first.reference = self._monitor.reference
        for timestep in state["snapshots"]:
            self._read_snapshot(timestep, timestep in state.get("references", []))
        # The loaded policy is the newest; the region lies around the last good one, where that was saved
        center = self._good[-2 if len(self._good) > 1 else -1].snapshot.policy_state
        self._the_brake.learning_rate_factor = state["learning_rate_factor"]
        if state["learning_rate_factor"] != 1:
            self._the_brake.slow_down(state["learning_rate_factor"])
        if state["radius"] is not None:
            self._the_brake.confine(state["radius"], center)
        self._the_brake.hold(state["held"])
        by_name = {remedy.name: remedy for remedy in self._active_remedies}
        self._releases = [(timestep, by_name[name]) for timestep, name in state["releases"] if name in by_name]
        if state["held"] and not self._releases and self._phase != "done":
            self._the_brake.hold(False)
        self._go_on = not state["stopped"]
        if self._phase == "monitoring":
            self._new_candidate()
        self._renew_after_stop()
        self._say(f"goes on with {self.rollbacks} rollbacks, {self._episodes} episodes and {len(self._good)} snapshots.")

    def _snapshot_file(self, timestep: int) -> Path | None:
        return None if self._folder is None else self._folder / SNAPSHOT_FOLDER / f"snapshot_{timestep}.pt"

    def _remove_old_snapshots(self) -> None:
        """Those of another run in the same folder, and what a killed one was writing."""
        if self.save_snapshots and self._folder is not None:
            for pattern in ("snapshot_*.pt", ".snapshot_*.tmp"):
                for file in (self._folder / SNAPSHOT_FOLDER).glob(pattern):
                    file.unlink(missing_ok=True)

    def _write_snapshots(self) -> None:
        folder = self._folder
        if not self.save_snapshots or folder is None:
            return
        wanted = {}
        for good in self._good:
            file = self._snapshot_file(good.timestep)
            assert file is not None
            wanted[file] = good.snapshot
        try:
            for file, snapshot in wanted.items():
                if not file.exists():
                    snapshot.save(file)
            for file in (folder / SNAPSHOT_FOLDER).glob("snapshot_*.pt"):
                if file not in wanted:
                    file.unlink()
        except OSError as error:
            if not self._warned_of_disk:
                self._warned_of_disk = True
                message = f"Snapshots cannot be written to {folder / SNAPSHOT_FOLDER} ({error}); training goes on without."
                self._warn(message)

    def _read_snapshot(self, timestep: int, is_reference: bool) -> None:
        file = self._snapshot_file(timestep)
        if file is None or not file.exists():
            return
        try:
            snapshot = LearnerSnapshot.load(file, device=self.model.device)
            snapshot.check(self.model)
        except ValueError as error:
            warnings.warn(f"CollapseGuard: {error} The snapshot is left out.", stacklevel=2)
            return
        older = _Good(snapshot, timestep, self._monitor.reference, is_reference=is_reference)
        self._mark(older, ahead=0)
        # The loaded learner stays the newest
        self._good.insert(len(self._good) - 1, older)

    def _on_training_end(self) -> None:
        # rl-zoo3 ends its first callback twice
        if not self._running:
            return
        self._running = False
        # The last update of the run, after which no policy has acted
        self._on_rollout_start()
        # What the user does with the learner between two runs is not to be held back
        self._the_brake.remove()
        signals = self._signals
        if signals.n_measured == 0 and self.signal_freq > 0:
            message = f"No signal was measured, {signals.n_asked} times for want of rows in the replay buffer."
            if signals.n_asked == 0:
                message = f"No signal was measured: `signal_freq={self.signal_freq}` is longer than the run."
            self._event("warning", message=message)
            self._say(message)
        if all(event.get("phase", "monitoring") != "monitoring" for event in self.events if event["event"] in EPISODES):
            message = "No episode was compared with a baseline: the run ended before one, or there is no baseline."
            self._event("warning", message=message)
            self._say(message)
        counts = {"rollbacks": self.rollbacks, "alarms": self.alarms, "promotions": self.promotions}
        self._event("end", **counts, signals=signals.n_measured)
        self._keep_state()
        if self._folder is not None:
            try:
                self.plot(self._folder / FIGURE_FILE)
            except OSError as error:
                warnings.warn(f"CollapseGuard: the figure cannot be written ({error}).", stacklevel=2)
