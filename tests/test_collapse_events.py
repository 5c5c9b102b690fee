"""The event log of the collapse guard survives what happens to files, and its picture and its command tell what happened."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.collapse.events import EVENTS_FILE, WORD_FIELDS, EventLog, read_events
from sb3_offline_ft.collapse.figure import draw_events
from sb3_offline_ft.collapse.show import describe, settings, verdict

REPOSITORY = Path(__file__).parent.parent


def event(kind="episode", timestep=0, **details):
    return {"event": kind, "timestep": timestep, "episode": timestep // 100, "n_updates": timestep, "time": 1.7e9, **details}


def guarded_run(n_episodes=300, alarms=(150, 250), n_baseline=50, escalation=None):
    """The events of a run in which the returns fall before each alarm, and which goes back to the last promotion then."""
    rng = np.random.default_rng(0)
    start = {"algorithm": "TD3C", "detector": "cusum", "false_alarm_rate": 0.05, "horizon_episodes": 1000, "n_envs": 1}
    events = [event("start", settings={"max_rollbacks": 3, "remedies": ["lower_lr"]}, resumed=False, **start)]
    for number in range(1, n_episodes + 1):
        step = 100 * number
        falls = any(alarm - 5 < number <= alarm for alarm in alarms)
        phase = "baseline" if number <= n_baseline else "ignored" if number % 70 == 0 else "monitoring"
        statistic = None if phase == "baseline" else 9.0 if number in alarms else 1.0
        details = {"length": 100, "phase": phase, "statistic": statistic, "threshold": None if statistic is None else 8.0}
        events.append(event("episode", step, **{"return": float(rng.normal(500 if falls else 2000, 100))}, **details))
        if number == n_baseline:
            level = {"mean": 2000.0, "sd": 100.0, "n": n_baseline, "low": 1840.0, "high": 2160.0}
            events.append(event("baseline", step, source="warmup", threshold=8.0, **level))
        if number % 60 == 0 and number > n_baseline:
            events.append(event("candidate", step))
            events.append(event("promotion", step, candidate_timestep=step - 1000, n_episodes=10, mean=2000.0))
        if number in alarms:
            events.append(event("alarm", step, reason="cusum", statistic=9.0, threshold=8.0, message="the returns fell"))
            if number == alarms[-1] and escalation:
                events.append(event("escalation", step, action=escalation, message="nothing helped"))
                break
            goal = {"to_timestep": step - 3000, "to_n_updates": step - 3000, "poisoned_data": "keep", "removed": 0}
            events.append(event("rollback", step, number=alarms.index(number) + 1, **goal))
            events.append(event("remedy", step, name="lower_lr", parameters={"factor": 0.5}, message="halved"))
    return [*events, event("end", 100 * n_episodes, rollbacks=len(alarms), alarms=len(alarms), promotions=1)]


def written(path, events):
    log = EventLog(path)
    log.start(resume=False)
    for item in events:
        log.append(item)
    return log


def fails(*_arguments, **_keywords):
    raise OSError(28, "No space left on device")


def test_every_event_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "new folder" / EVENTS_FILE
    log, events = EventLog(path), guarded_run()
    log.start(resume=False)
    for number, item in enumerate(events, start=1):
        log.append(item)
        assert path.read_bytes().count(b"\n") == number
    assert read_events(path) == log.events == events
    assert all(json.loads(line)["event"] for line in path.read_text().splitlines())


def test_log_without_a_path_keeps_its_events_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = written(None, guarded_run())
    assert log.events == guarded_run() and not list(tmp_path.iterdir())


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text().filter(lambda text: text not in ("nan", "inf", "-inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=8).filter(lambda name: name not in WORD_FIELDS), plain, max_size=5))
def test_round_trip(tmp_path_factory, details):
    item = event("other") | {name: value for name, value in details.items() if name not in event()}
    path = tmp_path_factory.mktemp("log") / EVENTS_FILE
    written(path, [item])
    assert repr(read_events(path)) == repr([item])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_numbers_of_numpy_and_torch_and_those_json_lacks(tmp_path):
    values = {
        "return": np.float32(1.5), "length": np.int64(7), "resumed": np.bool_(True), "mean": np.float64("nan"),
        "sd": math.inf, "settings": {"limits": np.array([-np.inf, 2.0]), "net_arch": (64, 64), "folder": Path("a/b")},
        "statistic": th.tensor(float("-inf")), "precise": np.longdouble(0.5), "when": np.datetime64("2024-01-01"),
        "reason": "nan", "source": "inf",
    }  # fmt: skip
    log = written(tmp_path / EVENTS_FILE, [event() | values])
    (item,) = read_events(tmp_path / EVENTS_FILE)
    assert repr(item) == repr(log.events[0])
    assert [item[name] for name in ("return", "length", "resumed", "precise")] == [1.5, 7, True, 0.5]
    assert math.isnan(item["mean"]) and item["sd"] == math.inf and item["statistic"] == -math.inf
    assert item["settings"] == {"limits": [-math.inf, 2.0], "net_arch": [64, 64], "folder": str(Path("a/b"))}
    assert (item["reason"], item["source"], item["when"]) == ("nan", "inf", "2024-01-01")


def test_file_cut_at_any_byte_can_be_read_and_resumed(tmp_path):
    path = tmp_path / EVENTS_FILE
    events = [event(), event("warning", 100, message="übel\n{"), event("end", 200, alarms=math.inf)]
    written(path, events)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        found = read_events(path)
        # An event whose newline alone is missing is whole
        assert found == events[: (content[:length] + b"\n").count(b"}\n")]
        log = EventLog(path)
        log.start(resume=True)
        assert log.events == found and read_events(path) == found
        log.append(event("release", 300))
        assert read_events(path) == log.events == [*found, event("release", 300)]
        assert path.read_bytes().count(b"\n") == len(log.events)


@pytest.mark.parametrize(
    "damage", [b"{'event'", b"[1]", b'{"timestep": 3}', b"\xff\xfe", b"\0\0\0", b'{"event": 3}', b"[" * 9999]
)
def test_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / EVENTS_FILE
    written(path, [event(), event(), event()])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    for read in (lambda: read_events(path), lambda: EventLog(path).start(resume=True)):
        with pytest.raises(ValueError, match=r"line 2 is damaged: expected a JSON object") as caught:
            read()
        assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_resumed_log_continues_the_file_and_a_new_one_replaces_it(tmp_path):
    path = tmp_path / EVENTS_FILE
    written(path, [event(), event(timestep=100)])
    log = EventLog(path)
    log.start(resume=True)
    log.append(event("start", 200, resumed=True))
    log.start(resume=True)
    log.append(event(timestep=300))
    assert [item["timestep"] for item in log.events] == [0, 100, 200, 300] and read_events(path) == log.events
    log.start(resume=False)
    assert log.events == read_events(path) == []
    log.append(event(timestep=400))
    assert read_events(path) == [event(timestep=400)]
    assert [file.name for file in tmp_path.iterdir()] == [EVENTS_FILE]


def test_event_before_the_start_continues_the_file(tmp_path):
    path = tmp_path / EVENTS_FILE
    written(path, [event()])
    path.write_bytes(path.read_bytes() + b'{"event": "epi')
    EventLog(path).append(event(timestep=100))
    assert read_events(path) == [event(), event(timestep=100)]


def test_file_that_is_deleted_during_the_run_is_written_anew(tmp_path):
    log = written(tmp_path / "run" / EVENTS_FILE, [event()])
    log.path.unlink()
    log.path.parent.rmdir()
    log.append(event(timestep=100))
    assert read_events(log.path) == [event(), event(timestep=100)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_warns_once_and_is_made_up_for(tmp_path):
    path = tmp_path / EVENTS_FILE
    log = written(path, [event()])
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        log.append(event(timestep=100))
        log.append(event(timestep=200))
    assert len(caught) == 1 and str(path) in str(caught[0].message) and caught[0].filename == __file__
    path.unlink()
    log.append(event(timestep=300))
    assert read_events(path) == log.events and len(log.events) == 4


def test_disk_that_fails_for_a_while(tmp_path, monkeypatch):
    path = tmp_path / EVENTS_FILE
    log = written(path, [event()])
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="stay in memory"):
        patch.setattr(Path, "open", fails)
        for step in (100, 200):
            log.append(event(timestep=step))
    assert read_events(path) == [event()]
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        log.append(event(timestep=300))
        patch.setattr(Path, "open", fails)
        log.append(event(timestep=400))
    assert [item["timestep"] for item in read_events(path)] == [0, 100, 200, 300]
    log.start(resume=True)
    assert read_events(path) == log.events and len(log.events) == 5


def test_run_that_cannot_replace_the_old_file_does_it_later(tmp_path, monkeypatch):
    path = tmp_path / EVENTS_FILE
    written(path, [event("old")])
    log = EventLog(path)
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left"):
        patch.setattr(os, "replace", fails)
        log.start(resume=False)
        log.append(event())
    assert read_events(path) == [event("old")]
    log.append(event(timestep=100))
    assert read_events(path) == log.events == [event(), event(timestep=100)]
    assert len(list(tmp_path.iterdir())) == 1


TORN = """
import resource, sys, warnings
from pathlib import Path
from sb3_offline_ft.collapse.events import EventLog, read_events

path = Path(sys.argv[1])
warnings.simplefilter("ignore")
log = EventLog(path)
log.start(resume=False)
for limit in range(1, 400, 7):
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + limit % 150, resource.RLIM_INFINITY))
    log.append({"event": "episode", "timestep": limit, "message": "x" * 60})
    whole = read_events(path)
    assert whole == log.events[: len(whole)]
    if limit % 3 == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.append({"event": "episode", "timestep": limit})
        assert read_events(path) == log.events and path.read_bytes().count(b"\\n") == len(log.events)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
def test_writes_that_stop_in_the_middle_of_a_line_leave_no_trace(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", TORN, str(tmp_path / EVENTS_FILE)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr


APPENDER = """
import sys
from pathlib import Path
from sb3_offline_ft.collapse.events import EventLog

log = EventLog(Path(sys.argv[1]))
log.start(resume=True)
while True:
    log.append({"event": "episode", "timestep": len(log.events), "message": "x" * 5000})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_process_leaves_a_file_that_the_next_one_continues(tmp_path):
    path = tmp_path / EVENTS_FILE
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    n_before = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", APPENDER, str(path)], env=environment)
        try:
            while process.poll() is None and (path.stat().st_size if path.exists() else 0) < 5100 * (n_before + 50):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
        events = read_events(path)
        assert [item["timestep"] for item in events] == list(range(len(events))) and len(events) > n_before
        n_before = len(events)


def artists(figure, name):
    return [artist for axes in figure.axes for artist in axes.get_children() if artist.get_gid() == name]


@pytest.mark.parametrize("alarms", [(), (150, 250), (80, 120, 160, 200, 240)])
def test_figure_marks_each_alarm_and_rollback(tmp_path, alarms):
    events = guarded_run(alarms=alarms)
    figure = draw_events(events, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    top, bottom = figure.axes
    for axes in (top, bottom):
        lines = [line for line in axes.lines if line.get_gid() == "alarm"]
        assert [line.get_xdata()[0] for line in lines] == [alarm / 10 for alarm in alarms]
    ends = [(line.get_xdata()[1], line.get_xdata()[0]) for line in artists(figure, "rollback")]
    assert ends == [(alarm / 10, alarm / 10 - 3) for alarm in alarms]
    assert [text.get_text() for text in top.texts] == [str(number + 1) for number in range(len(alarms))]
    assert sum(len(line.get_xdata()) for line in top.lines if "episodes" in (line.get_gid() or "")) == 300
    assert len(artists(figure, "baseline phase")) == 2 and len(artists(figure, "running median")) == len(alarms) + 1
    (mean,) = artists(figure, "baseline mean")
    assert mean.get_xdata()[0] == 5 and set(mean.get_ydata()) == {2000}
    ratios = np.concatenate([line.get_ydata() for line in artists(figure, "statistic")])
    assert ratios.max() == (9 / 8 if alarms else 1 / 8)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(set(labels)) and ("alarm" in labels) == bool(alarms)
    lowest_panel = bottom.get_tightbbox().y0
    assert legend.get_window_extent().y1 <= lowest_panel, "the legend covers the data"


def test_figure_baseline_follows_each_new_one():
    raised = event("baseline", 20000, mean=2500.0, sd=1.0, n=9, low=2400.0, high=2600.0, source="ratchet", threshold=8.0)
    events = guarded_run(alarms=())
    events.insert([item["timestep"] for item in events].index(20000), raised)
    (mean,) = artists(draw_events(events), "baseline mean")
    assert mean.get_xdata().tolist() == [5, 20, 30] and mean.get_ydata().tolist() == [2000, 2500, 2500]


def test_figure_of_an_episode_that_comes_after_the_rollback_it_caused():
    """The statistic has begun anew in the episode's own event, the alarm's tells how high it was."""
    events = guarded_run(n_episodes=200, alarms=(150,))
    at = next(index for index, item in enumerate(events) if item["event"] == "episode" and item["timestep"] == 15000)
    episode = events.pop(at) | {"statistic": 0.0}
    events.insert([item["event"] for item in events].index("remedy") + 1, episode)
    figure = draw_events(events)
    before, after = artists(figure, "statistic")
    assert before.get_xdata()[-2:].tolist() == [15, 15] and before.get_ydata()[-2:].tolist() == [9 / 8, 0]
    assert after.get_xdata()[0] == 15.1
    assert [line.get_xdata()[0] for line in artists(figure, "running median")] == [0.1, 15.1]


def test_figure_of_returns_that_are_not_watched():
    events = [
        item | {"phase": "unwatched", "statistic": None} for item in guarded_run(alarms=()) if item["event"] == "episode"
    ]
    figure = draw_events(events)
    assert len(artists(figure, "episodes unwatched")[0].get_xdata()) == 300 and not artists(figure, "baseline phase")
    assert figure.axes[1].texts[0].get_text() == "no statistic: the returns were not watched"


def test_figure_counts_what_was_monitored():
    figure = draw_events(guarded_run())
    counts = figure.axes[0].get_title(loc="right")
    assert counts.startswith("246 monitored episodes (of 300), 2 alarms, 2 rollbacks")
    # Where evaluations are watched, no training episode is
    kinds = {"baseline": "evaluation", "monitoring": "evaluation"}
    watched = [
        item | {"event": kinds.get(item["phase"], "episode")} if item["event"] == "episode" else item for item in guarded_run()
    ]
    figure = draw_events(watched)
    assert figure.axes[0].get_title(loc="right").startswith("246 monitored evaluation episodes (of 296), 2 alarms")
    assert len(artists(figure, "episodes monitoring")[0].get_xdata()) == 246 and artists(figure, "statistic")


def test_figure_of_an_escalation():
    figure = draw_events(guarded_run(alarms=(80, 120), escalation="stop"))
    assert len(artists(figure, "escalation")) == 2 and "stop" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("events", [[], guarded_run()[:1]])
def test_figure_without_episodes_says_so(events, tmp_path):
    figure = draw_events(events, tmp_path / "picture.png")
    assert figure.axes[0].texts[0].get_text() == "no episodes yet"
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_figure_without_a_baseline():
    figure = draw_events(guarded_run()[:20])
    assert not artists(figure, "baseline mean") and not artists(figure, "statistic")
    assert len(artists(figure, "episodes baseline")[0].get_xdata()) == 19
    assert "has no baseline yet" in figure.axes[1].texts[0].get_text()


def test_figure_of_ten_thousand_episodes(tmp_path):
    figure = draw_events(guarded_run(10_000, alarms=(5000, 9000)), tmp_path / "picture.png")
    assert len(artists(figure, "alarm")) == 4 and (tmp_path / "picture.png").stat().st_size > 50_000


def test_figure_of_numbers_that_are_not_finite(tmp_path):
    events = guarded_run()
    for index, (name, value) in enumerate([("return", math.nan), ("return", math.inf), ("statistic", math.inf)] * 5):
        events[170 + index][name] = value
    events.append(event("baseline", 29000, mean=math.nan, sd=None, n=0, low=-math.inf, high=None, source="given"))
    events.append(event("alarm", 29100, reason="non-finite critic loss", statistic=None, threshold=None, message=""))
    figure = draw_events(events, tmp_path / "picture.png")
    assert artists(figure, "beyond") and np.isfinite(figure.axes[0].get_ylim()).all()
    draw_events([{"event": "alarm"}, {"event": "rollback"}, {"event": "episode"}, {"event": "unheard of"}])


def test_figure_leaves_pyplot_alone(monkeypatch):
    # Importing it fails now
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw_events(guarded_run())


def test_verdict():
    # Of 300 episodes 50 are the baseline, and 4 of the others are ignored
    assert verdict(guarded_run(alarms=())) == "No alarm in 246 monitored episodes (of 300)."
    assert verdict(guarded_run()) == "2 alarms, 2 rollbacks in 246 monitored episodes (of 300); last rollback to step 22,000."
    stopped = verdict(guarded_run(alarms=(80,), escalation="stop"))
    assert stopped == "1 alarm, 0 rollbacks in 29 monitored episodes (of 80); at step 8,000 the guard stopped the training."
    unfinished = verdict(guarded_run()[:20])
    assert (
        "were not watched, for there was no baseline" in unfinished
        and "no end: the run goes on or was interrupted after step 1,900" in unfinished
    )
    lost = [item | {"phase": "unwatched"} if item["timestep"] > 25000 else item for item in guarded_run()]
    assert "in 197 monitored episodes (of 300); last rollback to step 22,000; not watched: 50 episodes." in verdict(lost)
    assert verdict([]).startswith("No episodes yet")
    assert "no end" in verdict([*guarded_run(), event("start", 30000, resumed=True)])


def test_words_of_each_event():
    described = {item["event"]: describe(item) for item in guarded_run(escalation="freeze")}
    assert described["alarm"] == "cusum, statistic 9 of 8: the returns fell"
    assert described["rollback"] == "rollback 1: back to step 12,000, 12,000 updates; poisoned data: keep"
    assert described["remedy"] == "lower_lr (factor=0.5): halved"
    assert described["escalation"] == "freeze: the guard froze the policy: nothing helped"
    assert described["end"] == "alarms 2, rollbacks 2, promotions 1"
    assert describe(event("alarm", reason="non-finite critic loss", statistic=None, threshold=None, message="")) == (
        "non-finite critic loss"
    )
    assert describe(event("ratchet", old_mean=1.0, new_mean=2.5)) == "baseline raised from 1 to 2.5"
    assert describe(event("removal", number=1, removed=1500)) == "1,500 transitions removed after rollback 1"
    assert describe(event("remedy", name="brake", parameters={"a": 1}, message="brake: a 1")) == "brake: a 1"
    assert describe(event("signal", td_error=math.nan)) == "td_error=nan"
    # Written by another version: its fields are shown as they are
    assert describe(event("rollback", depth=3)) == "depth=3" and describe(event("unheard of", a=None)) == "a=none"
    assert settings(guarded_run()[0]) == (
        "algorithm TD3C, detector cusum, false-alarm rate 0.05 over 1,000 episodes, 1 environment, max_rollbacks=3, "
        "remedies=['lower_lr']"
    )


@pytest.fixture
def show(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["guard", "show", *map(str, arguments)])


def test_command_shows_a_run(show, tmp_path):
    events = [*guarded_run(), event("warning", 30000, message="[bold]not markup[/bold] [/]")]
    written(tmp_path / EVENTS_FILE, events)
    result = show(tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == verdict(events)
    for text in ("Settings: algorithm TD3C", "15,000", "back to step 12,000", "[bold]not markup[/bold] [/]", "305 episodes"):
        assert text in result.output
    assert "return" not in result.output.replace("the returns fell", "") and "candidate " not in result.output
    assert show(tmp_path / EVENTS_FILE).output == result.output
    everything = show(tmp_path, "--all")
    assert everything.output.count("monitoring") > 200 and "--all" not in everything.output
    assert [path.name for path in tmp_path.iterdir()] == [EVENTS_FILE]


def test_command_draws(show, tmp_path):
    written(tmp_path / EVENTS_FILE, guarded_run())
    picture = tmp_path / "pictures" / "guard.png"
    result = show(tmp_path, "--figure", picture)
    assert result.exit_code == 0 and str(picture) in result.output.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_what_has_no_events(show, tmp_path):
    for run, found in (
        (tmp_path, "is a folder without collapse_events.jsonl"),
        (tmp_path / "x", "neither a folder nor a file"),
    ):
        result = show(run)
        assert result.exit_code == 1
        assert found in result.output and "CollapseGuard" in result.output and str(run) in result.output
    (tmp_path / EVENTS_FILE).write_text("step,return\n0,1\n")
    result = show(tmp_path)
    assert result.exit_code == 1 and "line 1 is damaged" in result.output


def test_command_as_a_module(tmp_path):
    written(tmp_path / EVENTS_FILE, guarded_run())
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "sb3_offline_ft", "guard", "show"]
    process = subprocess.run([*command, tmp_path], env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stdout.startswith("2 alarms, 2 rollbacks in 246 monitored episodes (of 300)"), (
        process.stderr
    )
    process = subprocess.run([*command, tmp_path / "no"], env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and not process.stdout and process.stderr.startswith("sb3-offline-ft guard show: ")
