"""``python -m sb3_offline_ft.zoo.load_from_hub``: rl_zoo3's load_from_hub, whether or not the startup hook is active."""

from sb3_offline_ft.zoo.hub import LOAD, run


def main() -> None:
    """Run ``rl_zoo3.load_from_hub`` with its own command line; ours are among the algorithms."""
    run(LOAD)


if __name__ == "__main__":
    main()
