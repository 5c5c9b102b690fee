"""The algorithms by their names in rl_zoo3: the one list that the zoo, tuning, studies and the doctor are made from."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from sb3_offline_ft.common.search_space import SearchSpace
    from sb3_offline_ft.offline_td3 import OfflineTD3

DISTRIBUTION = "sb3-offline-ft"
GROUP = "sb3_offline_ft.algorithms"
"""The entry points by which other packages add theirs."""

# Full paths and not classes: reading a preset must not import torch.
_OURS = {
    "td3bc": "sb3_offline_ft.td3bc:TD3BC",
    "td3c": "sb3_offline_ft.td3c:TD3C",
    "rebrac": "sb3_offline_ft.rebrac:ReBRAC",
}

_OTHERS = {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _OURS}

ALGORITHMS = _OURS | {name: entry.value for name, entry in _OTHERS.items()}
"""Where each one's class is, as ``package:Class``. Its search space is ``SEARCH_SPACE`` in ``package.search_space``."""

_PACKAGE = Path(__file__).parent


class BrokenAlgorithmError(ImportError):
    """The algorithm of another package cannot be used."""


@contextmanager
def _naming(algo: str) -> Iterator[None]:
    """Tell of which algorithm an error is, if it is another package's."""
    try:
        yield
    except Exception as error:
        if algo not in _OTHERS:
            raise
        raise BrokenAlgorithmError(
            f"The algorithm {algo!r} of another package, {ALGORITHMS[algo]}, cannot be used "
            f"({type(error).__name__}: {error}): repair or uninstall {distribution_of(algo)}."
        ) from error


def distribution_of(algo: str) -> str:
    """
    :param algo: An algorithm's name
    :return: What pip installed it with; our own distribution if no other one has the name
    """
    other = _OTHERS.get(algo)
    return DISTRIBUTION if other is None or other.dist is None else other.dist.name


def algorithm_class(algo: str) -> type["OfflineTD3"]:
    """
    :param algo: An algorithm's name in rl_zoo3, one of ``ALGORITHMS``
    :return: Its class
    """
    with _naming(algo):
        return cast("type[OfflineTD3]", resolve_name(ALGORITHMS[algo]))


def search_space(algo: str) -> "SearchSpace":
    """
    :param algo: An algorithm's name in rl_zoo3, one of ``ALGORITHMS``
    :return: What is tuned of it: its own hyperparameters, if it has any to tune, and those that all have
    """
    from sb3_offline_ft.common.search_space import COMMON, SearchSpace

    module = f"{ALGORITHMS[algo].partition(':')[0]}.search_space"
    with _naming(algo):
        try:
            own = import_module(module).SEARCH_SPACE
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            own = {}
    return SearchSpace(algo, {**own, **COMMON})


def preset_path(algo: str) -> str:
    """
    Where the hyperparameters of an algorithm are.

    :param algo: the algorithm's name in rl_zoo3, one of ``ALGORITHMS``
    :return: the path of its YAML file, as rl_zoo3's ``-conf`` takes it; another package's is beside its class
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"No preset for the algorithm {algo!r}: sb3_offline_ft has presets for {', '.join(ALGORITHMS)}.")
    if algo not in _OURS:
        package = ALGORITHMS[algo].partition(":")[0]
        with _naming(algo):
            spec = find_spec(package)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return str(Path(spec.origin).parent / f"{algo}.yml")
    # In a checkout they are beside the package, in a wheel in it
    folders = [folder / "hyperparams" for folder in (_PACKAGE, _PACKAGE.parent)]
    return str(next((folder for folder in folders if folder.is_dir()), folders[0]) / f"{algo}.yml")
