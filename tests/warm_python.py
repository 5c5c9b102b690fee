"""
Python with the large libraries already loaded, whose import is most of what a short command costs.

A server imports what rl_zoo3 and we build on, but neither of the two, and forks for each command: it is a process of its
own, with its folder, environment, output and exit code, in which the startup hook sees rl_zoo3 being imported.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = (
    "torch", "torch.utils.tensorboard", "stable_baselines3", "sb3_contrib", "gymnasium", "mujoco", "matplotlib.pyplot",
    "pandas", "scipy.stats", "h5py", "minari", "optuna.visualization.matplotlib", "rich.progress", "typer",
)  # fmt: skip
# Read when a command runs. What libraries read while they are imported would come too late.
READ_LATE = {
    "SB3_OFFLINE_FT_NO_HOOK", "PYTHONPATH", "MINARI_DATASETS_PATH", "MPLBACKEND", "COLUMNS", "NO_COLOR", "TERM",
    "HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "NO_PROXY", "TRUST_REMOTE_CODE",
}  # fmt: skip
# Without the hook, which each command begins with, and with the only backend that anyone asks for
ENVIRONMENT = {"SB3_OFFLINE_FT_NO_HOOK": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
TIMEOUT = 300


class WarmPython:
    """
    The server's client.

    :param python: the Python that runs the commands
    :param hook: what Python executes at its start
    :param folder: gets the output of the command that runs
    """

    def __init__(self, python: str, hook: Path, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([python, __file__, hook], env=environment, **pipes)
        self._output = [folder / "stdout", folder / "stderr"]

    def run(self, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs Python with these arguments, of which the first is ``-m`` or ``-c``."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"arguments": arguments, "cwd": str(cwd), "environment": environment, "output": [*map(str, self._output)]}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(arguments, TIMEOUT)
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in self._output))

    def close(self) -> None:
        self._server.communicate()


def _next_request() -> dict[str, Any]:
    """Returns in the process that is to run the request."""
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    raise SystemExit


def _serve(hook: str) -> None:
    del sys.path[0]
    for name in LIBRARIES:
        importlib.import_module(name)
    # rl_zoo3 imports the hub's package, which reads its variables then
    assert not sys.modules.keys() & {"sb3_offline_ft", "rl_zoo3", "huggingface_hub"}
    request = _next_request()
    signal.alarm(TIMEOUT)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, path in enumerate([os.devnull, *request["output"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    importlib.invalidate_caches()
    sys.orig_argv = [sys.executable, *request["arguments"]]
    exec(Path(hook).read_text())
    # NumPy's generator would be the same in each process
    sys.modules["numpy"].random.seed()
    option, what, *arguments = request["arguments"]
    searched = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = [request["cwd"] if option == "-m" else "", *filter(None, searched.split(os.pathsep))]
    if option == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    _serve(sys.argv[1])
