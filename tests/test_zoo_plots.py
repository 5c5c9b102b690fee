"""rl_zoo3's plots of our runs."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import RunPython
from tests.zoo_runs import UNGUARDED, run

REASON = "needs the plots extra: pip install 'sb3-offline-ft[plots]'"


def test_rl_zoo3_plots_our_runs(run_python: RunPython, tmp_path: Path) -> None:
    pytest.importorskip("seaborn", reason=REASON)
    pytest.importorskip("rliable", reason=REASON)
    folder = tmp_path / "work"
    # With one run of an algorithm rl_zoo3 draws no bars, whatever the algorithm
    for algo in ("td3bc", "td3c"):
        for seed in (1, 2):
            run(folder, algo, UNGUARDED | {"warmup_steps": 40}, seed=seed, n_timesteps=220, eval_freq=110, n_eval_episodes=2)

    merge = ["-a", "td3bc", "td3c", "-e", "Pendulum-v1", "-f", "logs", "-o", "results", "-print", "--no-display"]
    merged = run_python("-m", "rl_zoo3.plots.all_plots", *merge, MPLBACKEND="agg")
    assert merged.returncode == 0, merged.stderr
    assert "Pendulum-v1-TD3C-logs: 2" in merged.stdout
    results = pickle.loads((folder / "results.pkl").read_bytes())["Pendulum-v1"]
    # The first evaluation is that of the pretrained policy
    for algo in ("TD3BC-logs", "TD3C-logs"):
        np.testing.assert_array_equal(results[algo]["timesteps"], [0, 110, 220])
        assert results[algo]["mean_per_eval"].shape == (3, 2)
        assert np.isfinite(results[algo]["mean"]).all()

    draw = ["-i", "results", "-o", "curve.png", "--format", "png", "-b", "--rliable", "--versus", "--iqm"]
    drawn = run_python("-m", "rl_zoo3.plots.plot_from_file", *draw, MPLBACKEND="agg")
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "curve.png").stat().st_size > 0

    train = run_python(
        "-m", "rl_zoo3.plots.plot_train", "-a", "td3c", "-e", "Pendulum", "-f", "logs", "-w", "1", MPLBACKEND="agg"
    )
    assert train.returncode == 0, train.stderr
