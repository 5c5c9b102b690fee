"""Makes our algorithms known to rl_zoo3; importing this module is enough, and may be done any number of times."""

import warnings
from pkgutil import resolve_name

import _sb3_offline_ft_startup
from sb3_offline_ft.algorithms import ALGORITHMS, preset_path

__all__ = ["ALGORITHMS", "preset_path", "register"]


def _extend_experiment_manager() -> None:
    from sb3_offline_ft.tuning.search_spaces import register_search_spaces
    from sb3_offline_ft.zoo.experiment import extend_experiment_manager

    register_search_spaces()
    extend_experiment_manager()


def register() -> None:
    """
    Add our algorithms to ``rl_zoo3.ALGOS``, their search spaces to its tables of samplers and converters, and our presets,
    checks and pretraining to its ``ExperimentManager``.

    Other algorithms of rl_zoo3 are left as they are. Calling it again changes nothing.
    """
    try:
        from rl_zoo3.utils import ALGOS
    except ModuleNotFoundError as error:
        if error.name not in ("rl_zoo3", "rl_zoo3.utils"):
            raise
        raise ImportError(
            'sb3_offline_ft.zoo needs rl_zoo3, which is not installed. Install it with `pip install "sb3-offline-ft[zoo]"`.',
            name="rl_zoo3",
        ) from None

    # In place: every rl_zoo3 module holds a reference to this one dictionary.
    for name, location in ALGORITHMS.items():
        if name not in ALGOS:
            ALGOS[name] = resolve_name(location)

    if not _sb3_offline_ft_startup.after_import("rl_zoo3.exp_manager", _extend_experiment_manager):
        warnings.warn(
            "sb3_offline_ft.zoo was imported while rl_zoo3.exp_manager was still loading: the presets of "
            f"{', '.join(ALGORITHMS)} are not the default yet. Import sb3_offline_ft.zoo before rl_zoo3.exp_manager, or "
            "call sb3_offline_ft.zoo.register() once more afterwards.",
            stacklevel=2,
        )


register()
