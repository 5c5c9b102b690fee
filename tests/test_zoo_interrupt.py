"""Ctrl-C in rl-zoo3 while pretraining: the model is saved, and `-i` goes on where it stopped."""

import json
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

from tests.conftest import Installation

TRAIN = [
    "-m",
    "rl_zoo3.train",
    "--algo",
    "td3bc",
    "--env",
    "Pendulum-v1",
    "-P",
    "-n",
    "300",
    "--eval-freq",
    "-1",
    "--seed",
    "1",
]


def facts(agent: Path) -> dict[str, object]:
    with zipfile.ZipFile(agent) as file:
        content: dict[str, object] = json.loads(file.read("data"))
    return content


def test_interrupted_pretraining_is_saved_and_resumed(installation: Installation, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SB3_OFFLINE_FT_NO_HOOK")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    command = [installation.python, *TRAIN, "-params", "offline_steps:1000000", "warmup_steps:100"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell's background job ignores the signal, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        seen = b""
        # The logger's first table: 1,000 gradient steps are done
        while b"offline/" not in seen and process.poll() is None:
            seen += os.read(process.stdout.fileno(), 65536)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, rest.decode()
    agent = tmp_path / "logs" / "td3bc" / "Pendulum-v1_1" / "Pendulum-v1.zip"
    done = facts(agent)["offline_steps_done"]
    assert isinstance(done, int) and done >= 1000 and facts(agent)["num_timesteps"] == 0

    settings = ["-params", f"offline_steps:{done + 50}", "warmup_steps:100"]
    resumed = installation.run(*TRAIN, "-i", str(agent), *settings, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    after = facts(tmp_path / "logs" / "td3bc" / "Pendulum-v1_2" / "Pendulum-v1.zip")
    assert (after["offline_steps_done"], after["num_timesteps"]) == (done + 50, 300)
