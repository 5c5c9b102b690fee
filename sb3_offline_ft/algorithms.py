"""The algorithms of this package by their names in rl_zoo3: the one list that all others are made from."""

from pathlib import Path

# Full paths and not classes: reading a preset must not import torch.
ALGORITHMS = {
    "td3bc": "sb3_offline_ft.td3bc:TD3BC",
    "td3c": "sb3_offline_ft.td3c:TD3C",
    "rebrac": "sb3_offline_ft.rebrac:ReBRAC",
}

_PACKAGE = Path(__file__).parent


def preset_path(algo: str) -> str:
    """
    Where the hyperparameters of an algorithm are.

    :param algo: the algorithm's name in rl_zoo3, one of ``ALGORITHMS``
    :return: the path of its YAML file, as rl_zoo3's ``-conf`` takes it
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"No preset for the algorithm {algo!r}: sb3_offline_ft has presets for {', '.join(ALGORITHMS)}.")
    # In a checkout they are beside the package, in a wheel in it
    folders = [folder / "hyperparams" for folder in (_PACKAGE, _PACKAGE.parent)]
    return str(next((folder for folder in folders if folder.is_dir()), folders[0]) / f"{algo}.yml")
