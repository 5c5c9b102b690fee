"""``python -m sb3_offline_ft.zoo.push_to_hub``: rl_zoo3's push_to_hub, whether or not the startup hook is active."""

from sb3_offline_ft.zoo.hub import PUSH, run


def main() -> None:
    """Run ``rl_zoo3.push_to_hub`` with its own command line; ours are among the algorithms."""
    run(PUSH)


if __name__ == "__main__":
    main()
