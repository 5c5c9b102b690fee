"""Served return: what everything that acted earned, on runs whose numbers are known by hand, and what holds for any run."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_offline_ft.evaluation.served import AT, ActedEpisodes, acted_episodes, served_metrics, shortfall

J_RANDOM = 0.0


def run(returns, length=100, warmup=2, **options):
    """Training episodes of the same length, of which some are of the warm-up."""
    ends = length * np.arange(1, len(returns) + 1)
    return acted_episodes(ends, returns, warmup * length, **options)


def test_a_known_run():
    # J0 is 100; free episodes: 150, 20, 25, 100, 200 of 100 interactions each
    metrics = served_metrics(run([90.0, 110.0, 150.0, 20.0, 25.0, 100.0, 200.0]), J_RANDOM)
    assert metrics.initial_return == 100 and metrics.initial_standard_error == pytest.approx(10)
    assert metrics.mean_return == pytest.approx((90 + 110 + 150 + 20 + 25 + 100 + 200) / 7)
    # The last third is of 700 / 3 interactions: two episodes and a third of the one before
    assert metrics.last_third_return == pytest.approx((200 + 100 + 25 / 3) / (7 / 3))
    losses = metrics.losses
    # -0.5, then 0.8, 0.75, 0 and -1 on top of it
    assert losses.shortfall == pytest.approx(-0.5 + 0.8 + 0.75 - 1)
    assert losses.largest_shortfall == pytest.approx(1.05)
    # At or below a quarter of the way up from J_random
    assert (losses.episodes, losses.collapsed_episodes, losses.collapsed_share, losses.longest_collapse) == (5, 2, 0.4, 2)
    assert losses.dip_depth is None and list(metrics.return_at.values()) == [None] * len(AT)
    assert shortfall([150, 20, 25], 100, J_RANDOM) == pytest.approx([-0.5, 0.3, 1.05])


def test_a_dip_is_of_ten_episodes_in_a_row():
    returns = [100.0] * 5 + [50.0] * 10 + [0.0] + [120.0] * 9
    losses = served_metrics(run(returns, warmup=5), J_RANDOM).losses
    # Nine of 50 and the one of 0
    assert losses.dip_depth == pytest.approx(1 - 45 / 100)
    assert losses.longest_collapse == 1
    always_above = served_metrics(run([100.0] * 5 + [130.0] * 10, warmup=5), J_RANDOM).losses
    assert always_above.dip_depth == pytest.approx(-0.3) and always_above.largest_shortfall == 0


def test_a_stretch_of_time_weighs_the_same_whatever_ends_in_it():
    # Ten falls within 100 interactions, and one long episode
    acted = acted_episodes([100, *range(110, 201, 10), 1200], [500.0, *[10.0] * 10, 700.0], frozen_until=-1)
    assert acted.mean_return(0, 1200) == pytest.approx((100 * 500 + 100 * 10 + 1000 * 700) / 1200)
    assert acted.mean_return(150, 250) == pytest.approx((10 + 700) / 2)
    assert acted.mean_return(1200, 1300) is None


def test_returns_after_so_many_interactions_are_means_of_the_window_before():
    returns = [*[1.0] * 50, *[2.0] * 50, *[3.0] * 200]
    metrics = served_metrics(run(returns, warmup=0))
    assert metrics.return_at == {5_000: 1.0, 10_000: 2.0, 30_000: 3.0, 100_000: None}
    # The run went on for 50 interactions, to its last episode nobody knows an end
    unfinished = served_metrics(run(returns[:99], warmup=0, interactions=10_000))
    assert unfinished.return_at[10_000] == 2.0
    assert served_metrics(run(returns[:99], warmup=0)).return_at[10_000] is None


def test_own_evaluations_act_and_take_interactions():
    own = {
        "evaluation_timesteps": [0, 150, 400],
        "evaluation_returns": [[100.0, 120.0], [10.0, 20.0], [300.0, 300.0]],
        "evaluation_lengths": [[50, 50], [50, 50], [50, 50]],
    }
    acted = acted_episodes([100, 200, 300, 400], [80.0, 100.0, 130.0, 140.0], 100, interactions=430, **own)
    # The evaluation after 150 interactions is before the episode that it interrupts, the last one after that which ended
    assert acted.returns.tolist() == [100, 120, 80, 10, 20, 100, 130, 140, 300, 300]
    assert acted.kinds == [*["evaluation"] * 2, "serve", *["evaluation"] * 2, *["serve"] * 3, *["evaluation"] * 2]
    assert acted.ends.tolist() == [50, 100, 200, 250, 300, 400, 500, 600, 650, 700]
    assert (acted.n_warmup, acted.warmup_end, acted.interactions) == (3, 200, 730)
    metrics = served_metrics(acted, J_RANDOM)
    # Of three episodes, the last of which is twice as long
    assert metrics.initial_return == 100 and metrics.warmup_return == 95
    assert metrics.mean_return == pytest.approx(
        (50 * (100 + 120) + 100 * 80 + 50 * 30 + 100 * (100 + 130 + 140) + 50 * 600) / 700
    )
    assert metrics.losses.collapsed_episodes == 2
    assert metrics.losses_by_kind["evaluation"].collapsed_episodes == 2
    assert metrics.losses_by_kind["serve"].collapsed_episodes == 0


def test_runs_are_compared_at_equal_interactions():
    acted = run([100.0] * 4 + [200.0] * 96, warmup=2)
    assert served_metrics(acted, J_RANDOM, 600).mean_return == pytest.approx((4 * 100 + 2 * 200) / 6)
    assert served_metrics(acted, J_RANDOM, 600).losses.episodes == 4
    # What the run did later is told apart from that
    assert served_metrics(acted, J_RANDOM, 600).return_at[10_000] == 200
    assert served_metrics(acted, J_RANDOM, 10**6) == served_metrics(acted, J_RANDOM)


def test_served_episodes_are_counted_apart_from_trials():
    kinds = ["serve", "serve", "trial", "serve", "explore", "trial"]
    metrics = served_metrics(run([100.0, 100.0, 0.0, 110.0, 80.0, 10.0], kinds=kinds), J_RANDOM)
    apart = {kind: (losses.episodes, losses.collapsed_episodes, losses.shortfall)
             for kind, losses in metrics.losses_by_kind.items()}  # fmt: skip
    assert apart == {
        "serve": (1, 0, pytest.approx(-0.1)), "trial": (2, 2, pytest.approx(1.9)), "explore": (1, 0, pytest.approx(0.2))
    }  # fmt: skip
    assert metrics.losses.shortfall == pytest.approx(2.0)
    # Two of three in a row, but the first trial is followed by a served one
    assert metrics.losses.longest_collapse == 1 and metrics.losses_by_kind["trial"].longest_collapse == 2


def test_what_cannot_be_said_is_none():
    nothing = served_metrics(acted_episodes([], [], -1), J_RANDOM)
    assert set(nothing.values().values()) == {None, 0} and nothing.losses.episodes == 0
    from_scratch = served_metrics(run([10.0, 20.0], warmup=-1), J_RANDOM)
    assert from_scratch.mean_return == 15 and from_scratch.initial_return is None and from_scratch.losses.shortfall is None
    assert served_metrics(run([10.0, 20.0, 30.0])).losses.shortfall is None
    # A baseline that is no better than a random policy cannot collapse, but can be missed
    worse = served_metrics(run([-10.0, -10.0, -30.0]), J_RANDOM).losses
    assert worse.collapsed_episodes is None and worse.shortfall == 2
    one = served_metrics(run([100.0, 50.0], warmup=1), J_RANDOM)
    assert one.initial_return == 100 and one.initial_standard_error is None


def test_a_policy_that_is_frozen_all_the_time_is_measured_by_all():
    metrics = served_metrics(run([90.0, 110.0], warmup=2), J_RANDOM)
    assert metrics.mean_return == metrics.initial_return == 100 and metrics.losses.episodes == 2
    assert metrics.losses.shortfall == pytest.approx(0) and metrics.losses.largest_shortfall == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"returns": [1.0]}, "needs a timestep, a return and a kind: found 2, 1 and 2"),
        ({"kinds": ["serve"]}, "found 2, 2 and 1"),
        ({"returns": [1.0, np.nan]}, "must be finite"),
        ({"timesteps": [20, 10]}, "one after the other, found a length of -10"),
        ({"evaluation_timesteps": [5]}, r"found shapes \(1,\), \(0,\) and \(0,\)"),
        ({"evaluation_timesteps": [5], "evaluation_returns": [[1.0]], "evaluation_lengths": [1]}, r"\(1, 1\) and \(1,\)"),
    ],
)
def test_wrong_episodes_are_one_clear_error(changes, message):
    with pytest.raises(ValueError, match=message):
        acted_episodes(**{"timesteps": [10, 20], "returns": [1.0, 2.0], "frozen_until": 10, **changes})


NUMBERS = st.floats(-1e4, 1e4)
EPISODES = st.lists(st.tuples(NUMBERS, st.integers(1, 1000)), min_size=1, max_size=40)


def episodes_of(pairs, n_warmup=0):
    returns, lengths = (np.array(column) for column in zip(*pairs, strict=True))
    return ActedEpisodes(returns, lengths, ["serve"] * len(pairs), n_warmup, int(lengths.sum()))


@given(pairs=EPISODES, cuts=st.lists(st.floats(0, 1), max_size=5))
def test_a_mean_does_not_depend_on_how_the_axis_is_cut(pairs, cuts):
    acted = episodes_of(pairs)
    edges = [0.0, *sorted(cut * acted.interactions for cut in cuts), float(acted.interactions)]
    stretches = list(pairwise(edges))
    total = sum((end - start) * (acted.mean_return(start, end) or 0.0) for start, end in stretches)
    assert total / acted.interactions == pytest.approx(acted.mean_return(0, acted.interactions), abs=1e-6)


@given(pairs=EPISODES, pieces=st.integers(1, 5))
def test_an_episode_counts_as_much_as_its_pieces_of_the_same_return(pairs, pieces):
    whole = episodes_of([(value, length * pieces) for value, length in pairs])
    cut = episodes_of([pair for pair in pairs for _ in range(pieces)])
    for share in (0.0, 0.3, 0.9):
        start, end = share * whole.interactions, whole.interactions
        assert whole.mean_return(start, end) == pytest.approx(cut.mean_return(start, end), abs=1e-6)


@given(value=NUMBERS, lengths=st.lists(st.integers(1, 500), min_size=2, max_size=40), random=NUMBERS)
def test_a_constant_policy_loses_nothing(value, lengths, random):
    metrics = served_metrics(episodes_of([(value, length) for length in lengths], len(lengths) // 2), random)
    for mean in (metrics.initial_return, metrics.warmup_return, metrics.mean_return, metrics.last_third_return):
        assert mean == pytest.approx(value)
    if abs(value - random) > 1e-3:
        assert metrics.losses.shortfall == pytest.approx(0, abs=1e-6)
        assert metrics.losses.largest_shortfall == pytest.approx(0, abs=1e-6)
    if value > random + 1e-3:
        assert metrics.losses.collapsed_episodes == metrics.losses.longest_collapse == 0


@given(pairs=EPISODES, scale=st.floats(0.01, 100), shift=NUMBERS, n_warmup=st.integers(1, 5))
def test_losses_do_not_depend_on_the_unit_of_the_return(pairs, scale, shift, n_warmup):
    values = [round(value) for value, _ in pairs]
    one = served_metrics(episodes_of([(value, 10) for value in values], n_warmup), -20_000.0).losses
    other = served_metrics(
        episodes_of([(scale * value + shift, 10) for value in values], n_warmup), scale * -20_000.0 + shift
    ).losses
    assert one.shortfall == pytest.approx(other.shortfall, abs=1e-6)
    assert one.largest_shortfall == pytest.approx(other.largest_shortfall, abs=1e-6)
    assert one.dip_depth == pytest.approx(other.dip_depth, abs=1e-6)


@given(pairs=EPISODES, kinds=st.lists(st.sampled_from(["serve", "trial"]), min_size=40, max_size=40))
def test_what_kinds_lost_is_together_what_all_lost(pairs, kinds):
    returns, lengths = zip(*pairs, strict=True)
    acted = acted_episodes(np.cumsum(lengths), returns, int(lengths[0]), kinds=kinds[: len(pairs)])
    metrics = served_metrics(acted, -20_000.0)
    apart = metrics.losses_by_kind.values()
    assert sum(losses.episodes for losses in apart) == metrics.losses.episodes
    assert sum(losses.shortfall for losses in apart) == pytest.approx(metrics.losses.shortfall, abs=1e-6)
    assert sum(losses.collapsed_episodes for losses in apart) == metrics.losses.collapsed_episodes
