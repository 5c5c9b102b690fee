"""``python -m sb3_offline_ft.zoo.enjoy``: rl_zoo3's enjoy with our algorithms, whether or not the startup hook is active."""

import sb3_offline_ft.zoo


def main() -> None:
    """Run ``rl_zoo3.enjoy`` with its own command line; ours are among the algorithms."""
    sb3_offline_ft.zoo.register()
    from rl_zoo3.enjoy import enjoy

    enjoy()


if __name__ == "__main__":
    main()
