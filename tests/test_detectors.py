"""
Detectors of policy collapse: rare false alarms, quick true ones.

Statistical tests have fixed seeds. Where a rate of false alarms is promised, the test fails if the lower end of the exact
99.9 % confidence interval of the measured rate is above the promise.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from sb3_offline_ft.collapse.detectors import (
    DETECTORS,
    Alarm,
    BettingDetector,
    CusumDetector,
    Detector,
    DeteriorationDetector,
    make_detector,
)
from sb3_offline_ft.common.io import arrays_from_text, arrays_to_text

RATE, HORIZON = 0.05, 100
N_STEPS = 50

POPULATIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: -np.exp(rng.normal(size=size)),
    "two modes": lambda rng, size: np.where(rng.random(size) < 0.1, -10.0, 0.0) + rng.normal(size=size),
    "successes": lambda rng, size: (rng.random(size) < 0.7).astype(float),
}


def draw_returns(rng: np.random.Generator, population: str, n_reference: int, n_stream: int) -> np.ndarray:
    """Returns whose first ``n_reference`` are not all the same."""
    while True:
        returns = POPULATIONS[population](rng, n_reference + n_stream)
        if np.ptp(returns[:n_reference]):
            return returns


def as_episodes(rng: np.random.Generator, returns: Iterable[float]) -> list[np.ndarray]:
    """Rewards that add up to the given returns, with correlated noise within and random lengths."""
    episodes = []
    for value in returns:
        length = int(rng.integers(N_STEPS // 2, N_STEPS + 1))
        noise = 0.1 * np.cumsum(rng.normal(size=length))
        episodes.append(value / length + noise - noise.mean())
    return episodes


def first_alarm(detector: Detector, stream: Iterable[Any]) -> int | None:
    """Number of episodes until the first alarm."""
    return next((i for i, x in enumerate(stream, 1) if detector.update(x) is not None), None)


def assert_rate_kept(n_alarms: int, n_runs: int, rate: float = RATE) -> None:
    low = binomtest(n_alarms, n_runs).proportion_ci(0.999, method="exact").low
    assert low <= rate, f"{n_alarms} false alarms in {n_runs} runs, promised {rate:.0%}"


def example_stream(name: str, n: int, seed: int, mean: float = 0.0) -> list[Any]:
    rng = np.random.default_rng(seed)
    returns = rng.normal(mean, 1.0, n)
    return as_episodes(rng, returns) if DETECTORS[name].needs_rewards else list(returns)


def calibrated(name: str, n_reference: int = 20, rate: float = RATE, horizon: int = HORIZON, **options: Any) -> Detector:
    detector = make_detector({name: options}, rate, horizon)
    detector.calibrate(example_stream(name, n_reference, seed=123))
    return detector


@pytest.mark.parametrize("n_reference", [10, 30])
@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("name", ["cusum", "betting"])
def test_false_alarms_are_as_rare_as_promised(name, population, n_reference):
    rng = np.random.default_rng(n_reference)
    n_runs, n_alarms = 300, 0
    for run in range(n_runs):
        returns = draw_returns(rng, population, n_reference, HORIZON)
        # A few seeds only: each has a threshold to be simulated
        detector = make_detector({name: {"seed": run % 5}}, RATE, HORIZON)
        detector.calibrate(returns[:n_reference])
        n_alarms += first_alarm(detector, returns[n_reference:]) is not None
    assert_rate_kept(n_alarms, n_runs)


@pytest.mark.parametrize(("population", "n_reference"), [("normal", 10), ("skewed", 10), ("two modes", 10), ("normal", 30)])
def test_false_alarms_within_episodes_are_as_rare_as_promised(population, n_reference):
    rng = np.random.default_rng(n_reference)
    n_runs, n_alarms = 200, 0
    for run in range(n_runs):
        episodes = as_episodes(rng, draw_returns(rng, population, n_reference, HORIZON))
        detector = DeteriorationDetector(RATE, HORIZON, n_simulations=500, seed=run)
        detector.calibrate(episodes[:n_reference])
        n_alarms += first_alarm(detector, episodes[n_reference:]) is not None
    assert_rate_kept(n_alarms, n_runs)


@settings(max_examples=50, deadline=None)
@given(past=st.lists(st.integers(0, 8), max_size=40), horizon=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_a_bettor_expects_no_gain_while_nothing_has_changed(past, horizon, seed):
    """The capital is a supermartingale under Polya's urn, whatever has been seen: the promise then holds for ever."""
    reference = np.arange(8.0)
    detector = BettingDetector(RATE, horizon, seed=seed)
    detector.calibrate(reference)
    for j in past:
        detector.update(j - 0.5)
    now, state, expected = math.exp(detector.statistic), detector.state_dict(), 0.0
    for j in range(9):
        detector.load_state_dict(state)
        detector.update(j - 0.5)
        expected += (1 + past.count(j)) / (9 + len(past)) * math.exp(detector.statistic)
    assert expected <= now * (1 + 1e-9)


# (detector, size of the reference): episodes after which total collapse, and a decline by 2 SD, must have been noticed
DELAYS = {
    ("cusum", 10): (8, 40),
    ("cusum", 30): (6, 15),
    ("betting", 10): (7, 40),
    ("betting", 30): (5, 15),
    ("deterioration", 10): (10, 50),
    ("deterioration", 30): (6, 20),
}


@pytest.mark.parametrize(("name", "n_reference"), DELAYS)
def test_decline_is_noticed_within_the_stated_number_of_episodes(name, n_reference):
    until_collapse, until_decline = DELAYS[name, n_reference]
    collapse_delays, decline_delays = [], []
    for seed in range(20):
        detector = make_detector({name: {"seed": seed % 2}}, RATE, HORIZON)
        detector.calibrate(example_stream(name, n_reference, seed))
        if first_alarm(detector, example_stream(name, 20, 1000 + seed)) is not None:
            continue
        state = detector.state_dict()
        collapse_delays.append(first_alarm(detector, example_stream(name, 60, 2000 + seed, mean=-50.0)) or math.inf)
        detector.load_state_dict(state)
        decline_delays.append(first_alarm(detector, example_stream(name, 60, 3000 + seed, mean=-2.0)) or math.inf)
    assert len(collapse_delays) >= 15
    assert max(collapse_delays) <= until_collapse
    assert np.mean(np.array(decline_delays) <= until_decline) >= 0.8


@pytest.mark.parametrize("n_reference", [5, 7])
@pytest.mark.parametrize("name", DETECTORS)
def test_lasting_collapse_is_noticed_even_at_the_strictest_settings(name, n_reference):
    detector = calibrated(name, n_reference, rate=0.01, horizon=1000)
    for x in example_stream(name, 5, seed=1):
        detector.update(x)
    assert first_alarm(detector, example_stream(name, 60, seed=2, mean=-50.0)) is not None


def test_no_bettor_alarms_earlier_than_possible():
    for n_reference, rate in itertools.product((10, 30), (0.05, 0.01)):
        detector = BettingDetector(rate, 1000)
        detector.calibrate(np.arange(n_reference))
        delay = first_alarm(detector, itertools.repeat(-1.0))
        # Probability that m values are all below n others of the same distribution
        least = next(m for m in itertools.count(1) if 1 / math.comb(n_reference + m, m) <= rate)
        assert delay is not None and least <= delay <= least + 3


@pytest.mark.parametrize("name", DETECTORS)
def test_improvement_is_no_alarm_and_neither_is_the_return_to_the_old_level(name):
    n_alarms, n_runs = 0, 40
    for seed in range(n_runs):
        detector = make_detector({name: {"seed": seed % 2}}, RATE, HORIZON)
        detector.calibrate(example_stream(name, 20, seed))
        improving = example_stream(name, 20, 1000 + seed, mean=2.0) + example_stream(name, 30, 2000 + seed, mean=8.0)
        before = [detector.update(x) for x in improving]
        assert before == [None] * len(before)
        n_alarms += first_alarm(detector, example_stream(name, 50, 3000 + seed)) is not None
    assert_rate_kept(n_alarms, n_runs)


def test_collapse_is_noticed_before_the_episode_ends():
    detector = calibrated("deterioration", 30)
    for x in example_stream("deterioration", 20, seed=1):
        assert detector.update(x) is None
    n_finished = 20
    while True:
        rewards = np.full(N_STEPS, -1.0)
        alarms = [(step, detector.update_within(rewards[:step])) for step in range(1, N_STEPS)]
        fired = [(step, alarm) for step, alarm in alarms if alarm is not None]
        if fired:
            break
        assert detector.update(rewards) is None
        n_finished += 1
    step, alarm = fired[0]
    assert step <= N_STEPS // 2 and alarm.episode == n_finished <= 26
    assert alarm.statistic >= alarm.threshold == detector.threshold


def test_an_early_end_counts_as_worse_where_rewards_are_positive_and_as_better_where_they_are_negative():
    rng = np.random.default_rng(0)
    for sign, noticed in ((1, True), (-1, False)):
        reference = [sign + 0.1 * rng.normal(size=rng.integers(80, 101)) for _ in range(20)]
        detector = DeteriorationDetector(RATE, HORIZON)
        detector.calibrate(reference)
        delay = first_alarm(detector, [sign + 0.1 * rng.normal(size=7) for _ in range(30)])
        assert (delay is not None) == noticed


def test_decline_late_in_episodes_is_noticed():
    """The weights leave no segment out."""
    rng = np.random.default_rng(0)
    scale = np.repeat([0.1, 1.0], [50, 50])
    detector = DeteriorationDetector(RATE, HORIZON)
    detector.calibrate([scale * rng.normal(size=100) for _ in range(20)])
    drop = np.repeat([0.0, 2.0], [90, 10])
    assert first_alarm(detector, [scale * rng.normal(size=100) - drop for _ in range(30)]) is not None


def test_environments_that_take_turns_do_not_disturb_each_other():
    detector = calibrated("deterioration")
    length = N_STEPS // 10
    state = detector.state_dict()
    rng = np.random.default_rng(0)
    episodes = rng.normal(0.0, 0.2, (3, N_STEPS))

    def statistics(order: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        detector.load_state_dict(state)
        result = {}
        for env, segment in order:
            detector.update_within(episodes[env, : segment * length], episode_key=env)
            result[env, segment] = detector.statistic
        return result

    one_by_one = statistics([(env, segment) for env in range(3) for segment in range(1, 10)])
    in_turns = statistics([(env, segment) for segment in range(1, 10) for env in range(3)])
    assert one_by_one == in_turns and len(set(one_by_one.values())) > 20


def test_each_boundary_of_an_episode_is_tested_once():
    detector = calibrated("deterioration")
    length = N_STEPS // 10
    rewards = np.full(N_STEPS, -5.0)
    detector.update_within(rewards[:length])
    first = detector.statistic
    assert first > 0
    detector.update_within(rewards[: length + 1] * -100)
    assert detector.statistic == first
    detector.update_within(rewards[: 2 * length] * -100)
    assert detector.statistic < first
    # The next episode of this environment starts anew
    detector.update(rewards)
    detector.update_within(rewards[:length])
    assert detector.statistic > first


def test_rewards_of_running_episodes_do_not_matter_to_detectors_of_returns():
    for name in ("cusum", "betting"):
        detector = calibrated(name)
        before = detector.state_dict()
        assert detector.update_within(np.full(10, -1e9)) is None
        after = detector.state_dict()
        assert all(np.array_equal(before[key], after[key], equal_nan=before[key].dtype.kind == "f") for key in before)


def test_lengths_may_vary_and_exceed_the_reference():
    detector = calibrated("deterioration")
    rng = np.random.default_rng(0)
    for length in (1, 3, N_STEPS, 3 * N_STEPS):
        rewards = rng.normal(size=length)
        for step in range(1, length):
            detector.update_within(rewards[:step])
        detector.update(rewards)
    assert detector.n_episodes == 4 and math.isfinite(detector.statistic)


def test_references_in_which_parts_are_all_alike():
    """A pole balanced to the end gives the same rewards each time."""
    rng = np.random.default_rng(0)
    lengths = [200] * 15 + [120, 160, 170, 180, 190]
    detector = DeteriorationDetector(RATE, HORIZON)
    detector.calibrate([np.ones(length) for length in lengths])
    normal = [np.ones(rng.choice(lengths)) for _ in range(HORIZON)]
    assert first_alarm(detector, normal) is None
    assert first_alarm(detector, [np.ones(20)] * 20) is not None
    # All but one alike: leaving that one out leaves nothing that varies
    detector.calibrate([np.ones(length) for length in [200] * 9 + [100]])
    assert first_alarm(detector, [np.ones(200)] * HORIZON) is None


CALIBRATED_STATES: dict[str, dict[str, np.ndarray]] = {}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(DETECTORS)), seed=st.integers(0, 2**32))
def test_a_restored_detector_continues_to_the_bit(data, name, seed):
    if name not in CALIBRATED_STATES:
        CALIBRATED_STATES[name] = calibrated(name).state_dict()
    detector = make_detector(name, RATE, HORIZON)
    detector.load_state_dict(CALIBRATED_STATES[name])
    n_steps = data.draw(st.integers(0, 30))
    cut = data.draw(st.integers(0, n_steps))
    stream = example_stream(name, n_steps, seed, mean=data.draw(st.sampled_from([0.0, -1.0])))
    # With ties to the reference
    stream += example_stream(name, 3, seed=123)

    def feed(detector: Detector, xs: list[Any]) -> list[Alarm | None]:
        alarms = []
        for i, x in enumerate(xs):
            if detector.needs_rewards:
                alarms.append(detector.update_within(x[: len(x) // 2], episode_key=i % 2))
            alarms.append(detector.update(x, episode_key=i % 3))
        return alarms

    feed(detector, stream[:cut])
    restored = make_detector(name, RATE, HORIZON)
    restored.load_state_dict(arrays_from_text(arrays_to_text(detector.state_dict())))
    assert feed(restored, stream[cut:]) == feed(detector, stream[cut:])
    assert restored.n_episodes == detector.n_episodes == len(stream)
    a, b = arrays_to_text(restored.state_dict()), arrays_to_text(detector.state_dict())
    assert arrays_from_text(a).keys() == arrays_from_text(b).keys()
    assert all(value.tobytes() == arrays_from_text(b)[key].tobytes() for key, value in arrays_from_text(a).items())


@pytest.mark.parametrize("name", DETECTORS)
def test_same_seed_same_result_whatever_the_global_generator(name):
    results = []
    for seed in (0, 0, 1):
        np.random.seed(seed + 5)
        detector = calibrated(name, seed=seed)
        # Successes and failures: ties are broken at random
        if not detector.needs_rewards:
            detector.calibrate([1.0] * 10 + [0.0] * 5)
        stream = example_stream(name, 10, seed=7) if detector.needs_rewards else [0.0, 1.0] * 5
        state = np.random.get_state()[1].copy()
        statistics = [detector.update(x) or detector.statistic for x in stream]
        assert np.array_equal(np.random.get_state()[1], state)
        results.append((detector.threshold, statistics))
    assert results[0] == results[1] != results[2]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["cusum", "betting"]),
    values=st.lists(st.integers(-1000, 1000), min_size=5, max_size=40),
    scale=st.integers(1, 1000),
    shift=st.integers(-(10**6), 10**6),
)
def test_units_of_returns_do_not_matter(name, values, scale, shift):
    assume(len(set(values[:5])) > 1)
    statistics = []
    for unit, zero in ((1.0, 0.0), (scale, shift)):
        detector = make_detector(name, RATE, HORIZON)
        detector.calibrate([unit * value + zero for value in values[:5]])
        for value in values[5:]:
            detector.update(unit * value + zero)
        statistics.append((detector.statistic, detector.threshold))
    assert statistics[0] == statistics[1]


@settings(max_examples=5, deadline=None)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 2**32))
def test_the_unit_of_rewards_does_not_matter(exponent, seed):
    statistics = []
    for unit in (1.0, 2.0**exponent):
        detector = DeteriorationDetector(RATE, HORIZON, n_simulations=100)
        detector.calibrate([unit * x for x in example_stream("deterioration", 10, seed)])
        for x in example_stream("deterioration", 10, seed + 1):
            detector.update(unit * x)
        statistics.append((detector.statistic, detector.threshold))
    assert statistics[0] == pytest.approx(statistics[1], rel=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_monitoring_can_start_again(name):
    detector = calibrated(name)
    collapsed = example_stream(name, 40, seed=1, mean=-50.0)
    delay = first_alarm(detector, collapsed)
    assert delay is not None
    alarm = detector.update(collapsed[-1])
    assert isinstance(alarm, Alarm), "it keeps on alarming"
    assert alarm.detector == name and alarm.episode == detector.n_episodes == delay + 1
    assert alarm.statistic == detector.statistic >= alarm.threshold == detector.threshold
    assert "worse than the reference" in alarm.message and "\n" not in alarm.message
    threshold = detector.threshold
    detector.reset()
    assert detector.is_calibrated and detector.n_episodes == 0 and detector.threshold == threshold > detector.statistic
    assert first_alarm(detector, collapsed) == delay


@pytest.mark.parametrize("name", DETECTORS)
def test_a_fresh_detector_has_the_same_settings_but_its_own_rate(name):
    options = {"cusum": {"drift": 0.25}, "betting": {}, "deterioration": {"n_segments": 4}}[name]
    detector = calibrated(name, seed=3, **options)
    other = detector.fresh(0.2)
    assert type(other) is type(detector) and not other.is_calibrated and other.threshold == math.inf
    assert (other.false_alarm_rate, other.horizon, other.seed) == (0.2, HORIZON, 3)
    for option, value in options.items():
        assert getattr(other, option) == value
    other.calibrate(example_stream(name, 20, seed=123))
    assert other.threshold != detector.threshold


def test_more_reference_episodes_and_more_false_alarms_allow_faster_alarms():
    def delay(name: str, n_reference: int, rate: float) -> int:
        detector = calibrated(name, n_reference, rate)
        return first_alarm(detector, example_stream(name, 60, seed=1, mean=-50.0)) or 1000

    for name in DETECTORS:
        assert delay(name, 10, 0.01) > delay(name, 100, 0.01)
        assert delay(name, 10, 0.01) > delay(name, 10, 0.2)


def test_cusum_of_a_large_reference_is_the_classical_one():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=4000)
    detector = CusumDetector(RATE, HORIZON, n_simulations=200, clip=4.0)
    detector.calibrate(reference)
    total = 0.0
    for x in rng.normal(-0.5, 1.0, 30):
        detector.update(x)
        total = max(0.0, total - x - 0.5)
        assert detector.statistic == pytest.approx(total, abs=0.6)


@pytest.mark.parametrize("name", DETECTORS)
def test_what_cannot_be_a_reference_is_refused(name):
    detector = make_detector(name)
    few = example_stream(name, 4, seed=0)
    with pytest.raises(ValueError, match=r"at least 5 finished episodes, found 4: gather more \(a longer warm-up\)"):
        detector.calibrate(few)
    constant = [np.ones(10)] * 10 if detector.needs_rewards else np.ones(10)
    with pytest.raises(ValueError, match="All 10 reference episodes have the same return"):
        detector.calibrate(constant)
    for value in (math.nan, math.inf):
        broken = example_stream(name, 10, seed=0)
        if detector.needs_rewards:
            broken[3][2] = value
        else:
            broken[3] = value
        with pytest.raises(ValueError, match="finite"):
            detector.calibrate(broken)
    assert not detector.is_calibrated


@pytest.mark.parametrize("name", DETECTORS)
def test_what_cannot_be_an_episode_is_refused_and_leaves_no_trace(name):
    detector = make_detector(name)
    good = example_stream(name, 1, seed=0)[0]
    with pytest.raises(RuntimeError, match=r"has no reference yet: call calibrate\(\) first"):
        detector.update(good)
    with pytest.raises(RuntimeError, match="has no reference yet"):
        detector.update_within(good)
    detector = calibrated(name)
    before = arrays_to_text(detector.state_dict())
    bad = [np.array([0.0, math.nan]), np.zeros((3, 2)), np.zeros(0), 1.0] if detector.needs_rewards else [math.nan, -math.inf]
    for x in bad:
        with pytest.raises(ValueError, match="finite"):
            detector.update(x)
    if detector.needs_rewards:
        with pytest.raises(ValueError, match="finite"):
            detector.update_within(np.full(N_STEPS, math.nan))
    assert arrays_to_text(detector.state_dict()) == before


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "false_alarm_rate", value) for name in DETECTORS for value in (0.0, 1.0, -0.1, math.nan)),
        *((name, "horizon", value) for name in DETECTORS for value in (0, 1.5, math.inf)),
        *((name, "n_simulations", value) for name in DETECTORS for value in (0, 50, 1000.5)),
        *((name, "seed", -1) for name in DETECTORS),
        *(("cusum", "drift", value) for value in (-1.0, math.nan, math.inf)),
        *(("cusum", "clip", value) for value in (0.5, 0.0, math.nan)),
        ("deterioration", "n_segments", 0),
        ("deterioration", "lookbacks", ()),
        ("deterioration", "lookbacks", (0, 1)),
    ],
)
def test_parameters_out_of_range_are_named(name, option, value):
    with pytest.raises(ValueError, match=f"`{option}`"):
        make_detector({name: {option: value}})


def test_a_state_must_fit():
    state = calibrated("cusum").state_dict()
    with pytest.raises(ValueError, match="one of detector 'cusum', expected 'betting'"):
        make_detector("betting").load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved with false_alarm_rate=0\.05, this one has 0\.01"):
        CusumDetector(0.01, HORIZON).load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved with clip=nan, this one has 4\.0"):
        CusumDetector(RATE, HORIZON, clip=4.0).load_state_dict(state)
    del state["counts"]
    with pytest.raises(ValueError, match="lacks counts"):
        CusumDetector(RATE, HORIZON).load_state_dict(state)
    with pytest.raises(ValueError, match="one of detector None"):
        CusumDetector(RATE, HORIZON).load_state_dict({})
    uncalibrated = CusumDetector(RATE, HORIZON)
    detector = calibrated("cusum")
    detector.load_state_dict(uncalibrated.state_dict())
    assert not detector.is_calibrated and detector.threshold == math.inf


def test_too_strict_for_the_reference_is_refused():
    detector = DeteriorationDetector(1e-4, 8, n_simulations=20_000)
    with pytest.raises(ValueError, match=r"5 reference episodes are too few for a false-alarm rate of 0\.0001"):
        detector.calibrate(example_stream("deterioration", 5, seed=0))


@pytest.mark.parametrize(("drift", "horizon"), [(0.0, 1), (0.0, HORIZON), (3.0, 1), (5.0, HORIZON)])
def test_extreme_settings_of_cusum(drift, horizon):
    detector = calibrated("cusum", 100, horizon=horizon, drift=drift)
    assert detector.update(0.0) is None
    assert first_alarm(detector, [-50.0] * 100) is not None


def test_detectors_are_made_from_names():
    for name, kind in DETECTORS.items():
        detector = make_detector(name, 0.03, 70)
        assert type(detector) is kind and detector.false_alarm_rate == 0.03 and detector.horizon == 70
    assert make_detector({"cusum": {"drift": 0.25}}).drift == 0.25
    assert make_detector({"cusum": None}).drift == 0.5
    assert make_detector({"cusum": {"horizon": 7}}, 0.03, 70).horizon == 7
    own = BettingDetector(0.2)
    assert make_detector(own, 0.03, 70) is own and own.false_alarm_rate == 0.2
    with pytest.raises(ValueError, match=r"Unknown detector 'cumsum'\. Did you mean 'cusum'"):
        make_detector("cumsum")
    with pytest.raises(ValueError, match="Known are betting, cusum, deterioration"):
        make_detector("xyz")
    with pytest.raises(ValueError, match="is one name"):
        make_detector({"cusum": {}, "betting": {}})
    with pytest.raises(TypeError, match=r"unknown keyword 'drfit'.*'drift'"):
        make_detector({"cusum": {"drfit": 1}})
