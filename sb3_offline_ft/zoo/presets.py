"""The hyperparameter files that ship with the package, in rl_zoo3's format."""

from importlib.resources import files

# Full paths and not classes: reading a preset must not import torch.
ALGORITHMS = {
    "td3bc": "sb3_offline_ft.td3bc:TD3BC",
    "td3c": "sb3_offline_ft.td3c:TD3C",
    "rebrac": "sb3_offline_ft.rebrac:ReBRAC",
}


def preset_path(algo: str) -> str:
    """
    Where the hyperparameters of an algorithm are.

    :param algo: the algorithm's name in rl_zoo3, one of ``ALGORITHMS``
    :return: the path of its YAML file, as rl_zoo3's ``-conf`` takes it
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"No preset for the algorithm {algo!r}: sb3_offline_ft has presets for {', '.join(ALGORITHMS)}.")
    return str(files("sb3_offline_ft").joinpath("hyperparams", f"{algo}.yml"))
