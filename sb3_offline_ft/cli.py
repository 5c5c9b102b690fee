"""The ``sb3-offline-ft`` command. Heavy modules are imported by the commands that need them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="sb3-offline-ft",
    help="Offline pretraining and safe online finetuning for Stable-Baselines3.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
guard = typer.Typer(help="What the collapse guard of a run did.", no_args_is_help=True)
app.add_typer(guard, name="guard")


def _print_version(wanted: bool) -> None:
    if wanted:
        from sb3_offline_ft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def doctor() -> None:
    """Check this installation and say how to repair what is broken; the exit code is 1 if something needed is."""
    from sb3_offline_ft.doctor import diagnose, render

    checks = diagnose()
    render(checks)
    if any(check.is_broken for check in checks):
        raise typer.Exit(1)


@app.command()
def summary(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as logs/td3c/Hopper-v5_1.")],
    figure: Annotated[
        Path | None, typer.Option(help="Where the picture shall be; run.png in the run's folder if omitted.")
    ] = None,
) -> None:
    """Show what happened in a run of rl-zoo3, and draw it."""
    from sb3_offline_ft.evaluation.run_summary import show_run

    try:
        show_run(run, figure)
    except (OSError, ValueError) as error:
        typer.echo(f"sb3-offline-ft summary: {error}", err=True)
        raise typer.Exit(1) from None


@guard.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its collapse_events.jsonl.")],
    figure: Annotated[Path | None, typer.Option(help="Where to draw the picture (PNG); none is drawn if omitted.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every episode, signal and candidate too.")] = False,
) -> None:
    """Show the alarms, rollbacks and remedies of a run that a collapse guard watched."""
    from sb3_offline_ft.collapse.show import show_events

    try:
        show_events(run, figure, everything)
    except (OSError, ValueError) as error:
        typer.echo(f"sb3-offline-ft guard show: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    app()
