"""Makes our algorithms known to rl_zoo3; importing this module is enough, and may be done any number of times."""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import _sb3_offline_ft_startup
from sb3_offline_ft.algorithms import ALGORITHMS, BrokenAlgorithmError, algorithm_class, preset_path, search_space
from sb3_offline_ft.common.warning import warn

__all__ = ["ALGORITHMS", "preset_path", "register"]

Part = TypeVar("Part")


def register() -> None:
    """
    Add our algorithms to ``rl_zoo3.ALGOS``, their search spaces to its tables of samplers and converters, and let its
    ``ExperimentManager`` be :class:`~sb3_offline_ft.zoo.experiment.OfflineExperimentManager` for them.

    Other algorithms of rl_zoo3 are left as they are. Calling it again changes nothing.
    """
    try:
        from rl_zoo3.utils import ALGOS
    except ModuleNotFoundError as error:
        if error.name not in ("rl_zoo3", "rl_zoo3.utils"):
            raise
        raise ImportError(
            "sb3_offline_ft.zoo needs rl_zoo3, which is not installed. Install it with `pip install rl_zoo3`.", name="rl_zoo3"
        ) from None

    # In place: every rl_zoo3 module holds a reference to this one dictionary.
    for algo in ALGORITHMS:
        if algo not in ALGOS and (cls := _part(algo, algorithm_class)) is not None:
            ALGOS[algo] = cls

    if not _sb3_offline_ft_startup.after_import("rl_zoo3.exp_manager", _extend_experiments):
        warn(
            "sb3_offline_ft.zoo was imported while rl_zoo3.exp_manager was still loading: the presets of "
            f"{', '.join(ALGORITHMS)} are not the default yet. Import sb3_offline_ft.zoo before rl_zoo3.exp_manager, or "
            "call sb3_offline_ft.zoo.register() once more afterwards."
        )
    _prepare_hub()


def _prepare_hub() -> None:
    """Prepare the command of rl_zoo3 that this process runs, if it is one about the hub."""
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    if module in (["rl_zoo3.push_to_hub"], ["rl_zoo3.load_from_hub"]):
        from sb3_offline_ft.zoo.hub import prepare

        prepare(*module)


@cache
def _part(algo: str, load: Callable[[str], Part]) -> Part | None:
    """A part of an algorithm; None, with one warning, if it is another package's and broken."""
    try:
        return load(algo)
    except BrokenAlgorithmError as error:
        warn(str(error))
        return None


def _extend_experiments() -> None:
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS

    for algo in (ALGORITHMS.keys() & ALGOS.keys()) - HYPERPARAMS_SAMPLER.keys():
        if (space := _part(algo, search_space)) is not None:
            HYPERPARAMS_SAMPLER[algo], HYPERPARAMS_CONVERTER[algo] = space.sample, space.convert
    # Whoever has imported the class, before or after us, gets ours for our algorithms; it is the same class for all others
    if vars(ExperimentManager).get("__new__") is not _new_experiment:
        _new_experiment.__signature__ = inspect.signature(ExperimentManager.__init__)  # type: ignore[attr-defined]
        ExperimentManager.__new__ = _new_experiment  # type: ignore[method-assign]


def _new_experiment(cls: Any, args: Any = None, algo: str = "", *_: Any, **__: Any) -> Any:
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.utils import ALGOS

    from sb3_offline_ft.offline_td3 import OfflineTD3

    # A name of another package's algorithm may be one that rl_zoo3 already had
    if algo in ALGORITHMS and issubclass(ALGOS.get(algo, object), OfflineTD3):
        from sb3_offline_ft.zoo.experiment import offline_manager

        cls = offline_manager(cls)
    return super(ExperimentManager, cls).__new__(cls)


register()
