"""The events of a guarded run in words."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.collapse.events import EPISODES, EVENTS_FILE, Event, monitored_words, read_events
from sb3_offline_ft.common.console import PlainConsole

FREQUENT = (*EPISODES, "signal", "candidate")
COMMON_FIELDS = ("event", "timestep", "episode", "n_updates", "time")
ESCALATIONS = {"freeze": "froze the policy", "stop": "stopped the training", "continue": "let the training go on"}


def show_events(run: Path, figure: Path | None = None, everything: bool = False, console: Console | None = None) -> None:
    """
    Print what the collapse guard did in a run.

    :param run: The run's folder, or its file of events
    :param figure: Where the picture shall be; None draws none
    :param everything: Show every episode, signal and candidate too
    :raises FileNotFoundError: There are no events
    :raises ValueError: The file of events is damaged
    """
    console = console or PlainConsole()
    path = _events_file(run)
    events = read_events(path)
    console.print(Text(verdict(events), style="bold"))
    starts = _of(events, "start")
    if starts:
        console.print(Text(f"Settings: {settings(starts[-1])}"))
    shown = [event for event in events if everything or event["event"] not in FREQUENT]
    if shown:
        console.print(_table(shown))
    if len(shown) < len(events):
        console.print(Text(f"{len(events) - len(shown):,} episodes, signals and candidates are not shown; --all shows them."))
    if figure is not None:
        from sb3_offline_ft.collapse.figure import draw_events

        draw_events(events, figure)
        console.print(Text(f"Picture: {figure}"))


def verdict(events: list[Event]) -> str:
    """Say in a few words what came of a run."""
    episodes, alarms, rollbacks = (_of(events, kind) for kind in ("episode", "alarm", "rollback"))
    if alarms or rollbacks:
        facts = [f"{_count(alarms, 'alarm')}, {_count(rollbacks, 'rollback')} in {monitored_words(events)}"]
    elif episodes:
        facts = [f"No alarm in {monitored_words(events)}"]
    else:
        facts = ["No episodes yet"]
    if rollbacks:
        facts.append(f"last rollback to step {_number(rollbacks[-1].get('to_timestep'))}")
    if episodes and not _of(events, "baseline"):
        facts.append("the returns were not watched, for there was no baseline")
    elif unwatched := [event for event in episodes if event.get("phase") == "unwatched"]:
        facts.append(f"not watched: {_count(unwatched, 'episode')}")
    for event in _of(events, "escalation")[-1:]:
        facts.append(f"at step {_number(event.get('timestep'))} the guard {_escalation(event)}")
    kinds = [event["event"] for event in events]
    if "end" not in kinds[len(kinds) - kinds[::-1].index("start") - 1 if "start" in kinds else 0 :]:
        facts.append(f"the log has no end: the run goes on or was interrupted after step {_last_step(events)}")
    return "; ".join(facts) + "."


def settings(start: Event) -> str:
    """Say with which settings a guard was started."""
    facts = [f"{name} {start[name]}" for name in ("algorithm", "detector") if start.get(name)]
    if start.get("false_alarm_rate") is not None:
        rate = f"false-alarm rate {_number(start['false_alarm_rate'])}"
        facts.append(f"{rate} over {_number(start.get('horizon_episodes'))} episodes")
    if start.get("n_envs") is not None:
        facts.append("1 environment" if start["n_envs"] == 1 else f"{_number(start['n_envs'])} environments")
    known = {*COMMON_FIELDS, "algorithm", "detector", "false_alarm_rate", "horizon_episodes", "n_envs", "resumed", "settings"}
    rest = {name: value for name, value in start.items() if name not in known}
    nested = start.get("settings")
    if isinstance(nested, dict):
        rest |= {name: value for name, value in nested.items() if name not in start}
    return ", ".join([*facts, *_pairs(rest)]) or "none recorded"


def describe(event: Event) -> str:
    """Say in words what happened."""
    words = _WORDS.get(event["event"])
    if words is not None:
        try:
            return words(event)
        except (KeyError, TypeError, ValueError, OverflowError, OSError):
            pass
    # Other versions may write other events
    return ", ".join(_pairs({name: value for name, value in event.items() if name not in COMMON_FIELDS}))


def _events_file(run: Path) -> Path:
    path = run / EVENTS_FILE if run.is_dir() else run
    if path.is_file():
        return path
    found = f"{run} is a folder without {EVENTS_FILE}" if run.is_dir() else f"{run} is neither a folder nor a file"
    raise FileNotFoundError(
        f"{found}: expected the folder of a run that was trained with a CollapseGuard, or its {EVENTS_FILE}. "
        f"Train with the callback CollapseGuard and let it write to {path}, or pass the folder in which it wrote that file."
    )


def _of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _count(events: list[Event], word: str) -> str:
    return f"{len(events):,} {word}{'' if len(events) == 1 else 's'}"


def _last_step(events: list[Event]) -> str:
    return _number(max((event["timestep"] for event in events if isinstance(event.get("timestep"), int)), default=0))


def _number(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{name}={'none' if value is None else _number(value)}" for name, value in values.items()]


def _level(event: Event) -> str:
    if event.get("statistic") is None:
        return ""
    if event.get("threshold") is None:
        return f"statistic {_number(event['statistic'])}"
    return f"statistic {_number(event['statistic'])} of {_number(event['threshold'])}"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _with_message(words: str, event: Event) -> str:
    return f"{words}: {event['message']}" if event.get("message") else words


def _escalation(event: Event) -> str:
    return ESCALATIONS.get(event["action"], str(event["action"]))


def _start(event: Event) -> str:
    return f"{'resumed' if event.get('resumed') else 'started'} at {datetime.fromtimestamp(event['time']):%Y-%m-%d %H:%M:%S}"


def _episode(event: Event) -> str:
    length = f" in {_number(event['length'])} steps" if "length" in event else ""
    return _join(f"return {_number(event['return'])}{length}", event["phase"], _level(event))


def _baseline(event: Event) -> str:
    spread = f"5 to 95 %: {_number(event['low'])} to {_number(event['high'])}"
    words = f"mean {_number(event['mean'])}, sd {_number(event['sd'])} ({spread}) of {_number(event['n'])} episodes"
    delay = event.get("episodes_to_alarm")
    needed = "" if delay is None else f"alarm {_number(delay)} episodes after a total collapse"
    return _join(words, f"source {event['source']}", f"threshold {_number(event.get('threshold'))}", needed)


def _promotion(event: Event) -> str:
    words = f"the policy of step {_number(event['candidate_timestep'])} is the new good one"
    return f"{words}: mean {_number(event['mean'])} over {_number(event['n_episodes'])} episodes"


def _rollback(event: Event) -> str:
    goal = f"back to step {_number(event['to_timestep'])}, {_number(event['to_n_updates'])} updates"
    removed = f", {_number(event['removed'])} transitions removed" if event.get("removed") else ""
    return f"rollback {_number(event['number'])}: {goal}; poisoned data: {event['poisoned_data']}{removed}"


def _remedy(event: Event) -> str:
    if str(event.get("message")).startswith(event["name"]):
        return str(event["message"])
    parameters = ", ".join(_pairs(event.get("parameters") or {}))
    return _with_message(f"{event['name']} ({parameters})" if parameters else str(event["name"]), event)


def _release(event: Event) -> str:
    return _with_message(f"{event['name']} ended" if event.get("name") else "a temporary remedy ended", event)


def _end(event: Event) -> str:
    return ", ".join(f"{name} {_number(event[name])}" for name in ("alarms", "rollbacks", "promotions"))


_WORDS: dict[str, Callable[[Event], str]] = {
    "start": _start,
    **dict.fromkeys(EPISODES, _episode),
    "baseline": _baseline,
    "promotion": _promotion,
    "ratchet": lambda event: f"baseline raised from {_number(event['old_mean'])} to {_number(event['new_mean'])}",
    "alarm": lambda event: _with_message(_join(event["reason"], _level(event)), event),
    "rollback": _rollback,
    "removal": lambda event: f"{_number(event['removed'])} transitions removed after rollback {_number(event['number'])}",
    "remedy": _remedy,
    "escalation": lambda event: _with_message(f"{event['action']}: the guard {_escalation(event)}", event),
    "release": _release,
    "warning": lambda event: str(event["message"]),
    "end": _end,
}

_STYLES = {"alarm": "bold red", "rollback": "bold blue", "escalation": "bold magenta", "warning": "yellow"}


def _table(events: list[Event]) -> Table:
    table = Table(show_edge=False)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("episode", justify="right", no_wrap=True)
    table.add_column("event", no_wrap=True)
    table.add_column("what happened")
    for event in events:
        kind = event["event"]
        table.add_row(
            Text(_number(event.get("timestep"))),
            Text(_number(event.get("episode"))),
            Text(kind, style=_STYLES.get(kind, "")),
            Text(describe(event)),
        )
    return table
