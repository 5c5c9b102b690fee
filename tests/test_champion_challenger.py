"""Champion and challenger in real runs: who acts, who becomes champion, and what becomes of the learner."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, ReBRAC
from sb3_offline_ft.deployment import ChampionChallenger, Kind
from tests.contests import (
    BAD,
    CALM,
    EPISODE_LENGTH,
    FAIR,
    QUICK,
    Aim,
    Hold,
    Record,
    aim,
    choice,
    episodes,
    make,
    noise,
    of,
    shape_of,
    small,
)
from tests.guarded_runs import hold_discrete, parameters, same

OURS = [OfflineTD3, TD3BC, TD3C, ReBRAC]
OTHERS = [TD3, DDPG, SAC, TQC, CrossQ]
STOCHASTIC = (SAC, TQC, CrossQ)
SPEED = {"learning_rate": 1e-3, "learning_starts": 0, "batch_size": 8, "buffer_size": 3000}
SHORT: dict[str, Any] = {"futility": 0.4, "max_trial_episodes": 3}
TRIED = {Kind.SERVE, Kind.EXPLORE, Kind.TRIAL}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*as long as the run", "ignore:.*neither a dataset nor", "ignore:.*learns what is best from an EvalCallback"
)


def check_who_acted(model: Any, record: Record) -> set[Kind]:
    """Checks each action of a run by recomputing it; returns the kinds of episodes that were met."""
    expected: dict[int, list[tuple[int, Any]]] = {}
    contenders: dict[int, Any] = {}
    for index, step in enumerate(record.steps):
        for one in {role: step.contenders[role] for role in step.roles}.values():
            contenders[id(one)] = one
            expected.setdefault(id(one), []).append((index, step.observations))
    chosen: dict[tuple[int, int], np.ndarray] = {}
    for key, entries in expected.items():
        n = len(entries[0][1])
        actions = choice(model, contenders[key], np.concatenate([observations for _, observations in entries]))
        chosen |= {(key, index): actions[n * i : n * i + n] for i, (index, _) in enumerate(entries)}
    met: set[Kind] = set()
    explored: list[float] = []
    for index, step in enumerate(record.steps):
        for place, actor in enumerate(step.actors):
            met.add(actor)
            assert (actor is Kind.TRIAL) == (step.roles[place] != "champion")
            who = step.contenders[step.roles[place]]
            difference = float(np.abs(step.actions[place] - chosen[id(who), index][place]).max())
            if actor is Kind.EXPLORE:
                explored.append(difference)
            else:
                # A matrix product rounds otherwise for another number of rows
                assert difference < 1e-5
        np.testing.assert_array_equal(step.buffer_actions, model.policy.scale_action(step.actions))
    stored = model.replay_buffer.actions[: len(record.steps)]
    np.testing.assert_array_equal(stored, np.stack([step.buffer_actions for step in record.steps]))
    # An exploration is not the deterministic policy by another name
    assert not explored or np.median(explored) > 1e-3
    return met


# Who acts


@pytest.mark.parametrize("algorithm", OTHERS)
def test_who_acts_is_who_is_said_to_act(algorithm: type[OffPolicyAlgorithm]) -> None:
    stochastic = issubclass(algorithm, STOCHASTIC)
    model = make(algorithm, learning_rate=1e-3, action_noise=None if stochastic else noise())
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9, "min_updates": 20})
    record = Record(contest)
    model.learn(700, callback=[record, contest])
    assert check_who_acted(model, record) == TRIED
    assert model._n_updates > 100 and len(of(contest, "challenge")) > 1


@pytest.mark.parametrize("algorithm", OURS)
def test_our_algorithms_learn_behind_a_pretrained_champion(algorithm: type[OfflineTD3]) -> None:
    settings: dict[str, Any] = {**small(), **SPEED, "dataset": "bundled:pendulum-medium", "offline_steps": 50}
    model: Any = algorithm("MlpPolicy", "Pendulum-v1", warmup_steps=0, action_noise=noise(), **settings)
    rules: dict[str, Any] = {"risk_budget": 0.9, "random_return": -85, "worst_return": -165, "baseline_episodes": 20}
    contest = ChampionChallenger(**rules, **SHORT, segment_steps=10, min_updates=60, verbose=0)
    record = Record(contest)
    model.learn(700, callback=[record, contest])
    assert check_who_acted(model, record) == TRIED
    # The first champion is the pretrained policy, not that of the beginning
    assert model.offline_steps_done == 50 and of(contest, "start")[0]["n_updates"] == 50
    assert model._n_updates > 600


@pytest.mark.parametrize(("n_envs", "vec_env"), [(3, DummyVecEnv), (3, SubprocVecEnv), (16, DummyVecEnv)])
def test_several_environments(n_envs: int, vec_env: type) -> None:
    env = make_vec_env(Hold, n_envs=n_envs, seed=0, vec_env_cls=vec_env)
    model: Any = TD3("MlpPolicy", env, action_noise=noise(), **small(), **{**CALM, "learning_rate": 1e-3, "gradient_steps": 5})
    aim(model, FAIR)
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9})
    record = Record(contest)
    model.learn(60 * EPISODE_LENGTH * (1 if n_envs == 3 else 3), callback=[record, contest])
    env.close()
    assert check_who_acted(model, record) == TRIED
    assert sorted({event["env"] for event in episodes(contest)}) == [*range(n_envs)]


def test_nothing_is_tried_outside_the_canary_environments() -> None:
    model = make(n_envs=3, learning_rate=1e-3, action_noise=noise())
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9, "canary_envs": 1})
    record = Record(contest)
    model.learn(1500, callback=[record, contest])
    assert check_who_acted(model, record) == TRIED
    assert {event["env"] for event in episodes(contest) if event["kind"] != "serve"} == {0}


def test_exploring_is_the_champions_action_with_the_learners_noise() -> None:
    class Told(type(noise())):  # type: ignore[misc]
        drawn: list[np.ndarray] = []  # noqa: RUF012

        def __call__(self) -> np.ndarray:
            self.drawn.append(super().__call__())
            return self.drawn[-1]

    model = make(action_noise=Told(np.zeros(1), 0.1 * np.ones(1)))
    contest = ChampionChallenger(**{**QUICK, "min_updates": 1_000})
    record = Record(contest)
    # Nobody challenges in this time but at the end of the baseline
    contest.min_updates = 1
    model.learn(60, callback=[record, contest])
    contest.min_updates = 100_000
    model.learn(400, callback=[record, contest], reset_num_timesteps=False)
    explored = [step for step in record.steps if step.actors == [Kind.EXPLORE]]
    assert len(explored) == len(Told.drawn) > 50
    for step, drawn in zip(explored, Told.drawn, strict=True):
        expected = np.clip(choice(model, step.champion, step.observations) + drawn, -1, 1)
        np.testing.assert_allclose(step.actions, expected, atol=1e-6)


def test_a_state_dependent_exploration_goes_on_changing() -> None:
    """gSDE draws a matrix for each rollout; one that never changes would be a bias in place of noise."""

    class Blind(Hold):
        """With one observation there is one action for each matrix."""

        def _observation(self) -> np.ndarray:
            return np.ones(2, dtype=np.float32)

    model: Any = SAC("MlpPolicy", make_vec_env(Blind, seed=0), use_sde=True, **small(), **CALM)
    contest = ChampionChallenger(**QUICK, **SHORT)
    record = Record(contest)
    model.learn(300, callback=[record, contest])
    explored = [float(step.actions[0, 0]) for step in record.steps if step.actors == [Kind.EXPLORE]]
    assert len(explored) > 20 and len(set(explored)) > len(explored) / model.train_freq.frequency / 2


def test_the_champion_has_its_own_statistics_of_observations() -> None:
    class Drift(Hold):
        """Observations that grow with time."""

        scale = 1.0

        def _observation(self) -> np.ndarray:
            self.scale *= 1.01
            return np.array(self.scale * super()._observation(), dtype=np.float32)

    env = VecNormalize(make_vec_env(Drift, seed=0), norm_reward=True)
    model: Any = TD3("MlpPolicy", env, **small(), **{**CALM, "learning_rate": 1e-3})
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9, "controls": "concurrent"})
    record = Record(contest)
    first = model.policy.state_dict()
    first = {name: value.clone() for name, value in first.items()}
    model.learn(300, callback=[record, contest])
    statistics = record.steps[0].champion.policy.statistics[""]
    assert not np.allclose(statistics.var, env.obs_rms.var, rtol=0.5)
    served = [step for step in record.steps if step.actors == [Kind.SERVE] and step.champion.name == 0]
    assert len(served) > 50
    for step in served:
        own = np.clip((step.originals - statistics.mean) / np.sqrt(statistics.var + env.epsilon), -10, 10).astype(np.float32)
        np.testing.assert_array_equal(step.actions, choice(model, step.champion, own))
    # Returns are those of the environment, not normalized ones
    assert all(-1 < event["return"] < 11 for event in episodes(contest))
    # Whoever evaluates it gives it observations normalized by the statistics of the time
    last = record.steps[-1]
    now = env.normalize_obs(last.originals)
    own = contest.champion.policy.statistics[""]
    expected = (last.originals - own.mean) / np.sqrt(own.var + env.epsilon)
    np.testing.assert_allclose(
        contest.predict(now)[0], choice(model, contest.champion, expected.clip(-10, 10).astype(np.float32)), atol=1e-4
    )


# What it leaves alone


@pytest.mark.parametrize("algorithm", [SAC, TD3C])
def test_with_no_budget_the_baseline_serves_for_ever_and_the_learner_learns(algorithm: type[OffPolicyAlgorithm]) -> None:
    model = make(algorithm, learning_rate=1e-3)
    before = parameters(model)
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0})
    record = Record(contest)
    model.learn(600, callback=[record, contest])
    assert check_who_acted(model, record) == {Kind.SERVE}
    assert contest.champion.name == 0 and not of(contest, "challenge", "promotion", "refused")
    assert len(contest.champion.returns) == 60
    assert model._n_updates > 100 and not same(before, parameters(model))


def test_the_same_seed_gives_the_same_run_to_the_bit() -> None:
    runs = []
    for _ in range(2):
        model = make(SAC, n_envs=3, learning_rate=1e-3)
        contest = ChampionChallenger(**QUICK, seed=3)
        model.learn(1500, callback=contest)
        runs.append((shape_of(contest), parameters(model), contest.champion.returns))
    assert runs[0][0] == runs[1][0] and runs[0][2] == runs[1][2]
    assert same(runs[0][1], runs[1][1])
    assert len({event["kind"] for event in episodes(contest)}) == 3


# Who becomes champion


def test_a_better_learner_becomes_champion() -> None:
    model = make()
    contest = ChampionChallenger(**QUICK)
    record = Record(contest)
    model.learn(600, callback=[record, contest, Aim(60)])
    check_who_acted(model, record)
    promoted = of(contest, "promotion")
    assert promoted and promoted[0]["mean"] > 9 > 7 > promoted[0]["champion_mean"]
    assert contest.champion.mean > 9 and contest.champion.name >= 60
    assert all(event["return"] > 9 for event in episodes(contest)[-10:])


def test_a_worse_learner_gets_one_episode() -> None:
    model = make()
    contest = ChampionChallenger(**{**QUICK, "min_updates": 40})
    model.learn(600, callback=[Aim(20, BAD), contest])
    tried = episodes(contest, Kind.TRIAL)
    assert len(tried) == len(of(contest, "rejection")) == len(of(contest, "challenge")) >= 2
    assert all(event["return"] < 1 for event in tried) and contest.champion.name == 0


def test_a_champion_that_collapses_is_put_down() -> None:
    """The environment changes so that what the champion does is good no more."""

    class Changing(Hold):
        best = 0.0

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            observation, _, terminated, truncated, info = super().step(action)
            reward = 1 - abs(float(action[0]) - self.best) + 0.05 * self.np_random.normal()
            return observation, reward, terminated, truncated, info

    env = make_vec_env(Changing, seed=0)
    model: Any = TD3("MlpPolicy", env, **small(), **CALM)
    aim(model, FAIR)
    contest = ChampionChallenger(**{**QUICK, "baseline_episodes": 10, "max_trial_episodes": 5})
    record = Record(contest)
    model.learn(700, callback=[record, Aim(90), contest])
    assert contest.champion.name > 0 and contest.contest.predecessor is not None
    first = contest.contest.predecessor
    contest.min_updates = 100_000
    env.envs[0].unwrapped.best = 0.8
    model.learn(600, callback=[record, contest], reset_num_timesteps=False)
    assert len(of(contest, "demotion")) == 1 and contest.champion is first
    check_who_acted(model, record)
    last = record.steps[-1]
    np.testing.assert_array_equal(last.actions, choice(model, first, last.observations))


# What is not finite


@th.no_grad()
def spoil(model: Any) -> None:
    for value in model.policy.parameters():
        value.fill_(th.nan)


def test_a_learner_that_is_not_finite_is_refused_and_put_back() -> None:
    model = make()
    contest = ChampionChallenger(**QUICK)
    model.learn(400, callback=[Aim(30, spoil), contest])
    refused, restored = of(contest, "refused"), of(contest, "restored")
    assert len(refused) == len(restored) == 1
    assert refused[0]["reason"] == "non-finite parameters"
    assert all(bool(value.isfinite().all()) for value in parameters(model))
    assert all(np.isfinite(event["return"]) for event in episodes(contest))


def test_a_challenger_whose_actions_are_not_finite_is_given_up_at_once() -> None:
    model = make()

    @th.no_grad()
    def overflow(learner: Any) -> None:
        # Products with sums of both signs: infinity minus infinity
        first, last = learner.policy.actor.mu[0], learner.policy.actor.mu[-2]
        first.weight.zero_()
        first.bias.fill_(3e38)
        last.weight.fill_(3e38)
        last.weight[:, ::2] *= -1

    contest = ChampionChallenger(**QUICK)
    record = Record(contest)
    # Before its next gradient step, which would spoil the parameters
    model.learn(100, callback=[record, Aim(50, overflow), contest])
    rejected = of(contest, "rejection")
    assert rejected and rejected[0]["reason"] == "non-finite action"
    assert all(np.isfinite(step.actions).all() for step in record.steps)
    assert contest.champion.name == 0
    # In the rest of its episode the champion acts
    place = next(index for index, step in enumerate(record.steps) if step.actors == [Kind.TRIAL])
    for step in record.steps[place : place + EPISODE_LENGTH]:
        np.testing.assert_array_equal(step.actions, choice(model, step.champion, step.observations))
    assert [step.actors[0] for step in record.steps[place : place + EPISODE_LENGTH]] == [Kind.TRIAL] + 9 * [Kind.SERVE]


class Broken(Hold):
    """A sensor fails once when an action is small, that is, when the good policy acts."""

    has_failed = False

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if not Broken.has_failed and self._step == 3 and abs(float(action[0])) < 0.3:
            Broken.has_failed, reward = True, float("nan")
        return observation, reward, terminated, truncated, info


def test_a_reward_that_is_not_finite_ends_a_trial_at_once() -> None:
    Broken.has_failed = False
    model: Any = TD3("MlpPolicy", make_vec_env(Broken, seed=0), **small(), **{**CALM, "learning_rate": 0.0})
    aim(model, FAIR)
    contest = ChampionChallenger(**QUICK)
    record = Record(contest)
    model.learn(200, callback=[record, Aim(30), contest])
    rejected = of(contest, "rejection")[0]
    assert rejected["reason"] == "non-finite reward"
    failed = next(index for index, step in enumerate(record.steps) if not np.isfinite(step.rewards).all())
    actors = [step.actors[0] for step in record.steps[failed - 2 : failed + 8]]
    assert actors == 3 * [Kind.TRIAL] + 7 * [Kind.SERVE]
    # Nobody knows what the episode returned: it is charged its worst case, and counts for nobody
    tried = episodes(contest, Kind.TRIAL)[0]
    assert tried["return"] == 0.0 and not tried["counts"]
    assert tried["lost"] == pytest.approx(1.0)


def test_a_served_episode_without_a_finite_return_counts_for_nobody() -> None:
    Broken.has_failed = False
    model: Any = TD3("MlpPolicy", make_vec_env(Broken, seed=0), **small(), **CALM)
    aim(model, 0.0)
    contest = ChampionChallenger(**QUICK)
    model.learn(100, callback=contest)
    assert Broken.has_failed
    assert len(contest.champion.returns) < len(episodes(contest, Kind.SERVE)) and min(contest.champion.returns) > 9


# Within an episode


def test_a_challenger_that_is_given_up_hands_back_within_the_episode() -> None:
    model = make(n_envs=3)
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9, "trial_share": 0.9, "futility": 0.3, "max_trial_episodes": 4})
    record = Record(contest)

    class Staggered(Hold):
        """The environments' episodes end at different times."""

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
            result = super().reset(**kwargs)
            self._step = int(self.np_random.integers(0, 5))
            return result

    model.set_env(make_vec_env(Staggered, n_envs=3, seed=0))
    model.learn(3000, callback=[record, contest])
    check_who_acted(model, record)
    for event in episodes(contest, Kind.TRIAL):
        # Who was tried is told, also if it has been given up since
        place, begun = event["env"], record.steps[event["timestep"] // 3 - event["length"]]
        assert begun.contenders[begun.roles[place]].name == event["challenger"]
    handed_back = [event for event in episodes(contest, Kind.TRIAL) if not event["counts"]]
    assert handed_back and all(event["challenger"] != event["champion"] for event in handed_back)
    # It was the champion that acted at the end of them
    for place in range(3):
        changes = [
            (before, after)
            for before, after in zip(record.steps, record.steps[1:], strict=False)
            if before.actors[place] is Kind.TRIAL and after.actors[place] is Kind.SERVE and not before.dones[place]
        ]
        assert place > 0 or changes


class Endless(Hold):
    """Never ends."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, False, info


@pytest.mark.parametrize("n_envs", [1, 3])
def test_segments_of_an_environment_that_never_ends(n_envs: int) -> None:
    env = make_vec_env(Endless, n_envs=n_envs, seed=0)
    model: Any = TD3("MlpPolicy", env, action_noise=noise(), **small(), **CALM)
    aim(model, FAIR)
    contest = ChampionChallenger(**QUICK, segment_steps=10)
    record = Record(contest)
    model.learn(805 * n_envs, callback=[record, contest, Aim(60)])
    assert check_who_acted(model, record) == TRIED
    assert not any(step.dones.any() for step in record.steps)
    # Each step belongs to one segment, which is of one kind
    for place in range(n_envs):
        segments = [event for event in episodes(contest) if event["env"] == place]
        assert [event["length"] for event in segments] == 80 * [10]
        for index, segment in enumerate(segments):
            steps = record.steps[10 * index : 10 * index + 10]
            assert segment["return"] == pytest.approx(sum(float(step.rewards[place]) for step in steps), rel=1e-4)
            actors = {step.actors[place] for step in steps}
            assert actors == {Kind(segment["kind"])} or not segment["counts"]
    assert contest.champion.mean > 9


def test_the_end_of_an_episode_ends_its_segment() -> None:
    model = make()
    contest = ChampionChallenger(**QUICK, segment_steps=7)
    model.learn(200, callback=contest)
    assert [event["length"] for event in episodes(contest)] == 20 * [7, 3]


# What becomes of the learner


@pytest.mark.parametrize("algorithm", [TD3, SAC, TD3C])
def test_a_learner_whose_challengers_fail_is_put_back_to_the_champion(algorithm: type[OffPolicyAlgorithm]) -> None:
    model = make(algorithm, learning_rate=1e-3)
    before = parameters(model)
    contest = ChampionChallenger(**{**QUICK, "restore_after": 2, "min_updates": 20})
    kept: list[Any] = []

    class Look(Aim):
        def _on_step(self) -> bool:
            if len(of(contest, "restored")) > len(kept):
                kept.append((parameters(self.model), self.model._n_updates, len(self.model.actor.optimizer.state)))  # type: ignore
            return True

    bad = [Aim(step, BAD) for step in range(20, 2000, 20)]
    model.learn(1500, callback=[contest, Look(0), *bad])
    events = [event["event"] for event in of(contest, "rejection", "restored")]
    assert kept and events[: 3 * len(kept)] == len(kept) * ["rejection", "rejection", "restored"]
    for weights, n_updates, n_moments in kept:
        assert same(weights, before) and n_updates == 0 and n_moments == 0
    # And learns on
    assert model._n_updates > 0


@pytest.mark.parametrize("reference", ["pretrained", "best"])
def test_the_reference_of_td3c_follows_the_leader(reference: str) -> None:
    """Before there is a proof, and back to the champion if the challenger is given up."""
    model = make(TD3C, constraint_reference=reference, epsilon=1.0, warmup_steps=0, policy_averaging=0.0)
    model.set_parameters(make(TD3C, constraint_reference=reference).get_parameters())
    # So low a rate that some episodes lie between what is likely and what is proved
    contest = ChampionChallenger(**QUICK, false_promotion_rate=0.02)
    evaluation = EvalCallback(make_vec_env(Hold, seed=1), eval_freq=50, n_eval_episodes=2, verbose=0)
    seen: list[tuple[int, int]] = []

    class Look(Aim):
        def _on_step(self) -> bool:
            leader = contest.contest.leader
            state = {name.removeprefix("actor."): value for name, value in leader.policy.state.items()}
            reference_state = self.model.reference_actor.state_dict()  # type: ignore[attr-defined]
            assert all(th.equal(state[k], v) for k, v in reference_state.items())
            seen.append((contest.champion.name, leader.name))
            return True

    model.learn(600, callback=[evaluation, contest, Aim(60), Look(0)])
    promoted = of(contest, "promotion")[0]["contender"]
    assert (0, 0) in seen and (0, promoted) in seen and (promoted, promoted) in seen
    moved = of(contest, "reference")
    assert moved[0]["contender"] == promoted
    assert contest.events.index(moved[0]) < contest.events.index(of(contest, "promotion")[0])


def test_the_reference_of_td3c_goes_back_when_the_leader_is_given_up() -> None:
    model = make(TD3C, constraint_reference="pretrained", epsilon=1.0, warmup_steps=0, policy_averaging=0.0)
    model.set_parameters(make(TD3C).get_parameters())
    first = {name: value.clone() for name, value in model.actor.state_dict().items()}
    # It cannot be proved in so few episodes, and there is no newer one yet
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9, "min_updates": 12}, false_promotion_rate=1e-9)
    followed: list[bool] = []

    class Look(Aim):
        def _on_step(self) -> bool:
            state = self.model.reference_actor.state_dict()  # type: ignore[attr-defined]
            followed.append(all(th.equal(first[name], value) for name, value in state.items()))
            return super()._on_step()

    def break_challenger(_: Any) -> None:
        # Nothing else makes a frozen policy worse from one step to the next
        with th.no_grad():
            for parameter in contest._cast.policies["challenger"].policy.parameters():
                parameter.fill_(float("nan"))

    model.learn(200, callback=[Aim(40), contest, Look(100, break_challenger)])
    told = [event for event in of(contest, "challenge", "reference", "rejection")][:4]
    assert [event["event"] for event in told] == ["challenge", "reference", "rejection", "reference"]
    assert [told[1]["contender"], told[3]["contender"]] == [told[0]["challenger"], 0]
    assert told[2]["reason"] == "non-finite action" and told[3]["timestep"] > 100
    assert not all(followed) and followed[0] and followed[told[3]["timestep"]]


def test_no_evaluation_is_missed_by_td3c_where_promotions_move_its_reference(recwarn: pytest.WarningsRecorder) -> None:
    model = make(TD3C)
    model.set_parameters(make(TD3C).get_parameters())
    model.learn(30, callback=ChampionChallenger(**QUICK))
    assert not [entry for entry in recwarn if "EvalCallback" in str(entry.message)]


# Clear errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("risk_budget", -0.1), ("risk_budget", 1.0), ("false_promotion_rate", 0.0), ("trial_share", 1.0), ("futility", -1),
        ("baseline_episodes", 1), ("min_updates", 0), ("max_trial_episodes", 1.5), ("restore_after", -1), ("segment_steps", 0),
        ("canary_envs", 0), ("seed", -1), ("random_return", float("nan")), ("worst_return", float("inf")),
        ("risk_budget", "much"), ("trial_share", None), ("random_return", "low"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be .*found {value!r}"):
        ChampionChallenger(**{name: value})


def test_the_past_to_compare_with_must_be_long_enough() -> None:
    with pytest.raises(ValueError, match=r"at least 5 episodes, found `baseline_episodes=4`"):
        ChampionChallenger(baseline_episodes=4)
    ChampionChallenger(baseline_episodes=4, controls="concurrent")


def test_an_unknown_argument_is_named_with_its_neighbour() -> None:
    with pytest.raises(TypeError, match=r"risk_buget.*risk_budget"):
        ChampionChallenger(risk_buget=0.1)  # type: ignore[call-arg]


def test_what_it_cannot_work_with_is_said() -> None:
    discrete = DQN("MlpPolicy", make_vec_env(hold_discrete), **small())
    with pytest.raises(ValueError, match=r"continuous actions.*found DQN.*Discrete\(3\)"):
        discrete.learn(10, callback=ChampionChallenger())
    on_policy = PPO("MlpPolicy", make_vec_env(Hold), n_steps=8, batch_size=8, **small())
    with pytest.raises(ValueError, match=r"off-policy algorithm.*found PPO"):
        on_policy.learn(10, callback=ChampionChallenger())
    with pytest.raises(ValueError, match="several ChampionChallengers"):
        make().learn(10, callback=[ChampionChallenger(), ChampionChallenger()])
    offline: Any = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", **small())
    with pytest.raises(ValueError, match="pass it to `learn`"):
        offline.pretrain(3, callback=ChampionChallenger())
    guided = make(TD3BC, guide_policy="pretrained", guide_steps=5)
    guided.set_parameters(guided.get_parameters())
    with pytest.raises(ValueError, match="guide_policy"):
        guided.learn(10, callback=ChampionChallenger())


def test_a_champion_is_asked_for_too_early() -> None:
    contest = ChampionChallenger()
    for ask in (lambda: contest.champion, lambda: contest.events, lambda: contest.predict(np.zeros(2))):
        with pytest.raises(ValueError, match="has not run yet"):
            ask()


def test_an_action_space_that_is_not_symmetric() -> None:
    class Shifted(Hold):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Box(np.float32(0.0), np.float32(3.0), (1,), np.float32)

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action), action
            return super().step(np.asarray(action) / 3)

    model: Any = SAC("MlpPolicy", make_vec_env(Shifted, seed=0), **small(), **{**CALM, "learning_rate": 1e-3})
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0.9, "min_updates": 20}, **SHORT)
    record = Record(contest)
    model.learn(500, callback=[record, contest])
    assert check_who_acted(model, record) == TRIED


def test_observations_that_are_dictionaries() -> None:
    class Keyed(gym.ObservationWrapper[Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(Hold())
            self.observation_space = spaces.Dict({"a": self.env.observation_space})

        def observation(self, observation: Any) -> dict[str, Any]:
            return {"a": observation}

    env = VecNormalize(make_vec_env(Keyed, seed=0))
    model: Any = SAC("MultiInputPolicy", env, **small(), **{**CALM, "learning_rate": 1e-3})
    contest = ChampionChallenger(**QUICK)
    model.learn(400, callback=contest)
    assert len({event["kind"] for event in episodes(contest)}) == 3
