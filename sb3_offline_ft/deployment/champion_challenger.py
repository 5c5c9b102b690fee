"""A callback by which a learner learns fast while a proved policy serves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.events import Event
from sb3_offline_ft.collapse.learner import is_pretraining, move_reference
from sb3_offline_ft.collapse.reporting import run_folder
from sb3_offline_ft.common.callbacks import find_callbacks
from sb3_offline_ft.common.checks import known_keywords, number, whole_number
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.statistics_file import save_statistics
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.deployment.acting import Cast, PolicyCopy, normalizing_as
from sb3_offline_ft.deployment.contest import Contest
from sb3_offline_ft.deployment.history import FIGURE, History
from sb3_offline_ft.deployment.reporting import Reporter
from sb3_offline_ft.deployment.roles import Contender, Kind, Verdict
from sb3_offline_ft.deployment.rules import Rules
from sb3_offline_ft.deployment.state import SAVED_ATTRIBUTES, SavedContest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST_MODEL, STATISTICS = "best_model.zip", "vecnormalize.pkl"


class ChampionChallenger(BaseCallback):
    """
    Learn fast, serve safely. A *champion* acts, at first the pretrained policy, while the learner learns from what it does.
    From time to time a frozen copy of the learner's policy, the *challenger*, gets single episodes, paid from a risk budget,
    until it is proved better and becomes the champion, is given up, or is overtaken: after two of its episodes, and whenever
    they have doubled, a newer policy of the learner, the *rival*, gets one too, and takes its place if it is likely better.
    What is deployed at the end is the champion.

    For every off-policy algorithm of SB3 and sb3-contrib with continuous actions. No evaluations are needed. In the unit of a
    *total loss*, from what the champion is expected to return down to ``random_return``:

    **Promise 1, for every run, whatever the learner does.** At any time, the episodes in which something new was tried (trials
    and explorations) have lost at most ``risk_budget`` for each episode of the run so far, in sum, against the mean return of
    the baseline; and the same against the champion of the time. An episode at risk only begins if its worst case is covered.
    This is given that no episode returns less than ``worst_return``; if one does, the event ``below_worst`` says so, and
    nothing new is tried until the debt is repaid.

    **Promise 2, statistical.** The probability that any challenger becomes champion in a run although its returns are not
    better than the champion's (in stochastic order) is at most ``false_promotion_rate`` (see :class:`PromotionTest`): with
    ``controls="concurrent"`` also while returns drift with time, with ``"historical"`` as long as they do not. The i-th test,
    counted from 0, has the level ``2 false_promotion_rate / ((i + 2) (i + 3))``.

    A constrained learner such as TD3C follows the *leader*: the challenger as soon as it is likely better, else the champion.
    That needs no proof, since it only says what the learner stays near.

    Beside it in a run, an ``EvalCallback`` evaluates and saves the champion, and a ``CollapseGuard`` sees the episodes of
    whoever acts: it tells of a champion that has become worse than its baseline, and nothing of the learner. A learner whose
    policy is not finite is put back to the champion at once.

    :param risk_budget: Share of a total loss that an episode of the run may cost on average, in [0, 1); with 0 the baseline
        serves for ever, while the learner learns
    :param random_return: Mean return of a random policy
    :param worst_return: What an episode returns at the least, by default ``random_return``
    :param false_promotion_rate: Probability of any false promotion in the run, in (0, 1)
    :param baseline_episodes: Episodes of the first champion before anything new is tried; their mean is the baseline, ``J0``.
        Of several environments, the first episodes of each count, of all as many
    :param min_updates: Gradient steps between two challengers, rivals included
    :param controls: What a challenger is compared with: ``"historical"``: what the champion returned before, which takes for
        granted that it would return the same now; ``"concurrent"``: what the champion returns meanwhile, in episodes that a
        coin decides about, which holds in an environment that changes too and takes about twice as many episodes
    :param trial_share: Probability with which that coin chooses the challenger
    :param futility: Chance of leading by ``least_lead``, and by what its trial could prove, by a normal model, below which a
        challenger is given up
    :param least_lead: A lead that is worth a trial, in total losses; a learner that still learns has better challengers to
        come, for which one that is about as good as the champion makes no room
    :param max_trial_episodes: Episodes of a challenger after which it is given up for a newer one; by default 10, 20 or 40,
        the more the champion's returns spread, so that a lead of a tenth of a total loss can be proved
    :param exploration_share: Probability with which an episode explores that is neither of the baseline nor of a trial, if the
        budget covers it
    :param restore_after: Challengers given up in a row after which the learner is put back to the champion; 0 for never. Those
        that were overtaken, and rivals, do not count
    :param segment_steps: If given, what is compared are segments of so many steps in place of whole episodes, with hand-back
        within the episode; all returns, also those of the parameters, are those of segments then
    :param canary_envs: Number of environments, the first ones, in which anything but serving may happen; by default all
    :param seed: Seed of the coin
    :param path: Folder for ``deployment_events.jsonl``, ``deployment.png`` and the champion as ``best_model.zip``, with its
        statistics as ``vecnormalize.pkl`` if ``VecNormalize`` normalizes observations; by default the folder of the run's
        ``EvalCallback``, the logger or a ``Monitor`` that keeps files, if any
    :param verbose: 0 for no output, 1 for the baseline and decisions, 2 for challengers too
    :raises ValueError: A parameter is out of range
    """

    model: OffPolicyAlgorithm
    moves_reference = True
    """For algorithms with a reference policy: the leader is it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before __init__, since Python's own message names neither near matches nor what is known
        known_keywords(cls, kwargs, cls.__name__)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        risk_budget: float = 0.1,
        random_return: float = 0.0,
        worst_return: float | None = None,
        false_promotion_rate: float = 0.1,
        controls: str = "historical",
        baseline_episodes: int = 10,
        min_updates: int = 1000,
        trial_share: float = 0.5,
        futility: float = 0.1,
        least_lead: float = 0.05,
        max_trial_episodes: int | None = None,
        exploration_share: float = 0.3,
        restore_after: int = 0,
        segment_steps: int | None = None,
        canary_envs: int | None = None,
        seed: int = 0,
        path: str | Path | None = None,
        verbose: int = 1,
    ) -> None:
        super().__init__(verbose)
        self.rules = Rules(
            risk_budget=number(risk_budget, "risk_budget"),
            random_return=number(random_return, "random_return"),
            worst_return=number(random_return if worst_return is None else worst_return, "worst_return"),
            false_promotion_rate=number(false_promotion_rate, "false_promotion_rate"),
            controls=controls,
            baseline_episodes=whole_number(baseline_episodes, "baseline_episodes", least=2),
            trial_share=number(trial_share, "trial_share"),
            futility=number(futility, "futility"),
            least_lead=number(least_lead, "least_lead"),
            max_trial_episodes=(
                None if max_trial_episodes is None else whole_number(max_trial_episodes, "max_trial_episodes", least=2)
            ),
            exploration_share=number(exploration_share, "exploration_share"),
            canary_envs=None if canary_envs is None else whole_number(canary_envs, "canary_envs", least=1),
        )
        self.min_updates = whole_number(min_updates, "min_updates", least=1)
        self.restore_after = whole_number(restore_after, "restore_after")
        self.segment_steps = None if segment_steps is None else whole_number(segment_steps, "segment_steps", least=1)
        self.seed = whole_number(seed, "seed")
        self.path = None if path is None else Path(path)
        self._default_path: Path | None = None
        self._seen_model: OffPolicyAlgorithm | None = None
        self._is_running = False
        self._exact: dict[str, Any] | None = None

    # What can be read

    @property
    def events(self) -> list[Event]:
        """All events of the run, as in ``deployment_events.jsonl``."""
        self._check_has_run()
        return self._report.log.events

    @property
    def champion(self) -> Contender:
        """Who serves now."""
        return self.contest.champion

    @property
    def contest(self) -> Contest:
        """Who acts, what it has cost, and what was proved."""
        self._check_has_run()
        return self._contest

    def _check_has_run(self) -> None:
        if self._seen_model is None:
            raise ValueError("This ChampionChallenger has not run yet, and has no champion: pass it to `learn`.")

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True) -> Any:
        """
        The champion's actions, as SB3's ``predict`` gives those of a policy.

        :param observation: Observations, normalized by the learner's ``VecNormalize`` if it has one
        :param state: Not used, as in SB3
        :param episode_start: Not used
        :param deterministic: Whether to act without exploration
        :return: Actions and state
        """
        self._check_has_run()
        return self._cast.champion.predict(observation, state, episode_start, deterministic)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """
        Draw the run: returns by kind of episode, champions, decisions, budget.

        :param path: Where to write it as PNG; None for no file
        :return: The figure
        """
        return History(self.events).draw(None if path is None else Path(path))

    def use_default_path(self, path: str | Path) -> None:
        """
        Tell the run's folder, as rl-zoo3's runs do.

        :param path: Folder for its files if it was not given another one
        """
        self._default_path = Path(path)

    def save_champion(self, path: str | Path) -> None:
        """
        Save the learner with the champion's policy, as ``model.save`` does, whole or not at all; SB3 loads it without this
        package if it could load the learner. Statistics of ``VecNormalize`` are not in it, as in SB3: the champion's are
        ``champion.policy.statistics``.

        :param path: The zip file, to which ``.zip`` is added if it has no suffix
        """
        path = Path(path)
        with self._as_champion(), atomic_write(path if path.suffix else path.with_suffix(".zip")) as file:
            # SB3 types a path only, and documents a stream
            self.model.save(file, exclude=SAVED_ATTRIBUTES)  # type: ignore[arg-type]

    @contextmanager
    def _as_champion(self) -> Iterator[None]:
        policy, champion = self.model.policy, self.champion.policy
        own = {name: value.clone() for name, value in policy.state_dict().items()}
        policy.load_state_dict(dict(champion.state))
        try:
            yield
        finally:
            policy.load_state_dict(own)

    # Start

    def _on_training_start(self) -> None:
        siblings = self.locals.get("callback")
        self._check_run(siblings)
        model, goes_on = self.model, not self.locals.get("reset_num_timesteps", True)
        if not goes_on or self._seen_model is not model:
            self._start_run(goes_on, siblings)
        elif self._is_running or model._last_obs is not self._last_obs:
            # Interrupted, or others have acted since: episodes at risk are charged, as in a file
            self._state.take_up(self._contest)
            self._begin_all(whole=False)
        for evaluation in find_callbacks(siblings, EvalCallback):
            # What is deployed is what is evaluated
            evaluation.model = _Served(model, self)  # type: ignore[assignment]
        self._cast.take_over()
        self._is_running = True

    def _check_run(self, siblings: BaseCallback | None) -> None:
        model = self.model
        if not isinstance(model, OffPolicyAlgorithm) or not isinstance(model.action_space, spaces.Box):
            space = getattr(model, "action_space", None)
            raise ValueError(
                "ChampionChallenger needs an off-policy algorithm with continuous actions (TD3C, TD3BC, TD3, SAC, TQC, ...), "
                f"found {type(model).__name__} with the action space {space}."
            )
        if is_pretraining(model):
            raise ValueError("ChampionChallenger decides who acts, and nobody does in `pretrain`: pass it to `learn`.")
        if sum(1 for _ in find_callbacks(siblings, ChampionChallenger)) > 1:
            raise ValueError("There are several ChampionChallengers in the list of callbacks, expected one: only one can act.")
        if getattr(model, "guide_policy", None) is not None:
            raise ValueError("`guide_policy` has no use with ChampionChallenger, which decides who acts: leave one out.")

    def _start_run(self, goes_on: bool, siblings: BaseCallback | None) -> None:
        model = self.model
        folder = self._folder = self.path or self._default_path or run_folder(siblings, self.logger, self.training_env)
        exact, self._exact = self._exact, None
        saved = SavedContest.read(model) if goes_on and exact is None else None
        self._contest = Contest(self.rules, self._contender(), model.n_envs, self.seed)
        self._last_updates, self._rejections_in_a_row = model._n_updates, 0
        differences = "" if saved is None else saved.differences(self._settings)
        if saved is not None and (counts := saved.taken_up(self._contest)) is not None:
            self._last_updates, self._rejections_in_a_row = counts
        elif saved is not None:
            # Part of it may have been taken up
            saved, self._contest = None, Contest(self.rules, self._contender(), model.n_envs, self.seed)
        self._cast = Cast(model, self._contest.champion.policy)
        self._report = Reporter(model, folder, self.verbose, resume=saved is not None or exact is not None)
        self._seen_model, self._followed = model, self._contest.leader
        if exact is not None:
            self._take_up(exact)
            return
        self._tell_start(resumed=saved is not None)
        if differences:
            self._report.warn(f"Settings differ from those of the saved run: {differences}.")
        self._begin_all(whole=not goes_on or model.num_timesteps == 0)

    def _tell_start(self, resumed: bool) -> None:
        self._report.start(self._contest, self._settings, self._cast.explores, resumed)

    @property
    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("min_updates", "restore_after", "segment_steps", "seed")}
        # Of those that were given, a run that goes on keeps its own in part
        return vars(self._contest.rules) | own

    def _contender(self) -> Contender:
        return Contender(self.model.num_timesteps, PolicyCopy.of(self.model))

    def _begin_all(self, whole: bool) -> None:
        """Begin in all environments; in what is left of episodes that were running before, the champion serves."""
        n = self.model.n_envs
        self._totals, self._lengths = np.zeros(n), np.zeros(n, dtype=np.int64)
        for place in range(n) if whole else ():
            self._begin(place)
        self._sync()
        self._keep_state()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All about the run in progress, running episodes included, as plain values and tensors; nothing outside of one."""
        if not self._is_running:
            return {}
        contenders = self._contest.contenders
        return {
            "settings": self._settings,
            "contest": self._contest.run_state(),
            "policies": {role: one.policy.run_state() for role, one in contenders.items()},
            "followed": next((role for role, one in contenders.items() if one is self._followed), "champion"),
            "counts": (self._last_updates, self._rejections_in_a_row),
            "episodes": (self._totals.copy(), self._lengths.copy()),
            "broken": sorted(self._cast.broken),
            "report": self._report.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next call of ``learn`` go on exactly where a run was, of which :meth:`state_dict` returned this."""
        self._exact = state or None

    def _take_up(self, state: dict[str, Any]) -> None:
        policies = {role: PolicyCopy.from_run_state(one, self.model.device) for role, one in state["policies"].items()}
        self._contest.load_run_state(state["contest"], policies)
        contenders = self._contest.contenders
        self._followed = contenders[state["followed"]]
        self._last_updates, self._rejections_in_a_row = state["counts"]
        self._totals, self._lengths = (values.copy() for values in state["episodes"])
        self._sync()
        self._cast.broken.update(state["broken"])
        self._report.load_state_dict(state["report"])
        self._keep_state()

    def episodes_are_cut(self) -> None:
        """Other episodes have begun in place of those that ran: those at risk are charged, as in a file."""
        self._state.take_up(self._contest)
        self._begin_all(whole=False)

    # Each step

    def _on_rollout_start(self) -> None:
        # It would learn nothing any more, and with SB3's stochastic policies end the run with an error
        policy: Any = self.model.policy
        if not all(bool(parameter.isfinite().all()) for parameter in policy.actor.parameters()):
            self._refuse()

    def _on_step(self) -> bool:
        normalize, broken = self.model.get_vec_normalize_env(), self._cast.broken
        rewards = self.locals["rewards"] if normalize is None else normalize.get_original_reward()
        finite = np.isfinite(rewards)
        self._totals += rewards
        self._lengths += 1
        ended = self.locals["dones"] | (self._lengths == self.segment_steps)
        tried = [place for place, episode in enumerate(self._contest.running) if episode.actor is Kind.TRIAL]
        hurt = {place: "action" if place in broken else "reward" for place in tried if place in broken or not finite[place]}
        for place, what in hurt.items():
            self._decide(self._contest.stop_trial(place, f"non-finite {what}"))
        for place in np.flatnonzero(ended).tolist():
            self._end(place)
        for place in np.flatnonzero(ended).tolist():
            self._begin(place)
        if ended.any() or hurt:
            self._keep_state()
        return True

    def _begin(self, place: int) -> None:
        self._totals[place] = self._lengths[place] = 0
        self._contest.begin(place, self._offer if self._has_learned else None, self._cast.explores)
        self._report.baseline(self._contest)
        self._sync()

    def _end(self, place: int) -> None:
        # A decision changes what is running
        episode = replace(self._contest.running[place])
        total, length = float(self._totals[place]), int(self._lengths[place])
        if not np.isfinite(total):
            # Nobody knows what it returned
            budget, rules = self._contest.budget, self._contest.rules
            total = rules.worst_return if budget is None else budget.worst_return
            self._contest.running[place].counts = False
            episode.counts = False
        then = self._contest.contenders, self._contest.challenge
        verdict = self._contest.end(place, total)
        self._report.episode(place, episode, total, length, self._contest, then)
        self._decide(verdict)

    @property
    def _has_learned(self) -> bool:
        """Whether the learner is another one than at the last challenge."""
        return self.model._n_updates - self._last_updates >= self.min_updates

    def _offer(self) -> Contender | None:
        self._last_updates = self.model._n_updates
        challenger = self._contender()
        if not challenger.policy.is_finite:
            self._refuse()
            return None
        self._report.challenge(challenger, self._contest)
        return challenger

    def _refuse(self) -> None:
        self._report.event("refused", reason="non-finite parameters")
        self._restore_learner()

    def _sync(self) -> None:
        """Let act who is to act."""
        self._cast.running = self._contest.running
        self._cast.take(self._contest.contenders)
        self._cast.broken.clear()

    # Decisions

    def _decide(self, verdict: Verdict | None) -> None:
        if verdict is None:
            self._follow_leader()
            return
        self._last_updates = self.model._n_updates
        self._report.verdict(verdict, self._contest)
        if verdict.kind == "rejection":
            self._rejections_in_a_row += verdict.is_failure
            if self.restore_after and self._rejections_in_a_row >= self.restore_after:
                self._restore_learner()
        else:
            self._rejections_in_a_row = 0
            self._sync()
            self._write_champion()
        self._follow_leader()
        self._sync()

    def _follow_leader(self) -> None:
        """The reference of a constrained learner needs no proof: it is whoever is likely the best."""
        leader = self._contest.leader
        if leader is not self._followed:
            self._followed = leader
            move_reference(self.model, leader.policy.state)
            self._report.event("reference", contender=leader.name)

    def _restore_learner(self) -> None:
        champion = self.champion.policy
        self._rejections_in_a_row = 0
        assert champion.snapshot is not None
        # Not the random generators: the same batches would lead to the same policy
        champion.snapshot.restore(self.model, generators=False)
        move_reference(self.model, champion.state)
        self._followed = self.champion
        self._last_updates = self.model._n_updates
        self._report.event("restored", champion=self.champion.name)

    # End

    def _keep_state(self) -> None:
        self._state.write(self.model)

    @property
    def _state(self) -> SavedContest:
        return SavedContest.of(self._contest, self._settings, self._last_updates, self._rejections_in_a_row)

    def _write_champion(self) -> None:
        if self._folder is not None:
            try:
                self.save_champion(self._folder / BEST_MODEL)
                with normalizing_as(self.model, self.champion.policy) as normalize:
                    if normalize is not None:
                        save_statistics(normalize, self._folder / STATISTICS)
            except OSError as error:
                warn(f"ChampionChallenger: the champion cannot be written ({error}).")

    def _on_training_end(self) -> None:
        # rl-zoo3 ends its first callback twice
        if not self._is_running:
            return
        self._is_running = False
        self._cast.leave()
        for evaluation in find_callbacks(self.locals.get("callback"), EvalCallback):
            evaluation.model = self.model
        self._last_obs = self.model._last_obs
        self._report.end(self._contest)
        self._keep_state()
        self._write_champion()
        if self._folder is not None:
            try:
                self.plot(self._folder / FIGURE)
            except OSError as error:
                warn(f"ChampionChallenger: the figure cannot be written ({error}).")


class _Served:
    """A learner whose champion is evaluated and saved in its place."""

    def __init__(self, model: OffPolicyAlgorithm, contest: ChampionChallenger) -> None:
        self._model, self._contest = model, contest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return self._contest.predict(*args, **kwargs)

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._contest.save_champion(path)
