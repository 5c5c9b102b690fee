"""Studies whose results are known, written as ``study run`` writes them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.folder import CellResult, run_folder, write_result

WARMUP, EPISODES = 2_000, 10
J_RANDOM, J0 = 17.0, 1100.0
STUDY: dict[str, Any] = {
    "name": "made up",
    "env": "Hopper-v5",
    "datasets": {"medium": "bundled:hopper-medium?episodes=20", "best": "bundled:hopper-medium?top_fraction=0.01"},
    "pretraining": {"algorithm": "td3bc"},
    "seeds": 5,
    "interactions": 30_000,
    "evaluation": {"every": 1_000, "episodes": EPISODES},
    "random_return": J_RANDOM,
    "methods": {
        "scratch": {"label": "TD3 from scratch", "algorithm": "td3", "start": "scratch"},
        "offline": {"label": "offline policy as it is", "frozen": True},
        "td3bc": {"label": "TD3BC kept", "algorithm": "td3bc"},
        "td3": {"label": "plain TD3", "algorithm": "td3"},
        "td3c": {"label": "TD3C", "algorithm": "td3c"},
        "td3c-guard": {"label": "TD3C with guard", "algorithm": "td3c", "guard": True},
    },
    "reference_method": "td3c",
}
END = {"scratch": 600.0, "offline": J0, "td3bc": 1250.0, "td3": 1700.0, "td3c": 2400.0, "td3c-guard": 2700.0}
"""The level that each method ends at."""
COLLAPSED_TO = 30.0

Curve = Callable[[Cell, np.ndarray], np.ndarray]


def level(cell: Cell, share: np.ndarray) -> np.ndarray:
    """
    Mean returns of a run: plain TD3 falls to :data:`COLLAPSED_TO` and comes back, all others rise or stay.

    :param cell: The cell
    :param share: How much of the finetuning is done, from 0 to 1; negative in the warm-up
    """
    name, start = cell.method.base, J0 + 20.0 * cell.seed
    if name == "scratch":
        return J_RANDOM + (END[name] - J_RANDOM) * np.clip(share, 0, 1)
    end = END[name] + 60.0 * (cell.seed - 2)
    curve = start + (end - start) * np.clip(2 * share, 0, 1) if name != "offline" else np.full(share.shape, start)
    if name == "td3":
        curve = np.where((share > 0) & (share < 0.15), COLLAPSED_TO, curve)
    return curve


def result_of(protocol: Protocol, cell: Cell, curve: Curve = level, **facts: Any) -> CellResult:
    """
    The made-up result of a cell.

    :param protocol: The study's protocol
    :param cell: The cell
    :param curve: Mean returns of the run
    :param facts: What its manifest says besides, or otherwise
    """
    rng = np.random.default_rng([cell.seed, len(cell.name), sum(map(ord, cell.name))])
    method, every = cell.method, protocol.evaluation.every
    timesteps = np.arange(0, protocol.interactions + 1, every)
    warmup = min(WARMUP, protocol.interactions // 4)
    frozen_until = -1 if not method.pretrained else protocol.interactions if method.frozen else warmup
    share = (timesteps - max(0, min(warmup, frozen_until))) / (protocol.interactions - warmup)
    means = curve(cell, np.where(timesteps <= frozen_until, np.minimum(share, 0), share))
    noise = rng.normal(0, 0.04 * np.abs(means)[:, None], (len(timesteps), EPISODES))
    training = np.arange(200, protocol.interactions + 1, 200)
    started = np.interp(training, timesteps, means)
    events = []
    if method.guard is not None:
        events = [{"event": "start", "timestep": 0, "episode": 0, "algorithm": "TD3C", "detector": "CusumDetector"}]
        events += [
            {"event": "alarm", "timestep": 9_000, "episode": 12},
            {"event": "rollback", "timestep": 9_000, "episode": 12},
        ]
        events += [{"event": "promotion", "timestep": step, "episode": step // 300} for step in (14_000, 20_000)]
        phases = np.where(training <= frozen_until, "baseline", "monitoring").tolist()
        events += [
            {"event": "episode", "timestep": step, "phase": phase}
            for step, phase in zip(training.tolist(), phases, strict=True)
        ]
    start = f"{cell.dataset}-{cell.seed}-{dict(method.pretraining_hyperparams)}"
    done = 0 if method.frozen else protocol.interactions
    manifest = {
        "name": cell.name,
        "key": protocol.cell_key(cell),
        "cell": protocol.described(cell),
        "label": method.label,
        "frozen_until": frozen_until,
        "random_return": protocol.random_return,
        "dataset": None if cell.dataset is None else {
            "label": cell.dataset, "spec": protocol.datasets[cell.dataset],
            "fingerprint": protocol.data_facts(cell.dataset)["fingerprint"],
            "transitions": len(protocol.dataset(cell.dataset)), "episodes": protocol.dataset(cell.dataset).n_episodes,
            "mean_return": float(np.mean(protocol.dataset(cell.dataset).episode_returns)),
            "reference_scores": protocol.data_facts(cell.dataset)["reference_scores"],
        },
        "pretrained": {"recipe": start, "weights_sha256": start} if method.pretrained else None,
        "hyperparams": {"gradient_steps": 1},
        "changed_hyperparams": {},
        "frozen": method.frozen,
        "interactions": done,
        "updates": {
            "offline": 50_000 if method.pretrained else 0, "online": max(0, done - max(0, frozen_until)), "undone": 0
        },
        "replay_buffer": {
            "capacity": 1_000_000, "rows": done, "distinct_rows": done, "offline_rows": 20_000,
            "batch": {"rows": 256, "distinct_rows": 254, "offline_rows": 128},
        },
        "learner_evaluation_steps": 250_000 + 1_000 * cell.seed if method.learns_from_evaluations else 0,
        "guarded": bool(events),
        "seconds": {"preparation": 100.0, "finetuning": 600.0 + cell.seed},
        "started": f"2026-01-0{1 + cell.seed}T10:00:00+00:00",
        "versions": {"sb3-offline-ft": "0.1.0", "torch": "2.9.0+cpu", "numpy": "2.3.0"},
        "python": "3.12.1",
        "platform": "Linux",
        "cpu": "A kind of processor",
        "cpu_model": "6/143/8",
        "device": "cpu",
        "gpu": None,
        "code": "c0de" * 16,
    } | facts  # fmt: skip
    lengths = np.full(noise.shape, 500)
    own = own_evaluations(timesteps, means, 250_000 + 1_000 * cell.seed) if method.learns_from_evaluations else {}
    return CellResult(timesteps, means[:, None] + noise, lengths, training, started, events, manifest, **own)


def own_evaluations(timesteps: np.ndarray, means: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    """Evaluations that a learner learns from, which take so many steps and always return the mean."""
    lengths = np.full((len(timesteps), EPISODES), steps // (len(timesteps) * EPISODES))
    lengths[0, 0] += steps - lengths.sum()
    returns = np.repeat(means[:, None], EPISODES, axis=1)
    return {"own_timesteps": timesteps, "own_returns": returns, "own_lengths": lengths}


def write_study(folder: Path, changes: Mapping[str, Any] | None = None) -> Protocol:
    """
    :param folder: Where the study shall be
    :param changes: What is otherwise than in :data:`STUDY`
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yml").write_text(yaml.safe_dump(STUDY | dict(changes or {}), sort_keys=False))
    return Protocol.load(folder)


def write_run(protocol: Protocol, cell: Cell, result: CellResult) -> None:
    """Write a result into the cell's run folder, in place of what is there."""
    write_result(run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, result.manifest["key"]), result)


def write_runs(protocol: Protocol, cells: Iterable[Cell] | None = None, curve: Curve = level, **facts: Any) -> None:
    """
    :param protocol: The study's protocol
    :param cells: Cells that have finished, by default all
    :param curve: Mean returns of runs
    :param facts: What all manifests say besides, or otherwise
    """
    for cell in protocol.cells() if cells is None else cells:
        write_run(protocol, cell, result_of(protocol, cell, curve, **facts))
