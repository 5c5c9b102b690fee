"""The ``sb3-offline-ft study`` commands. Heavy modules are imported by the commands that need them."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sb3_offline_ft.algorithms import ALGORITHMS
from sb3_offline_ft.common.console import echo
from sb3_offline_ft.common.reporting import reporting

study = typer.Typer(help="Compare ways of finetuning on your data, with certainty stated.", no_args_is_help=True)

TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Read .pkl replay buffers: that runs code which the file holds.")
]
Folder = Annotated[Path, typer.Argument(help="The study's folder.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="A journal file ending in .log, or the URL of a database, such as postgresql://user:password@host/database, that "
        "machines share; study.log in the study's folder if omitted."
    ),
]


@study.command("init")
def study_init(
    folder: Annotated[Path, typer.Argument(help="Where the study shall be.")],
    env: Annotated[str, typer.Option(help="Gymnasium id of the environment; module:id imports the module first.")],
    dataset: Annotated[
        list[str], typer.Option(help="A dataset spec, perhaps as label=spec; may be repeated: methods are compared on each.")
    ],
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 5,
    interactions: Annotated[int, typer.Option(help="Environment steps of each run.")] = 30_000,
    method: Annotated[
        list[str] | None, typer.Option(help="A method, or the name of an algorithm; may be repeated; the paper's if omitted.")
    ] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write study.yml, which says what is compared, to be edited."""
    with reporting("study init"):
        from sb3_offline_ft.datasets.specs import TRUST
        from sb3_offline_ft.study.design.init import init_study, next_steps

        file = init_study(
            folder,
            env=env,
            datasets=dataset,
            seeds=seeds,
            interactions=interactions,
            methods=method,
            trust_pickle=trust_pickle,
        )
        echo(next_steps(file, trust_pickle or any(TRUST in spec for spec in dataset)))


@study.command("run")
def study_run(
    folder: Folder,
    workers: Annotated[int, typer.Option("--workers", "-j", min=1, help="Processes that run cells.")] = 1,
    storage: Storage = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try cells again that have failed.")] = False,
    device: Annotated[str, typer.Option(help="Torch device of the learners.")] = "cpu",
    only: Annotated[str, typer.Option(help="Run only cells with such names, such as 'medium/td3c/*'.")] = "*",
    trust_pickle: TrustPickle = False,
) -> None:
    """Run all that has not run yet, here and on any number of machines at once. Ctrl-C keeps what is done."""
    shown = shlex.quote(str(folder))
    again = f"interrupted: what is done is kept, the rest waits. `sb3-offline-ft study run {shown}` goes on"
    with reporting("study run", again):
        from sb3_offline_ft.study.engine.queue import CellState
        from sb3_offline_ft.study.engine.run import run_study

        counts = run_study(
            folder,
            workers=workers,
            storage=storage,
            threads=threads,
            retry_failed=retry_failed,
            device=device,
            only=only,
            trust_pickle=trust_pickle,
        )
        failed = counts[CellState.FAILED]
        if failed:
            cells, them = ("cell", "it") if failed == 1 else ("cells", "them")
            echo(
                f"{failed} {cells} failed: `sb3-offline-ft study status {shown} --errors` shows why, "
                f"`sb3-offline-ft study run {shown} --retry-failed` tries {them} again.",
                err=True,
            )
            raise typer.Exit(1)


@study.command("status")
def study_status(
    folder: Folder,
    storage: Storage = None,
    errors: Annotated[bool, typer.Option("--errors", help="Show the whole tracebacks of failed cells.")] = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Show what is done, running, waiting and failed."""
    with reporting("study status"):
        from sb3_offline_ft.study.engine.status import show_status

        show_status(folder, storage, errors, trust_pickle=trust_pickle)


@study.command("report")
def study_report(
    folder: Folder,
    storage: Storage = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; report.html in the study's folder if omitted. All else is beside it."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="What to write: html, figures, csv or md (tables); may be repeated; all if omitted."),
    ] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write a page with verdict, figures and tables on what has finished so far."""
    with reporting("study report"):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.study.report.page import FIGURES, FORMATS, write_report

        with PlainConsole(stderr=True).status("") as status:
            files = write_report(
                folder,
                output,
                storage=storage,
                formats=formats or FORMATS,
                on_progress=lambda what: status.update(what),
                trust_pickle=trust_pickle,
            )
        figures = [file for file in files if file.parent.name == FIGURES]
        for file in files:
            if file not in figures:
                echo(f"Report: {file}")
        if figures:
            echo(f"Report: {len(figures)} figures in {figures[0].parent}")


@study.command("tune")
def study_tune(
    folder: Folder,
    algo: Annotated[str, typer.Option(help=f"Algorithm whose finetuning is tuned: {', '.join(ALGORITHMS)}.")] = "td3c",
    method: Annotated[
        str | None,
        typer.Option(help="The study's method to tune; the first with the algorithm and no guard or champion if omitted."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Label of the dataset; the study's first if omitted.")] = None,
    n_trials: Annotated[int, typer.Option(help="Trials in all, those of earlier calls included.")] = 30,
    seeds: Annotated[int, typer.Option(help="Seeds that each trial is averaged over, at least 2.")] = 2,
    same_seeds: Annotated[
        bool, typer.Option("--same-seeds", help="Tune on the study's own first seeds, on which the tuned then looks too good.")
    ] = False,
    dip_penalty: Annotated[float, typer.Option(help="Weight of the dip in a trial's value.")] = 1.0,
    prune_dip: Annotated[
        float, typer.Option(help="Depth of a dip beyond which a trial is given up at once; inf for never.")
    ] = 0.5,
    fix: Annotated[list[str] | None, typer.Option(help="A hyperparameter that is not tuned; may be repeated.")] = None,
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="median, hyperband or none.")] = "median",
    startup_trials: Annotated[
        int, typer.Option(help="Random trials before the sampler learns, and finished ones before the pruner does.")
    ] = 10,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no other trial is begun.")] = None,
    workers: Annotated[int, typer.Option("--workers", "-j", min=1, help="Processes that run trials.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(help="As for `study run`; tune.log in the study's folder if omitted."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    device: Annotated[str, typer.Option(help="Torch device of the learners.")] = "cpu",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try trials again that have failed.")] = False,
    confirm: Annotated[
        int, typer.Option(help="Fresh seeds with which the best and the preset are run again; fewer than 6 can show nothing.")
    ] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The configuration for rl_zoo3, a .yml file.")] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Tune the finetuning: return at the end less the dip, on the study's data. Ctrl-C keeps what is done."""
    again = "interrupted: what is done is kept, the rest waits. The same command goes on"
    with reporting("study tune", again):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.study.tuning.plan import TuningSettings
        from sb3_offline_ft.study.tuning.run import tune

        settings = TuningSettings(
            folder.absolute(), storage, threads, device, algo=algo, method=method, dataset=dataset, n_trials=n_trials,
            n_seeds=seeds, same_seeds=same_seeds, dip_penalty=dip_penalty, prune_dip=prune_dip, sampler=sampler, pruner=pruner,
            startup_trials=startup_trials, fixed=tuple(fix or ()), trust_pickle=trust_pickle,
        )  # fmt: skip
        done = tune(
            settings, workers=workers, timeout=timeout, output=output, confirm=confirm, retry_failed=retry_failed,
            console=PlainConsole(),
        )  # fmt: skip
        for file in done.files:
            echo(f"Written: {file}")
