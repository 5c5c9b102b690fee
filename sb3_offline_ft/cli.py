"""The ``sb3-offline-ft`` command. Heavy modules are imported by the commands that need them."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sb3_offline_ft.common.console import echo
from sb3_offline_ft.common.reporting import reporting
from sb3_offline_ft.study.commands import TrustPickle, study
from sb3_offline_ft.trial.commands import trial

app = typer.Typer(
    name="sb3-offline-ft",
    help="Offline pretraining and safe online finetuning for Stable-Baselines3.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
guard = typer.Typer(help="What the collapse guard of a run did.", no_args_is_help=True)
app.add_typer(guard, name="guard")
dataset = typer.Typer(help="Make datasets, look into them and report on them.", no_args_is_help=True)
app.add_typer(dataset, name="dataset")
app.add_typer(study, name="study")
app.add_typer(trial, name="trial")


SafeLoad = Annotated[
    bool, typer.Option("--safe-load", help="Unpickle nothing of a .zip: settings are read from plain JSON and text only.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from sb3_offline_ft import __version__

        echo(__version__)
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
    trust_pickle: TrustPickle = False,
) -> None:
    """Show what happened in a run of rl-zoo3, and draw it."""
    with reporting("summary"):
        from sb3_offline_ft.evaluation.run_summary import show_run

        show_run(run, figure, trust_pickle=trust_pickle)


@app.command()
def reproduce(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as logs/td3c/Hopper-v5_1.")],
    keep: Annotated[Path | None, typer.Option(help="Folder that gets the new run; it is not kept if omitted.")] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """
    Do a run of rl-zoo3 again, and say whether it came out the same to the bit.

    The exit code is 0 if it did, 1 if not, 2 if it could not be run. It runs the command that the folder names: do that only
    with folders that you trust.
    """
    with reporting("reproduce", "interrupted", exit_code=2):
        from sb3_offline_ft.zoo.reproduce import reproduce as run_again
        from sb3_offline_ft.zoo.reproduce import show_verdict

        verdict = run_again(run, keep, trust_pickle)
        show_verdict(verdict)
    if not verdict.is_same:
        raise typer.Exit(1)


@app.command()
def robustness(
    policy: Annotated[
        str, typer.Argument(help="The candidate: a .zip, a run's folder of rl-zoo3, a .onnx file or module:function.")
    ],
    env: Annotated[str, typer.Option(help="Gymnasium id of the environment; module:id imports the module first.")],
    baseline: Annotated[str | None, typer.Option(help="A policy to set beside it, such as the one that runs today.")] = None,
    perturb: Annotated[
        list[str] | None,
        typer.Option(help="What to change, with levels if you like: mass=0.8,1.2. May be repeated; all there is if omitted."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="What to measure beside the return: energy=info.energy:sum. May be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Episodes at each level.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed: the same one gives the same numbers.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes.")] = 1,
    random_return: Annotated[float | None, typer.Option(help="Mean return of a random policy; measured if omitted.")] = None,
    device: Annotated[str, typer.Option(help="Torch device of the policies.")] = "cpu",
    safe_load: SafeLoad = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that gets robustness.json, .png and .svg.")] = Path(),
) -> None:
    """Try a policy in an environment that is changed: other masses, delays, noise and more."""
    with reporting("robustness"):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.evaluation.robustness import InfoMetric, print_tables, run_robustness, write_files
        from sb3_offline_ft.evaluation.robustness.running import parse_grid

        result = run_robustness(
            {"candidate": policy} | ({} if baseline is None else {"baseline": baseline}),
            env,
            parse_grid(perturb) if perturb else None,
            metrics=[InfoMetric.parse(text) for text in metric or []],
            n_seeds=seeds,
            seed=seed,
            n_jobs=jobs,
            random_return=random_return,
            device=device,
            safe_load=safe_load,
            console=PlainConsole(stderr=True),
        )
        print_tables(result, PlainConsole())
        for path in write_files(result, output):
            echo(f"Written: {path}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="The model: a .zip that an algorithm saved, or a run's folder of rl-zoo3.")],
    policy: Annotated[Path, typer.Argument(help="The file to write: .onnx, .pt (TorchScript) or .pt2 (torch.export).")],
    data: Annotated[
        str | None, typer.Option(help="Dataset whose observations the file is tested on; the model's own if omitted.")
    ] = None,
    env: Annotated[
        str | None, typer.Option(help="Gymnasium id of the environment; that of the run or of the data if omitted.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="onnx, torchscript or torch-export; by default what the suffix says.")
    ] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write a policy as a file for a controller: raw observations in, actions in the environment's units out."""
    with reporting("export"):
        from sb3_offline_ft.export import export_policy

        made = export_policy(model, policy, data=data, env=env, format=format_, trust_pickle=trust_pickle)
        parity = made.contract["parity"]
        typer.echo(
            f"{made.file}: differs from {model} by at most {made.difference:.1e} of the range of the actions, on "
            f"{parity['observations']:,} observations of {parity['from']}"
        )
        typer.echo(f"Contract: {made.contract_file}")


@guard.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its collapse_events.jsonl.")],
    figure: Annotated[Path | None, typer.Option(help="Where to draw the picture (PNG); none is drawn if omitted.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every episode, signal and candidate too.")] = False,
) -> None:
    """Show the alarms, rollbacks and remedies of a run that a collapse guard watched."""
    with reporting("guard show"):
        from sb3_offline_ft.collapse.show import show_events

        show_events(run, figure, everything)


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a dataset with this id.")]
KeepIn = Annotated[
    Path | None, typer.Option(help="Folder that gets the dataset if it cannot be written to its place, as on a full disk.")
]


@dataset.command("show")
def dataset_show(
    spec: Annotated[str, typer.Argument(help="What to show: a Minari id, a folder, a file or bundled:<name>.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every dimension of observations and actions.")] = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Show what is in a dataset."""
    with reporting("dataset show"):
        from sb3_offline_ft.datasets.tools.show import show_dataset

        show_dataset(
            spec, as_json=as_json, every_dimension=everything, trust_pickle=trust_pickle, progress_bar=sys.stderr.isatty()
        )


@dataset.command("report")
def dataset_report(
    spec: Annotated[str, typer.Argument(help="What to report on: a Minari id, a folder, a file or bundled:<name>.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    compare: Annotated[list[str] | None, typer.Option(help="Another dataset to set beside it; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples that some measures use.")] = 0,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write one HTML page on a dataset: returns, coverage, and how diverse it is."""
    with reporting("dataset report"):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.datasets.tools.report import write_report

        specs = [spec, *(compare or [])]
        write_report(specs, output, seed=seed, console=PlainConsole(stderr=True), trust_pickle=trust_pickle)
        echo(f"Report: {output}")


@dataset.command("evaluate-policy")
def dataset_evaluate_policy(
    spec: Annotated[str, typer.Argument(help="The data: a Minari id, a folder, a file or bundled:<name>.")],
    agent: Annotated[str, typer.Option(help="The policy: an agent's .zip, or another controller.")],
    gamma: Annotated[float | None, typer.Option(help="Discount factor; the learner's own if omitted.")] = None,
    steps: Annotated[int, typer.Option("--steps", "-n", help="Gradient steps of the critics.")] = 2_500,
    bootstraps: Annotated[int, typer.Option(help="Replicates of the bootstrap over episodes.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed: the same one gives the same numbers.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    figure: Annotated[Path | None, typer.Option(help="Where to draw the picture (PNG); none is drawn if omitted.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_pickle: TrustPickle = False,
    safe_load: SafeLoad = False,
) -> None:
    """Estimate from data alone what a policy returns, and say whether the data can tell."""
    with reporting("dataset evaluate-policy"):
        import sb3_offline_ft.zoo
        from sb3_offline_ft.evaluation.off_policy.show import show_estimate

        sb3_offline_ft.zoo.register()
        show_estimate(
            spec,
            agent,
            gamma=gamma,
            gradient_steps=steps,
            n_bootstraps=bootstraps,
            seed=seed,
            device=device,
            figure=figure,
            as_json=as_json,
            trust_pickle=trust_pickle,
            safe_load=safe_load,
            progress_bar=sys.stderr.isatty(),
        )


@dataset.command("convert")
def dataset_convert(
    logs: Annotated[
        list[str],
        typer.Argument(
            help="CSV, TSV or Parquet files, folders of them, and whatever --dataset takes: .npz, .hdf5, .pkl, ids."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="Id of the new Minari dataset, such as my/robot/logs-v0.")],
    env: Annotated[str | None, typer.Option(help="Gymnasium id of the environment that the logs are from.")] = None,
    columns: Annotated[
        Path | None,
        typer.Option(help="YAML or TOML file that says which columns mean what, with the keys of the options below."),
    ] = None,
    observations: Annotated[str | None, typer.Option(help='Columns of the observations: "x,y,theta_*".')] = None,
    next_observations: Annotated[
        str | None, typer.Option(help="Columns of the next observations; from the following row if there are none.")
    ] = None,
    actions: Annotated[str | None, typer.Option(help="Columns of the actions.")] = None,
    reward: Annotated[str | None, typer.Option(help="Column of the reward.")] = None,
    terminated: Annotated[str | None, typer.Option(help="Column: the task ended (no time limits).")] = None,
    truncated: Annotated[str | None, typer.Option(help="Column: a time limit ended the episode.")] = None,
    done: Annotated[str | None, typer.Option(help="Column: the episode ended, one way or the other.")] = None,
    episode: Annotated[str | None, typer.Option(help="Column: number or name of the episode.")] = None,
    time: Annotated[str | None, typer.Option(help="Column that the rows of an episode are sorted by.")] = None,
    join_files: Annotated[bool, typer.Option("--join-files", help="An episode may go on in the next file.")] = False,
    clip_actions: Annotated[
        bool, typer.Option("--clip-actions", help="Clip actions that were recorded before clipping to their bounds.")
    ] = False,
    reward_function: Annotated[
        str | None,
        typer.Option(help="module:function that computes all rewards from arrays (observations, actions, next observations)."),
    ] = None,
    action_low: Annotated[str | None, typer.Option(help="Lower bounds of the actions: one number, or one for each.")] = None,
    action_high: Annotated[str | None, typer.Option(help="Upper bounds of the actions.")] = None,
    random_score: Annotated[float | None, typer.Option(help="Mean return of a random policy.")] = None,
    expert_score: Annotated[float | None, typer.Option(help="Mean return of an expert.")] = None,
    algorithm_name: Annotated[str | None, typer.Option(help="What the logs were recorded with.")] = None,
    author: Annotated[str | None, typer.Option(help="Who made the dataset.")] = None,
    description: Annotated[str | None, typer.Option(help="What the dataset is.")] = None,
    overwrite: Overwrite = False,
    keep_in: KeepIn = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Write logs as a Minari dataset, which `-params dataset:...` then names."""
    with reporting("dataset convert"):
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.common.functions import load_function
        from sb3_offline_ft.datasets.files.column_map import ColumnMap
        from sb3_offline_ft.datasets.tools.convert import convert_logs

        given = {
            "observations": observations, "next_observations": next_observations, "actions": actions, "reward": reward,
            "terminated": terminated, "truncated": truncated, "done": done, "episode": episode, "time": time,
        }  # fmt: skip
        chosen = ColumnMap.from_options(columns, given)
        if reward_function is not None and chosen is not None and chosen.reward is not None:
            raise ValueError("Give either a column of rewards or a reward function, not both.")
        made = convert_logs(
            logs,
            to,
            columns=chosen,
            env=env,
            action_low=_numbers(action_low, "--action-low"),
            action_high=_numbers(action_high, "--action-high"),
            join_files=join_files,
            clip_actions=clip_actions,
            reward_function=None if reward_function is None else load_function(reward_function, "reward function"),
            random_score=random_score,
            expert_score=expert_score,
            facts={"algorithm_name": algorithm_name, "author": author, "description": description},
            overwrite=overwrite,
            keep_in=keep_in,
            console=PlainConsole(stderr=True),
            trust_pickle=trust_pickle,
        )
        for text in made.notes:
            echo(f"Note: {text}", err=True)
        echo(f"{to}: {_counted(made.transitions, made.episodes)}, in {made.folder}")


@dataset.command("collect")
def dataset_collect(
    id_: Annotated[str, typer.Option("--id", help="Id of the new Minari dataset, such as my/hopper/medium-v0.")],
    env: Annotated[str, typer.Option(help="Gymnasium id of the environment; module:id imports the module first.")],
    algo: Annotated[str | None, typer.Option(help="The agent's algorithm, as rl-zoo3 names it.")] = None,
    folder: Annotated[Path, typer.Option("--folder", "-f", help="rl-zoo3's folder with trained agents.")] = Path("logs"),
    exp_id: Annotated[int, typer.Option(help="rl-zoo3's number of the run; 0: the latest, -1: a folder without runs.")] = 0,
    load_best: Annotated[bool, typer.Option("--load-best", help="The run's best model instead of the last one.")] = False,
    agent: Annotated[Path | None, typer.Option(help="An agent's .zip, instead of one in --folder.")] = None,
    vecnormalize: Annotated[Path | None, typer.Option(help="The vecnormalize.pkl of an --agent that needs one.")] = None,
    random: Annotated[bool, typer.Option("--random", help="A uniformly random policy instead of an agent.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", "-n", help="Steps to record; the last episode is completed.")] = None,
    n_episodes: Annotated[int | None, typer.Option(help="Episodes to record, instead of --steps.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic/--stochastic", help="Take a stochastic policy's mean, or draw from it.")
    ] = False,
    noise_std: Annotated[
        float, typer.Option(help="Standard deviation of Gaussian noise on the actions, where their bounds are -1 and 1.")
    ] = 0.0,
    epsilon_random: Annotated[float, typer.Option(help="Probability of a uniformly random action.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed: the same one gives the same data.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device of the agent.")] = "auto",
    author: Annotated[str | None, typer.Option(help="Who made the dataset.")] = None,
    description: Annotated[str | None, typer.Option(help="What the dataset is; by default how it was recorded.")] = None,
    overwrite: Overwrite = False,
    keep_in: KeepIn = None,
) -> None:
    """Record an agent of rl-zoo3 or SB3, or random actions, as a Minari dataset. Ctrl-C keeps the complete episodes."""
    with reporting("dataset collect"):
        import sb3_offline_ft.zoo
        from sb3_offline_ft.common.console import PlainConsole
        from sb3_offline_ft.datasets.tools.agents import RANDOM
        from sb3_offline_ft.datasets.tools.collect import Behaviour, collect_dataset

        sb3_offline_ft.zoo.register()
        if random and algo not in (None, RANDOM):
            raise ValueError(f"Give either --random or --algo {algo}.")
        made = collect_dataset(
            id_,
            env,
            algorithm=RANDOM if random else algo,
            log_folder=folder,
            agent=agent,
            exp_id=exp_id,
            load_best=load_best,
            vecnormalize=vecnormalize,
            n_steps=steps,
            n_episodes=n_episodes,
            behaviour=Behaviour(deterministic, noise_std, epsilon_random),
            seed=seed,
            device=device,
            facts={"author": author, "description": description},
            command=f"sb3-offline-ft {shlex.join(sys.argv[1:])}" if "collect" in sys.argv else None,
            overwrite=overwrite,
            keep_in=keep_in,
            console=PlainConsole(stderr=True),
        )
    if made.folder is not None:
        words = f"{_counted(made.transitions, len(made.returns))}, mean return {made.returns.mean():.1f}"
        echo(f"{id_}: {words}, in {made.folder}")
    if made.interrupted:
        kept = "the complete episodes were kept" if made.folder is not None else "no episode was complete, nothing was written"
        echo(f"sb3-offline-ft dataset collect: interrupted, {kept}", err=True)
        raise typer.Exit(128 + made.ended_by)


def _counted(transitions: int, episodes: int) -> str:
    plural = ["" if number == 1 else "s" for number in (transitions, episodes)]
    return f"{transitions:,} transition{plural[0]} in {episodes:,} episode{plural[1]}"


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be a number, or several with commas between, found {text!r}.") from None


def main() -> None:
    """Run the command line."""
    app()
