"""The summary and the picture of one finetuning run."""

import csv
import json
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.io import naming_damage, read_npz
from sb3_offline_ft.common.reading import open_file, parse_json, read_member
from sb3_offline_ft.datasets import OfflineDataset, load_dataset, without_trust
from sb3_offline_ft.deployment.history import FIGURE as CONTEST_FIGURE
from sb3_offline_ft.deployment.history import History
from sb3_offline_ft.evaluation.contest_summary import contest_rows, draw_contest, show_contest
from sb3_offline_ft.evaluation.served import ActedEpisodes, acted_episodes, served_metrics

EVALUATIONS = "evaluations.npz"
FIGURE = "run.png"


@dataclass(frozen=True)
class RunSummary:
    """
    What happened in a run of rl-zoo3.

    :param folder: The run's folder
    :param model_file: The model that was saved last
    :param algorithm: Name of the run's algorithm
    :param environment: Name of the environment
    :param offline_steps: Gradient steps of pretraining
    :param warmup_steps: Environment steps with the frozen policy
    :param timesteps: Environment steps at each evaluation, shape ``(evaluations,)``
    :param returns: Undiscounted return of each evaluation episode, shape ``(evaluations, episodes)``
    :param lengths: Length of each evaluation episode, shape ``(evaluations, episodes)``; None if they were not recorded
    :param interactions: Environment steps of the training
    :param training_timesteps: Environment steps at the end of each training episode
    :param training_returns: Undiscounted return of each training episode
    :param dataset: The data, None if the run had none, or if it cannot be read any more or is another one now
    :param contest: What a ``ChampionChallenger`` did, None if the run had none
    """

    folder: Path
    model_file: Path
    algorithm: str
    environment: str
    offline_steps: int
    warmup_steps: int
    timesteps: npt.NDArray[np.int64]
    returns: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64] | None
    interactions: int
    training_timesteps: npt.NDArray[np.int64]
    training_returns: npt.NDArray[np.float64]
    dataset: OfflineDataset | None
    contest: History | None = None

    @property
    def mean_returns(self) -> npt.NDArray[np.float64]:
        """Mean return at each evaluation."""
        return np.asarray(self.returns.mean(axis=1))

    @property
    def is_frozen(self) -> npt.NDArray[np.bool_]:
        """Which evaluations saw the pretrained policy: those up to the end of the warm-up."""
        return np.asarray(self.timesteps <= self.warmup_steps)

    @property
    def was_pretrained(self) -> bool:
        """Whether the pretrained policy was evaluated."""
        return bool(self.is_frozen.any())

    @property
    def initial_return(self) -> float:
        """Mean return of the pretrained policy, over all evaluations of it."""
        return float(self.mean_returns[self.is_frozen].mean()) if self.was_pretrained else float("nan")

    @property
    def finetuning_returns(self) -> npt.NDArray[np.float64]:
        """Mean returns at the evaluations after the warm-up."""
        return np.asarray(self.mean_returns[~self.is_frozen])

    @property
    def random_return(self) -> float | None:
        """Mean return of a random policy, if known."""
        scores = None if self.dataset is None else self.dataset.reference_scores
        return None if scores is None else scores.random

    @property
    def dip_depth(self) -> float | None:
        """``(J0 - lowest J) / |J0 - J_random|``: 0 is no dip, 1 is as bad as a random policy; None if that is not known."""
        if self._no_dip_since is not None or self.random_return is None:
            return None
        return float((self.initial_return - self.finetuning_returns.min()) / abs(self.initial_return - self.random_return))

    @property
    def _no_dip_since(self) -> str | None:
        if not self.was_pretrained:
            return "the pretrained policy was not evaluated" if self.offline_steps > 0 else "nothing was pretrained"
        if self.finetuning_returns.size == 0:
            return "there is no evaluation after the warm-up"
        if self.random_return is None:
            return "the mean return of a random policy is not known"
        return "the pretrained policy is as good as a random one" if self.initial_return == self.random_return else None

    @property
    def acted(self) -> ActedEpisodes | None:
        """Training episodes, and evaluations, by which a run chooses its best model; None if they are not all known."""
        if self._not_served_since is not None:
            return None
        assert self.lengths is not None
        return acted_episodes(
            self.training_timesteps,
            self.training_returns,
            self.warmup_steps if self.offline_steps > 0 else -1,
            interactions=self.interactions,
            evaluation_timesteps=self.timesteps,
            evaluation_returns=self.returns,
            evaluation_lengths=self.lengths,
        )

    @property
    def _not_served_since(self) -> str | None:
        if self.lengths is None:
            return f"{EVALUATIONS} has no lengths of these episodes"
        if self.training_timesteps.size == 0:
            return "no training episode was recorded by a Monitor"
        is_finite = np.isfinite(self.returns).all() and np.isfinite(self.training_returns).all()
        return None if is_finite else "there are returns that are not finite"

    def table(self) -> Table:
        """
        :return: The summary as a table for the terminal
        """
        table = Table(title=f"{self.algorithm} on {self.environment}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        # Each part of the summary is a method that gives rows
        for part in (self._data_rows, self.contest_rows, self.served_rows, self.evaluation_rows, self._file_rows):
            for name, text in part():
                table.add_row(name, text)
        return table

    def _data_rows(self) -> Iterator[tuple[str, str]]:
        if self.dataset is not None:
            episodes = f"{len(self.dataset):,} transitions in {self.dataset.n_episodes:,} episodes"
            yield "data", f"{self.dataset.spec or self.dataset.name}: {episodes}"
            yield "mean return of the data", f"{self.dataset.episode_returns.mean():.1f}"

    def contest_rows(self) -> Iterator[tuple[str, str]]:
        """What champion and challengers did."""
        return contest_rows(self.contest)

    def served_rows(self) -> Iterator[tuple[str, str]]:
        """What everything that acted earned."""
        acted = self.acted
        if acted is None:
            yield "served return", f"not known: {self._not_served_since}"
            return
        served, n = served_metrics(acted, self.random_return), f"{acted.interactions:,} interactions"
        known = {
            "in all": served.mean_return,
            "in the warm-up": served.warmup_return,
            "in the last third": served.last_third_return,
        }
        means = [f"{value:.1f} {when}" for when, value in known.items() if value is not None]
        yield "served return", f"{', '.join(means)}  (of {n}, evaluations included)"
        at = [f"{value:.1f} at {steps:,}" for steps, value in served.return_at.items() if value is not None]
        if at:
            yield "", ", ".join(at)
        losses = served.losses
        if losses.shortfall is not None and served.initial_return is not None:
            size = f"{losses.largest_shortfall:.1f} at most, {losses.shortfall:.1f} at the end"
            error = served.initial_standard_error
            level = f"{served.initial_return:.1f}" + ("" if error is None else f" ± {error:.1f}")
            yield "served shortfall", f"{size}  (1: all is lost in one of {losses.episodes} episodes; against {level})"
        if losses.collapsed_episodes is not None:
            counts = f"{losses.collapsed_episodes} of {losses.episodes} episodes, {losses.longest_collapse} in a row"
            yield "served collapses", counts

    def evaluation_rows(self) -> Iterator[tuple[str, str]]:
        """What evaluations say: the pretrained policy, dips, the end."""
        n_episodes = int(self.is_frozen.sum()) * self.returns.shape[1]
        level = f"{self.initial_return:.1f}  ({self.offline_steps:,} steps, {n_episodes} episodes)"
        if not self.was_pretrained:
            level = f"not evaluated  ({self.offline_steps:,} steps)" if self.offline_steps > 0 else "not pretrained"
        yield "J after pretraining", level
        finetuning, steps = self.finetuning_returns, self.timesteps[~self.is_frozen]
        if finetuning.size:
            for name, index in (("lowest", finetuning.argmin()), ("best", finetuning.argmax()), ("last", -1)):
                yield f"{name} J while finetuning", f"{finetuning[index]:.1f}  (after {steps[index]:,} interactions)"
        known = "" if self.dip_depth is None else f"{max(0.0, self.dip_depth):.2f}  (0: none, 1: down to a random policy)"
        yield "dip depth", known or f"not known: {self._no_dip_since}"

    def _file_rows(self) -> Iterator[tuple[str, str]]:
        best_model = self.folder / "best_model.zip"
        yield "model", str(self.model_file)
        if best_model.exists():
            yield "best model", str(best_model)

    def draw(self, path: Path) -> None:
        """
        Write the picture of the run: returns against interactions, with the level of the pretrained policy and of the data.

        :param path: The PNG file; written whole or not at all
        """
        from sb3_offline_ft.common.drawing import new_figure, save_png
        from sb3_offline_ft.pages.pictures import level, shade

        figure = new_figure((8, 4.2))
        axes, blue = figure.subplots(), "tab:blue"
        axes.plot(self.training_timesteps, self.training_returns, ".", color="0.75", markersize=3, label="training episodes")
        spread = np.repeat(self.timesteps, self.returns.shape[1])
        axes.plot(spread, self.returns.ravel(), ".", color=blue, alpha=0.35, markersize=4)
        axes.plot(self.timesteps, self.mean_returns, "o-", color=blue, linewidth=2, markersize=4, label="evaluations (mean)")
        level(axes, self.initial_return if self.was_pretrained else None, (4, 3), "pretrained policy")
        level(axes, None if self.dataset is None else self.dataset.episode_returns.mean(), (1, 2), "mean of the data")
        if self.warmup_steps > 0:
            shade(axes, min(self.warmup_steps, self.timesteps[-1]), "warm-up, policy frozen")
        axes.set(xlabel="interactions with the environment", ylabel="return", xlim=(0, None))
        title = f"{self.algorithm} on {self.environment} after {self.offline_steps:,} offline gradient steps"
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        save_png(figure, path)


def summarize_run(folder: Path, trust_pickle: bool = False) -> RunSummary:
    """
    Read what a run of ``python -m rl_zoo3.train`` left behind. Nothing is unpickled, but the dataset that the run names, and
    that only if you trust it; what the run's files say of trust counts for nothing.

    :param folder: The run's folder, such as ``logs/td3c/Hopper-v5_1``
    :param trust_pickle: Whether the run's dataset may be read if it is a pickle file: that runs code which it holds
    :return: The summary
    :raises FileNotFoundError: It is not such a folder, or the run was not evaluated
    :raises ValueError: A file of the run is damaged
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: pass a run's folder, such as logs/td3c/Hopper-v5_1.")
    evaluations = folder / EVALUATIONS
    if not evaluations.exists():
        raise FileNotFoundError(
            f"{folder} has no {EVALUATIONS}: expected the folder of a run with evaluations, made with `--eval-freq 1000`, say."
        )
    model_file = _model_file(folder)
    facts = _model_facts(model_file)
    timesteps, returns, lengths = _evaluations(evaluations)
    training_timesteps, training_returns = _training_episodes(folder)
    return RunSummary(
        folder=folder,
        model_file=model_file,
        algorithm=folder.parent.name,
        environment=folder.name.rpartition("_")[0] or folder.name,
        offline_steps=facts.get("offline_steps_done", 0),
        warmup_steps=facts.get("_warmup_end", 0),
        timesteps=timesteps,
        returns=returns,
        lengths=lengths,
        interactions=max(facts.get("num_timesteps", 0), *training_timesteps[-1:].tolist(), 0),
        training_timesteps=training_timesteps,
        training_returns=training_returns,
        dataset=_dataset(facts.get("dataset"), facts.get("dataset_fingerprint"), trust_pickle),
        contest=History.read(folder),
    )


def show_run(folder: Path, figure: Path | None = None, console: Console | None = None, trust_pickle: bool = False) -> None:
    """Print the summary of a run, and write its pictures, by default into the run's folder."""
    if not (folder / EVALUATIONS).exists() and (contest := History.read(folder)) is not None:
        show_contest(folder, contest, figure, console)
        return
    summary = summarize_run(folder, trust_pickle)
    figure = figure or folder / FIGURE
    summary.draw(figure)
    table = summary.table()
    table.add_row("picture", str(figure))
    if summary.contest is not None:
        draw_contest(folder, summary.contest, figure.with_name(CONTEST_FIGURE))
        table.add_row("", str(figure.with_name(CONTEST_FIGURE)))
    (console or PlainConsole()).print(table)


def _model_file(folder: Path) -> Path:
    own = sorted(path for path in folder.glob("*.zip") if not path.name.startswith(("best_model", "rl_model")))
    found = [*own, *sorted(folder.glob("best_model.zip")), *sorted(folder.glob("rl_model*.zip"))]
    if not found:
        raise FileNotFoundError(f"{folder} holds no model (*.zip): expected the folder of a run that has saved one.")
    return found[0]


def _model_facts(model_file: Path) -> dict[str, Any]:
    with naming_damage(model_file, "a model that an algorithm has saved"):
        with open_file(model_file) as stream, zipfile.ZipFile(stream) as file:
            facts: dict[str, Any] = parse_json(read_member(file, "data"), "data")
        for name in ("offline_steps_done", "_warmup_end", "num_timesteps"):
            if not isinstance(facts.get(name, 0), int):
                raise ValueError(f"{name} must be a whole number, found {facts[name]!r:.60}")
    return facts


def _evaluations(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64] | None]:
    arrays = read_npz(path, "timesteps", "results", "ep_lengths", optional=("ep_lengths",))
    timesteps, returns, lengths = arrays["timesteps"], arrays["results"], arrays.get("ep_lengths")
    with naming_damage(path, "the evaluations of a run"):
        if timesteps.dtype.kind not in "iu" or returns.dtype.kind not in "iuf":
            raise ValueError(f"timesteps and results must be numbers, found {timesteps.dtype} and {returns.dtype}")
        if returns.ndim != 2 or returns.size == 0 or timesteps.shape != returns.shape[:1]:
            raise ValueError(
                "timesteps must have the shape (evaluations,) and results (evaluations, episodes), found "
                f"{timesteps.shape} and {returns.shape}"
            )
        if lengths is not None and lengths.dtype.kind in "iu" and (lengths < 1).any():
            raise ValueError(f"episodes must have at least one step, found {lengths.min()}")
    if lengths is None or lengths.dtype.kind not in "iu" or lengths.shape != returns.shape:
        return timesteps.astype(np.int64), returns.astype(np.float64), None
    return timesteps.astype(np.int64), returns.astype(np.float64), lengths.astype(np.int64)


def _dataset(spec: Any, fingerprint: Any, trust_pickle: bool) -> OfflineDataset | None:
    if not isinstance(spec, str):
        return None
    try:
        dataset = load_dataset(without_trust(spec), download=False, trust_pickle=trust_pickle)
    except (OSError, ValueError) as error:
        warnings.warn(f"The dataset of the run cannot be read any more: {error}", stacklevel=3)
        return None
    if fingerprint not in (None, dataset.fingerprint):
        warnings.warn(
            f"The dataset {spec!r} is not what the run had: expected the fingerprint {str(fingerprint)[:12]}, found "
            f"{dataset.fingerprint[:12]}. It is left out of the summary; pass the run's data under its name to have it there.",
            stacklevel=3,
        )
        return None
    return dataset


def _training_episodes(folder: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    # SB3's own `load_results` needs pandas, which SB3 does not bring
    episodes: list[tuple[float, int, float]] = []
    for path in folder.glob("*monitor.csv"):
        with naming_damage(path, "a file of SB3's Monitor"), TextIOWrapper(open_file(path), newline="") as file:
            start = json.loads(file.readline().removeprefix("#"))["t_start"]
            found = [(start + float(row["t"]), int(row["l"]), float(row["r"])) for row in csv.DictReader(file)]
            if any(length < 1 for _, length, _ in found):
                raise ValueError("episodes must have at least one step")
            episodes += found
    episodes.sort()
    with naming_damage(folder, "a run whose monitor.csv says how many steps episodes had"):
        lengths = np.array([length for _, length, _ in episodes], dtype=np.int64)
    return np.cumsum(lengths), np.array([total for _, _, total in episodes], dtype=np.float64)
