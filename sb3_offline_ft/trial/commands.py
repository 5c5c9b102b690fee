"""The ``sb3-offline-ft trial`` commands. Heavy modules are imported by the commands that need them."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sb3_offline_ft.common.console import echo
from sb3_offline_ft.common.reporting import reporting

if TYPE_CHECKING:
    from sb3_offline_ft.trial.decision import Decision
    from sb3_offline_ft.trial.trial import Recorded

trial = typer.Typer(
    help="From a policy that runs today and a candidate to a go or no-go on a real system.", no_args_is_help=True
)

EXIT_CODES = {"go": 0, "no-go": 1, "not yet": 2}
UNDECIDED = 3
"""Exit code of `decide` if there was an error, which is no decision."""

Folder = Annotated[Path, typer.Argument(help="The trial's folder.")]


@trial.command("init")
def trial_init(
    folder: Annotated[Path, typer.Argument(help="Where the trial shall be.")],
    baseline: Annotated[
        str,
        typer.Option(
            help="The policy that runs today: a .zip, a run's folder, an .onnx file, module:function, zero or random; any "
            "words without --env."
        ),
    ],
    candidate: Annotated[str, typer.Option(help="The policy that is tried.")],
    env: Annotated[str | None, typer.Option(help="Gymnasium id of the environment; none for a system without one.")] = None,
    data: Annotated[str | None, typer.Option(help="Spec of a dataset of the baseline.")] = None,
    columns: Annotated[Path | None, typer.Option(help="Column map of logs, as of `dataset convert`.")] = None,
    episodes: Annotated[int, typer.Option(help="Budget: episodes of both policies.")] = 80,
    smallest_effect: Annotated[
        float | None, typer.Option(help="The smallest improvement of the mean return that is worth having.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the policies, and of the episodes.")] = 0,
) -> None:
    """Write trial.yml, the commented plan, and checklist.md, to be edited."""
    with reporting("trial init"):
        from sb3_offline_ft.trial.init import init_trial, next_steps
        from sb3_offline_ft.trial.plan import RETURN

        effect = None if smallest_effect is None else {"metric": RETURN, "smallest_effect": smallest_effect}
        sections = {
            "env": env, "baseline": baseline, "candidate": candidate, "data": data, "seed": seed, "primary": effect,
            "columns": None if columns is None else str(columns),
        }  # fmt: skip
        echo(next_steps(init_trial(folder, sections, episodes)))


@trial.command("plan")
def trial_plan(
    folder: Folder,
    ask_data: Annotated[
        bool, typer.Option(help="Whether to ask the plan's dataset what both policies return, which takes minutes.")
    ] = True,
    trials: Annotated[int, typer.Option(help="Simulated trials for each chance.", min=1)] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what to expect before anything runs: how long, at what risk and cost, with which chances."""
    with reporting("trial plan"):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.trial.plan_shown import show_plan
        from sb3_offline_ft.trial.trial import Trial

        with PlainConsole(stderr=True).status("reading") as status:
            result = Trial.open(folder).plan(ask_data=ask_data, n_trials=trials, on_progress=status.update)
        if as_json:
            echo(json.dumps(result.as_mapping()))
        else:
            show_plan(result, PlainConsole())


@trial.command("run")
def trial_run(
    folder: Folder,
    until: Annotated[str | None, typer.Option(help="Name of the last stage to run; all by default.")] = None,
    drill: Annotated[
        bool, typer.Option("--drill", help="A rollback drill instead: an episode in which the baseline has to take over.")
    ] = False,
    device: Annotated[str, typer.Option(help="Torch device of the policies.")] = "cpu",
) -> None:
    """Run the episodes in the environment, from where the trial is; report.html is rewritten after each."""
    with reporting("trial run", "interrupted; all but the episode under way is kept, and the same command goes on"):
        from sb3_offline_ft.trial.machine import Finished
        from sb3_offline_ft.trial.running import run_trial
        from sb3_offline_ft.trial.trial import Trial

        opened = Trial.open(folder)
        ended = run_trial(opened, until=until, drill=drill, device=device)
        if drill and not isinstance(ended, Finished):
            echo(_drilled(opened.machine.drills[-1]))
            return
        n = len(opened.machine.episodes)
        echo(f"{n} episodes so far. {ended.reason if isinstance(ended, Finished) else f'The stage {until!r} is done.'}")
        echo(_decided(opened.decide()))


@trial.command("robustness")
def trial_robustness(
    folder: Folder,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes.")] = 1,
    device: Annotated[str, typer.Option(help="Torch device of the policies.")] = "cpu",
) -> None:
    """Try both policies in the environment as it might be. `trial run` does it first if the plan says so."""
    with reporting("trial robustness"):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.evaluation.robustness import print_tables
        from sb3_offline_ft.trial.trial import Trial

        result = Trial.open(folder).robustness(n_jobs=jobs, device=device, console=PlainConsole(stderr=True))
        print_tables(result, PlainConsole())


@trial.command("report")
def trial_report(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the folder by default.")
    ] = None,
) -> None:
    """Write one HTML page with all that is known, to be read, printed and signed."""
    with reporting("trial report"):
        from sb3_offline_ft.trial.report import write_report
        from sb3_offline_ft.trial.trial import Trial

        echo(str(write_report(Trial.open(folder), output)))


@trial.command("next")
def trial_next(
    folder: Folder,
    drill: Annotated[bool, typer.Option("--drill", help="A rollback drill: an episode that does not count.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which policy drives the next episode, and why; the exit code is 1 if there is none."""
    with reporting("trial next"):
        from sb3_offline_ft.trial.machine import Finished
        from sb3_offline_ft.trial.status import in_words
        from sb3_offline_ft.trial.trial import Trial

        opened = Trial.open(folder)
        upcoming = opened.next(drill=drill)
        is_over = isinstance(upcoming, Finished)
        if as_json:
            echo(json.dumps({"finished": upcoming.reason} if isinstance(upcoming, Finished) else upcoming.as_event()))
        else:
            words = in_words(upcoming, opened.plan_in_force)
            echo(words[0].upper() + words[1:])
            if isinstance(upcoming, Finished):
                echo(f"`sb3-offline-ft trial decide {shlex.quote(str(folder))}` says what came out.")
            else:
                echo(f"Then: sb3-offline-ft trial record {shlex.quote(str(folder))} --episode {upcoming.episode} ...")
        if is_over:
            raise typer.Exit(1)


@trial.command("record")
def trial_record(
    folder: Folder,
    returns: Annotated[float | None, typer.Option("--return", help="The episode's return, the sum of rewards.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Another metric, as name=value; may be repeated.")] = None,
    csv: Annotated[Path | None, typer.Option(help="The episode's log, a CSV or Parquet file, for metrics not given.")] = None,
    episode: Annotated[
        int | None,
        typer.Option(help="Its number, as `trial next` said. With it, recording the same again changes nothing."),
    ] = None,
    regime: Annotated[str | None, typer.Option(help="The operating regime that it was in.")] = None,
    aborted: Annotated[str | None, typer.Option(help="Why the baseline took over within it, if it did.")] = None,
    seconds_to_baseline: Annotated[float | None, typer.Option(help="How long that took.")] = None,
    missing: Annotated[str | None, typer.Option(help="Why there is no result, if there is none.")] = None,
) -> None:
    """Record what came of the episode that `trial next` named."""
    with reporting("trial record"):
        from sb3_offline_ft.trial.trial import Trial

        opened, values = Trial.open(folder), _values(metric or [])
        if missing is not None:
            if returns is not None or values or csv is not None or aborted is not None:
                raise ValueError("Give either --missing or a result, not both.")
            done = opened.give_up(missing, episode)
        else:
            done = opened.record(
                returns, metrics=values, episode=episode, csv=csv, regime=regime, aborted=aborted,
                seconds_to_baseline=seconds_to_baseline,
            )  # fmt: skip
        echo(_recorded(done))
        if done.decision is not None:
            echo(_decided(done.decision))


@trial.command("status")
def trial_status(folder: Folder) -> None:
    """Show where the trial is."""
    with reporting("trial status"):
        from rich.table import Table

        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.trial.status import status_rows
        from sb3_offline_ft.trial.trial import Trial

        table = Table.grid(padding=(0, 2))
        for name, words in status_rows(Trial.open(folder)):
            table.add_row(f"[bold]{name}[/bold]", words.replace("[", r"\["))
        PlainConsole().print(table)


class _DecideCommand(TyperCommand):
    """Wrong arguments are an error, and no `not yet`, which has click's exit code for them."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except Exception as error:
            if getattr(error, "exit_code", 0) == EXIT_CODES["not yet"]:
                vars(error)["exit_code"] = UNDECIDED
            raise


@trial.command("decide", cls=_DecideCommand)
def trial_decide(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say go, no-go or not yet, with reasons; the exit code is 0, 1 or 2, and 3 after an error."""
    with reporting("trial decide", exit_code=UNDECIDED):
        from sb3_offline_ft.trial.trial import Trial

        decision = Trial.open(folder).decide()
        content = {"decision": decision.decision, "reasons": decision.reasons, "more_episodes": decision.more_episodes}
        echo(json.dumps(content) if as_json else _decided(decision))
    raise typer.Exit(EXIT_CODES[decision.decision])


@trial.command("amend")
def trial_amend(folder: Folder, reason: Annotated[str, typer.Option(help="Why, for whoever reads the report.")]) -> None:
    """Let an edited trial.yml be in force from now on, after the first episode. It stays marked as such."""
    with reporting("trial amend"):
        from sb3_offline_ft.trial.trial import Trial

        for text in Trial.open(folder).amend(reason):
            echo(f"Amended: {text}")


@trial.command("tick")
def trial_tick(
    folder: Folder,
    item: Annotated[str, typer.Argument(help="Name of a line of checklist.md.")],
    by: Annotated[str, typer.Option(help="Who ticks it.")],
) -> None:
    """Tick a line of the checklist."""
    with reporting("trial tick"):
        from sb3_offline_ft.trial.trial import Trial

        Trial.open(folder).tick(item, by)
        echo(f"Ticked: {item}, by {by}")


def _drilled(drill: Mapping[str, Any]) -> str:
    if not drill["baseline_took_over"]:
        return f"Episode {drill['episode']}: the baseline did NOT take over in step {drill['step']}."
    milliseconds = 1000 * drill["seconds_to_baseline"]
    return f"Episode {drill['episode']}: the baseline took over in step {drill['step']}, after {milliseconds:.3g} ms."


def _values(texts: list[str]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            equals, value = "", 0.0
        if not equals:
            raise ValueError(f"--metric must be a name and a number, such as energy=4.1, found {text!r}.")
        if name.strip() in values:
            raise ValueError(f"--metric {name.strip()} is given twice.")
        values[name.strip()] = value
    return values


def _recorded(done: "Recorded") -> str:
    record = done.record
    words = ", ".join(f"{name} {value:g}" for name, value in record.metrics.items() if value is not None)
    kind = f", {record.excluded}" if record.excluded is not None else ""
    what = record.excluded if record.is_missing else f"{words or 'no values'}{kind}"
    said = "recorded" if done.is_new else "the same was recorded before, nothing was changed"
    return f"Episode {record.episode} ({record.stage}, {record.arm}): {what}; {said}."


def _decided(decision: "Decision") -> str:
    more = f"\nAbout {decision.more_episodes} more episodes would tell." if decision.more_episodes else ""
    return "\n- ".join([decision.decision.upper(), *decision.reasons]) + more
