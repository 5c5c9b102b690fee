"""
``python -m sb3_offline_ft.zoo.train``: rl_zoo3's train with our algorithms, whether or not the startup hook is active, and
with a manifest in the folders of all algorithms' runs.
"""

import sb3_offline_ft.zoo


def main() -> None:
    """Run ``rl_zoo3.train`` with its own command line; ours are among the algorithms."""
    sb3_offline_ft.zoo.register()
    from rl_zoo3 import train

    from sb3_offline_ft.zoo.recording import RecordingManager

    setattr(train, "ExperimentManager", RecordingManager)  # noqa: B010  # rl_zoo3 does not export the name
    train.train()


if __name__ == "__main__":
    main()
