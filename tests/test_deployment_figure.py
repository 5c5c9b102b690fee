"""The picture and the words of a run with champion and challenger tell what its events say."""

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.deployment.history import EVENTS_FILE, FIGURE, History, mean_interval
from tests.contest_runs import of, run


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def figure(contest):
    return contest.plot()


def artists(figure, name):
    return [artist for axes in figure.axes for artist in axes.get_children() if artist.get_gid() == name]


def test_episodes_are_drawn_by_kind(contest, figure):
    episodes = of(contest.events, "episode")
    for kind in ("serve", "explore", "trial"):
        (dots,) = artists(figure, kind)
        expected = [(event["timestep"] / 1000, event["return"]) for event in episodes if event["kind"] == kind]
        assert len(expected) > 3
        assert np.column_stack(dots.get_data()) == pytest.approx(np.array(expected))


def brightness(colour):
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))) if colour != "none" else 1.0


def test_kinds_are_told_apart_without_colours(figure):
    dots = [artists(figure, kind)[0] for kind in ("serve", "explore", "trial")]
    assert len({line.get_marker() for line in dots}) == 3
    light = sorted(brightness(line.get_markerfacecolor()) for line in dots)
    assert min(np.diff(light)) > 0.1


def test_champions_are_steps_at_what_they_served(contest, figure):
    (line,) = artists(figure, "champions")
    x, y = line.get_data()
    first, second, end = x
    (promotion,) = of(contest.events, "promotion")
    assert (first, second, end) == (0, promotion["timestep"] / 1000, contest.events[-1]["timestep"] / 1000)
    served = [event for event in of(contest.events, "episode") if event["kind"] == "serve" and event["counts"]]
    for height, name in zip(y, (0, promotion["contender"]), strict=False):
        assert height == pytest.approx(np.mean([event["return"] for event in served if event["champion"] == name]))
    assert y[1] > y[0] + 2


def test_levels_of_the_baseline(contest, figure):
    (baseline,) = of(contest.events, "baseline")
    mean = baseline["mean"]
    heights = {"baseline": mean, "limit of collapse": -5 + 0.25 * (mean + 5), "random policy": -5}
    for name, height in heights.items():
        (line,) = artists(figure, name)
        assert line.get_ydata()[0] == pytest.approx(height)


def test_decisions_are_marked(contest, figure):
    for name in ("promotion", "rejection"):
        (marks,) = artists(figure, name)
        assert marks.get_xdata().tolist() == [event["timestep"] / 1000 for event in of(contest.events, name)]
    assert not artists(figure, "demotion")


def test_budget_is_drawn_below(contest, figure):
    account = [event for event in of(contest.events, "episode") if "balance" in event]
    for name in ("allowance", "lost", "balance"):
        (line,) = artists(figure, name)
        assert line in figure.axes[1].lines
        assert line.get_ydata().tolist() == [event[name] for event in account]
    assert all(event["lost"] <= event["allowance"] for event in account)


def test_picture_is_written_at_the_end_and_wherever_asked(contest, tmp_path):
    assert (contest.path / FIGURE).read_bytes().startswith(b"\x89PNG")
    contest.plot(tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_picture_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / FIGURE).mkdir()
    with pytest.warns(UserWarning, match="figure cannot be written"):
        callback = run(tmp_path, steps=100)
    assert callback.events[-1]["event"] == "end"


def test_pictures_of_the_beginning(contest):
    nothing = History([]).draw()
    assert nothing.axes[0].texts[0].get_text() == "no episodes yet"
    early = History(contest.events[:8]).draw()
    assert "baseline is not known" in early.axes[1].texts[0].get_text() and artists(early, "serve")
    words = History(contest.events[:8]).in_words()
    assert "no baseline yet" in words["served"] and "nothing was tried" in words["at risk"]


def test_segments_are_called_so():
    callback = run(None, steps=300, segment_steps=5)
    assert callback.plot().axes[0].get_ylabel() == "return of the segment"
    assert " segments: mean return" in History(callback.events).in_words()["served"]


def test_words_have_the_numbers_of_the_events(contest):
    words = History(read_events(contest.path / EVENTS_FILE)).in_words()
    episodes = of(contest.events, "episode")
    by_kind = {
        kind: [event["return"] for event in episodes if event["kind"] == kind] for kind in ("serve", "explore", "trial")
    }
    served = by_kind["serve"]
    assert f"{len(served)} of {len(episodes)} episodes: mean return {np.mean(served):.1f}" in words["served"]
    (baseline,) = of(contest.events, "baseline")
    assert f"baseline {baseline['mean']:.1f}" in words["served"] and f"{baseline['n']} episodes" in words["served"]
    assert f"{len(by_kind['trial'])} trials and {len(by_kind['explore'])} explorations" in words["at risk"]
    assert f"{abs(episodes[-1]['lost']):.2f} against the baseline" in words["at risk"]
    assert f"allowed a loss of {0.08 * len(episodes):.2f}" in words["at risk"]
    n = len(of(contest.events, "rejection"))
    assert (
        n > 0 and f"1 promotion, {n} rejection" in words["outcome"] and f"step {contest.champion.name:,}:" in words["outcome"]
    )


def test_level_of_a_champion_is_not_that_of_the_trial_it_was_chosen_for(contest):
    (promotion,) = of(contest.events, "promotion")
    _, champion = History(contest.events).reigns[-1]
    assert champion.tried == promotion["returns"] and len(champion.served) > 5
    assert champion.returns == champion.served


def test_interval_of_a_mean():
    # Student's t with two degrees of freedom: 4.3027
    assert mean_interval([1, 2, 3]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert mean_interval([1]) == (-np.inf, np.inf)


def test_summary_of_a_run_that_needed_no_evaluations(contest, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "250")
    (contest.path / FIGURE).unlink()
    result = CliRunner().invoke(app, ["summary", str(contest.path)])
    assert result.exit_code == 0, result.output
    for name, text in History(contest.events).in_words().items():
        assert any(name in line and text in line for line in result.output.splitlines())
    assert "best_model.zip" in result.output and (contest.path / FIGURE).exists()
    result = CliRunner().invoke(app, ["summary", str(contest.path), "--figure", str(tmp_path / "own.png")])
    assert result.exit_code == 0 and (tmp_path / "own.png").exists()


def test_summary_of_damaged_events_says_so(contest, tmp_path):
    lines = (contest.path / EVENTS_FILE).read_text().splitlines()
    for number, damage in ((3, "rubbish"), (4, '{"event": "episode", "timestep": 10}')):
        (tmp_path / EVENTS_FILE).write_text("\n".join([*lines[:number], damage, *lines[number:]]) + "\n")
        result = CliRunner().invoke(app, ["summary", str(tmp_path)])
        assert result.exit_code == 1 and EVENTS_FILE in result.output and "damaged" in result.output
