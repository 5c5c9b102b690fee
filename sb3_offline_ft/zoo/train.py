"""
``python -m sb3_offline_ft.zoo.train``: rl_zoo3's train with our algorithms, whether or not the startup hook is active, and
with a manifest in the folders of all algorithms' runs. ``--resume <run folder>`` goes on with a run that died.
"""

import argparse
import sys
from pathlib import Path

import sb3_offline_ft.zoo

RESUME = "--resume"


def main() -> None:
    """Run ``rl_zoo3.train`` with its own command line; ours are among the algorithms. With ``--resume``, go on with a run."""
    sb3_offline_ft.zoo.register()
    if any(argument.partition("=")[0] == RESUME for argument in sys.argv[1:]):
        parser = argparse.ArgumentParser(description="Go on with a run that died, in the same folder.")
        parser.add_argument(RESUME, type=Path, required=True, metavar="FOLDER", help="such as logs/td3c/Hopper-v5_1")
        folder = parser.parse_args().resume
        from sb3_offline_ft.zoo.resuming import resume_run

        try:
            resume_run(folder)
        except ValueError as error:
            sys.exit(f"{parser.prog}: {error}")
        return
    from rl_zoo3 import train

    from sb3_offline_ft.zoo.recording import RecordingManager

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{RESUME} FOLDER, alone: go on with a run that died, in its folder, such as logs/td3c/Hopper-v5_1. Else:\n")
    setattr(train, "ExperimentManager", RecordingManager)  # noqa: B010  # rl_zoo3 does not export the name
    train.train()


if __name__ == "__main__":
    main()
