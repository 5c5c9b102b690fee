"""A callback that notices policy collapse while a policy is finetuned, and undoes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.brake import PolicyBrake
from sb3_offline_ft.collapse.detectors import Alarm, Detector, make_detector
from sb3_offline_ft.collapse.episodes import EpisodeWatch
from sb3_offline_ft.collapse.events import Event, EventLog
from sb3_offline_ft.collapse.good_states import GoodStates, SnapshotFiles
from sb3_offline_ft.collapse.interventions import ENDINGS, Interventions
from sb3_offline_ft.collapse.learner import is_pretraining
from sb3_offline_ft.collapse.monitor import EpisodeMonitor
from sb3_offline_ft.collapse.poisoned import PoisonedData, check_can_thin_out, weight_of_poisoned
from sb3_offline_ft.collapse.remedies import DEFAULT_REMEDIES, RemediesOfRun, Remedy, applicable, make_remedies
from sb3_offline_ft.collapse.reporting import Reporter, evaluations_with_returns, run_folder, start_log
from sb3_offline_ft.collapse.signals import SignalMonitor, check_limits
from sb3_offline_ft.collapse.snapshot import LearnerSnapshot
from sb3_offline_ft.collapse.state import SavedRun
from sb3_offline_ft.common.callbacks import find_callbacks
from sb3_offline_ft.common.checks import known_keywords, whole_number
from sb3_offline_ft.common.warning import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = (
    "tolerance random_return promotion_episodes keep_snapshots ratchet max_rollbacks after_max_rollbacks remedies "
    "poisoned_data secondary_alarms signal_freq update_reference save_snapshots"
).split()
"""What the log tells of the settings."""


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
    :param path: Folder for ``collapse_events.jsonl`` and ``collapse.png``; by default that of the run's ``EvalCallback``, the
        logger or a ``Monitor`` that keeps files, if any
    :param save_snapshots: Whether promoted states are also written to ``path``, so that a loaded run can be rolled back to
        them
    :param verbose: 0 for no output, 1 for baselines, alarms and rollbacks, 2 for promotions too
    :raises ValueError: A parameter is out of range
    """

    model: OffPolicyAlgorithm
    _brake: PolicyBrake

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
        self.update_reference = self.moves_reference = update_reference
        self.path = None if path is None else Path(path)
        self.save_snapshots = save_snapshots
        self._check_settings()
        self._report = Reporter(EventLog(None), verbose)
        self._monitor = self._new_monitor()
        self._default_path: Path | None = None
        self._seen_model: OffPolicyAlgorithm | None = None
        self._running = False
        self._exact: dict[str, Any] | None = None

    def _new_monitor(self) -> EpisodeMonitor:
        return EpisodeMonitor(self._prototype, self.false_alarm_rate, self.tolerance, self.random_return)

    def _check_settings(self) -> None:
        if isinstance(self.baseline, str) and self.baseline not in ("warmup", "evaluations"):
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
        if self.after_max_rollbacks not in ENDINGS:
            raise ValueError(
                f"`after_max_rollbacks` must be one of {', '.join(map(repr, ENDINGS))}, found {self.after_max_rollbacks!r}."
            )
        self._poisoned_weight = weight_of_poisoned(self.poisoned_data)
        check_limits(self.secondary_alarms)
        if self.secondary_alarms and self.signal_freq == 0:
            raise ValueError("`secondary_alarms` need measurements: set `signal_freq` to a number above 0.")

    # What can be read

    @property
    def events(self) -> list[Event]:
        """All events of the run, as in ``collapse_events.jsonl``."""
        return self._report.log.events

    @property
    def alarms(self) -> int:
        """Number of alarms in the run."""
        return self._report.counts.alarms

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks in the run."""
        return self._report.counts.rollbacks

    @property
    def promotions(self) -> int:
        """Number of promotions in the run."""
        return self._report.counts.promotions

    @property
    def undone_updates(self) -> int:
        """Number of gradient steps that rollbacks undid."""
        return self._report.counts.undone_updates

    @property
    def last_good(self) -> LearnerSnapshot:
        """The newest good state."""
        return self._good.newest.snapshot

    @property
    def brake_facts(self) -> dict[str, Any]:
        """How the policy is slowed, confined and held now."""
        return self._brake.facts

    @property
    def detector(self) -> Detector:
        """The detector in use."""
        return self._monitor.detector

    def use_default_path(self, path: str | Path) -> None:
        """
        Tell the guard the run's folder, as rl-zoo3's runs do.

        :param path: Folder for its files if it was not given another one
        """
        self._default_path = Path(path)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """
        Draw the run: returns, baseline band, statistic and threshold, alarms, rollbacks.

        :param path: Where to write it as PNG; None for no file
        :return: The figure
        """
        from sb3_offline_ft.collapse.figure import draw_events

        return draw_events(self.events, None if path is None else Path(path))

    # Start

    def _init_callback(self) -> None:
        # Before the pretraining that `learn` may begin with
        if not isinstance(self.model, OffPolicyAlgorithm):
            return
        if self._poisoned_weight != 1:
            check_can_thin_out(cast(Any, self.model.replay_buffer))
        check_limits(self.secondary_alarms, self.model)

    def _on_training_start(self) -> None:
        siblings = self.locals.get("callback")
        evaluations = self._check_run(siblings)
        goes_on = not self.locals.get("reset_num_timesteps", True)
        if goes_on and self._seen_model is self.model:
            self._poisoned.go_on()
            self._watch.begin_episodes(evaluations)
            self._brake.attach()
            self._renew_after_stop()
        else:
            self._start_run(goes_on, siblings, evaluations)
        self._running = True

    def _check_run(self, siblings: BaseCallback | None) -> list[EvalCallback] | None:
        if not isinstance(self.model, OffPolicyAlgorithm):
            raise ValueError(
                f"CollapseGuard needs an off-policy algorithm (TD3BC, TD3C, TD3, DDPG, SAC, DQN, TQC, ...), found "
                f"{type(self.model).__name__}: it has no replay buffer to go on from after a rollback."
            )
        if is_pretraining(self.model):
            raise ValueError("CollapseGuard watches interactions, of which `pretrain` has none: pass it to `learn`.")
        if sum(1 for _ in find_callbacks(siblings, CollapseGuard)) > 1:
            raise ValueError(
                "There are several CollapseGuards in the list of callbacks, expected one: they would undo each other."
            )
        return evaluations_with_returns(siblings) if self.baseline == "evaluations" else None

    def _start_run(self, goes_on: bool, siblings: BaseCallback | None, evaluations: list[EvalCallback] | None) -> None:
        model = self.model
        remedies = applicable(self.remedies, model, required=self._remedies_given)
        if self._seen_model is not None:
            self._brake.remove()
        self._brake = brake = PolicyBrake(model)
        self._seen_model = model
        self._monitor = self._new_monitor()
        exact, self._exact = self._exact, None
        saved = SavedRun.read(model, self._monitor) if goes_on and exact is None else None
        folder = self._folder = self.path or self._default_path or run_folder(siblings, self.logger, self.training_env)
        log = start_log(folder, resume=saved is not None or exact is not None)
        self._report = report = Reporter(log, self.verbose, model, list(find_callbacks(siblings, EvalCallback)))
        files = SnapshotFiles(folder, self.save_snapshots, report)
        if saved is None:
            self._monitor = self._new_monitor()
        if exact is None:
            if saved is None:
                files.clear()
            self._tell_start([remedy.name for remedy in remedies], resumed=saved is not None)
        self._remedies = RemediesOfRun(remedies, model, brake, report)
        self._poisoned = PoisonedData(model, self._poisoned_weight, report)
        self._good = GoodStates(
            model, self._monitor, self._poisoned, files, report, self.keep_snapshots, self.promotion_episodes
        )
        objects = self._good, self._poisoned, self._remedies
        signals = SignalMonitor(model), self.secondary_alarms
        self._watch = EpisodeWatch(
            model, self._monitor, *objects, *signals, report, evaluations, self.ratchet, self.update_reference
        )
        self._interventions = Interventions(
            *objects, brake, report, self.max_rollbacks, self.after_max_rollbacks, self.poisoned_data
        )
        report.tell_trial(is_watched=False)
        if exact is not None:
            self._take_up(exact)
            return
        if saved is not None:
            saved.take_up(self._good, brake, self._remedies, report.counts)
            if self._monitor.phase == "monitoring":
                self._good.new_candidate()
            self._renew_after_stop()
            many = f"{self.rollbacks} rollbacks, {report.counts.episodes} episodes and {len(self._good.states)} snapshots"
            report.say(f"goes on with {many}.")
        if self._monitor.phase in ("baseline", "unwatched") and not isinstance(self.baseline, str):
            self._watch.begin_monitoring(self.baseline, "given")
        self._keep_state()

    def _tell_start(self, remedies: list[str], resumed: bool) -> None:
        own = {"baseline": self.baseline if isinstance(self.baseline, str) else "given"}
        own |= {name: getattr(self, name) for name in SETTINGS} | {"remedies": remedies}
        self._report.event(
            "start",
            algorithm=type(self.model).__name__,
            detector=type(self._prototype).__name__,
            false_alarm_rate=self.false_alarm_rate,
            horizon_episodes=self.horizon_episodes,
            n_envs=self.model.n_envs,
            resumed=resumed,
            settings=own | {f"detector_{name}": value for name, value in self._prototype.settings.items()},
        )
        if self.save_snapshots and self._folder is None:
            self._report.warn("`save_snapshots=True` writes nothing, since there is no folder: give one as `path`.")
        if self.update_reference and not hasattr(self.model, "set_reference_policy"):
            self._report.warn(
                f"`update_reference=True` moves nothing, since {type(self.model).__name__} has no reference policy."
            )

    def _renew_after_stop(self) -> None:
        if not self._report.counts.is_stopped:
            return
        # Who goes on after a stop wants to be guarded again
        self._report.counts.is_stopped = False
        self._report.counts.rollbacks = self._good.failures = 0
        self._monitor.phase = "unwatched"
        if self._monitor.reference:
            self._watch.begin_monitoring(self._monitor.reference, "restored")

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that the guard knows of the run in progress, as plain values and tensors; nothing outside of a run."""
        if not self._running:
            return {}
        return {
            "log": self._report.log.state_dict(),
            "counts": vars(self._report.counts).copy(),
            "monitor": self._monitor.run_state(),
            "good": self._good.state_dict(),
            "brake": self._brake.state_dict(),
            "remedies": self._remedies.ends,
            "poisoned": self._poisoned.state_dict(self._good.states),
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next call of ``learn`` go on exactly where a run was, of which :meth:`state_dict` returned this."""
        self._exact = state or None

    def _take_up(self, state: dict[str, Any]) -> None:
        self._report.log.load_state_dict(state["log"])
        for name, value in state["counts"].items():
            setattr(self._report.counts, name, value)
        self._monitor.load_run_state(state["monitor"])
        self._good.load_state_dict(state["good"])
        self._brake.load_state_dict(state["brake"])
        self._remedies.take_up(state["remedies"])
        self._poisoned.load_state_dict(state["poisoned"], self._good.states)
        self._watch.load_state_dict(state["watch"])
        self._keep_state()

    def episodes_are_cut(self) -> None:
        """Other episodes have begun in place of those that ran."""
        self._watch.episodes_are_cut()

    # Each step

    def _on_rollout_start(self) -> None:
        # The first moment after an update
        self._react(self._watch.after_updates() if self._monitor.phase != "done" else None)

    def _on_step(self) -> bool:
        before = self._report.counts.episodes, self._monitor.phase
        self._poisoned.begin_step(self._good.states)
        self._remedies.end_due()
        alarm = self._watch.step(self.locals)
        if (self._report.counts.episodes, self._monitor.phase) != before:
            self._keep_state()
        if alarm is None and self.signal_freq > 0 and self.n_calls % self.signal_freq == 0:
            alarm = self._watch.measure_signals()
        self._react(alarm)
        return not self._report.counts.is_stopped

    def _react(self, alarm: Alarm | None) -> None:
        # After the last rollback the guard only keeps records
        if alarm is None or self._monitor.phase == "done":
            return
        good = self._interventions.react(alarm)
        if good is None:
            self._monitor.phase = "done"
        else:
            self._watch.after_rollback(good.reference)
        self._report.tell_trial(is_watched=self._monitor.phase == "monitoring")
        self._watch.after_alarm()
        self._keep_state()

    def _on_rollout_end(self) -> None:
        self._poisoned.end_step(self._good.states)

    # End

    def _keep_state(self) -> None:
        SavedRun.of(self._monitor, self._good, self._brake, self._remedies, self._report.counts).write(self.model)

    def _on_training_end(self) -> None:
        # rl-zoo3 ends its first callback twice
        if not self._running:
            return
        self._running = False
        # The last update of the run, after which no policy has acted
        self._on_rollout_start()
        # What the user does with the learner between two runs is not to be held back
        self._brake.remove()
        self._report.tell_end(self._watch.signals, self.signal_freq)
        self._keep_state()
        if self._folder is not None:
            try:
                self.plot(self._folder / "collapse.png")
            except OSError as error:
                warn(f"CollapseGuard: the figure cannot be written ({error}).")
