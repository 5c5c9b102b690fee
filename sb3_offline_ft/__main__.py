"""``python -m sb3_offline_ft`` is the ``sb3-offline-ft`` command."""

from sb3_offline_ft.cli import main

if __name__ == "__main__":
    main()
