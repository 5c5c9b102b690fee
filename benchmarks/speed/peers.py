"""
Make the virtual environments of the libraries that the speed benchmark compares with.

    python benchmarks/speed/peers.py                  # all of them, in ~/.cache/sb3_offline_ft/peers
    python benchmarks/speed/peers.py sbx --peer-dir /somewhere

`run.py` does this by itself. Each peer has an environment of its own, since their requirements exclude each other and ours.
torch is installed first, in the version of constraints.txt: without that, pip may bring in another one. On Linux,
`TORCH_INDEX=https://download.pytorch.org/whl/cpu` avoids several GB of CUDA libraries, as for `make setup`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = {
    "sbx": ("sbx-rl==0.28.0", "jax==0.10.2"),
    "d3rlpy": ("d3rlpy==2.8.1",),
}
DEFAULT_FOLDER = Path.home() / ".cache" / "sb3_offline_ft" / "peers"
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
RECORD = "installed.txt"
TIMEOUT = 1800


class PeerError(RuntimeError):
    """A peer's environment cannot be made; the message says why."""


def torch_requirement() -> str:
    """
    :return: The requirement on torch in constraints.txt
    """
    found = re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise PeerError(f"{CONSTRAINTS} does not pin torch: add a line such as `torch==2.13.0`.")
    return found.group()


def interpreter(name: str, folder: Path) -> Path:
    """
    :param name: The peer
    :param folder: The folder of all peers
    :return: The Python of the peer's environment, which need not exist
    """
    return folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure(name: str, folder: Path) -> Path:
    """
    Make a peer's environment unless it is there already with the same requirements.

    :param name: The peer
    :param folder: The folder of all peers
    :return: The Python of its environment
    :raises PeerError: It cannot be made
    """
    torch = torch_requirement()
    python, record = interpreter(name, folder), folder / name / RECORD
    wanted = "\n".join((torch, *PEERS[name])) + "\n"
    if python.exists() and record.exists() and record.read_text() == wanted:
        return python
    try:
        shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder / name)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        index = os.environ.get("TORCH_INDEX")
        _run([*pip, *(["--index-url", index] if index else []), torch])
        # In the same call as the peer, so that pip keeps the torch that is there
        _run([*pip, torch, *PEERS[name]])
        record.write_text(wanted)
    except OSError as error:
        raise PeerError(f"cannot write to {folder} ({error}): choose another folder with --peer-dir") from error
    return python


def _run(command: list[str]) -> None:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"`{' '.join(command[1:])}` took more than {TIMEOUT} s") from error
    if process.returncode != 0:
        lines = (process.stderr or process.stdout).strip().splitlines() or ["no output"]
        raise PeerError(f"`{' '.join(command[1:])}` failed: {lines[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help=f"which ones: {', '.join(PEERS)}; all by default")
    parser.add_argument("--peer-dir", type=Path, default=DEFAULT_FOLDER, help="where the environments are (%(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - PEERS.keys():
        parser.error(f"unknown peer {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")
    for name in arguments.peers or PEERS:
        try:
            print(f"{name}: {ensure(name, arguments.peer_dir)}", flush=True)
        except PeerError as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
