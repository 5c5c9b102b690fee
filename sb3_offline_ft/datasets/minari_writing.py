"""New Minari datasets: built aside, compacted, and moved into the local folder only when they are complete."""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE, parse_dataset_id
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

_SMALLEST_COMPRESSED_BYTES = 1024


def check_new_id(dataset_id: str, overwrite: bool = False) -> None:
    """Check that a dataset can be written under an id.

    :param dataset_id: The id.
    :param overwrite: Whether one that is there may be replaced.
    :raises ValueError: if it is no Minari id.
    :raises FileExistsError: if there is such a dataset already.
    """
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match.group("version") is None:
        raise ValueError(
            f"{dataset_id!r} is no Minari id: expected name-v0 or namespace/name-v0, with letters, digits, - and _ in the "
            "names, two letters or more in the namespace, and the version at the end."
        )
    folder = get_dataset_path(dataset_id)
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"There is a dataset {dataset_id!r} already, in {str(folder)!r}: choose another id (a higher version, such as "
            f"{dataset_id.rpartition('-v')[0]}-v{int(match.group('version')) + 1}), or replace it with --overwrite."
        )


def write_minari(
    dataset_id: str,
    episodes: Iterable[EpisodeBuffer],
    *,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    env: gym.Env[Any, Any] | None = None,
    facts: dict[str, Any] | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a Minari dataset (hdf5) into the local folder, whole or not at all.

    :param dataset_id: Its id.
    :param episodes: The episodes; they are written one by one.
    :param observation_space: Space of the observations.
    :param action_space: Space of the actions.
    :param env: The environment, for its spec.
    :param facts: Metadata: any of ``algorithm_name, author, author_email, code_permalink, description, requirements,
        ref_min_score, ref_max_score``.
    :param overwrite: Replace a dataset with this id. It is kept until the new one is complete.
    :param check: Called with the folder of the complete dataset before it is moved; may raise to have it thrown away.
    :return: The dataset's folder.
    :raises ValueError: if it is no Minari id, or there are no episodes.
    :raises FileExistsError: if there is such a dataset already.
    """
    check_new_id(dataset_id, overwrite)
    facts = {name: value for name, value in (facts or {}).items() if value is not None}
    scores: dict[str, Any] = {name: facts.pop(name) for name in ("ref_min_score", "ref_max_score") if name in facts}
    root = Path(get_dataset_path())
    with tempfile.TemporaryDirectory(dir=root, prefix=".sb3-offline-ft-", ignore_cleanup_errors=True) as aside:
        with _minari_root(Path(aside)), warnings.catch_warnings():
            # Minari asks for every fact that is left out
            warnings.filterwarnings(
                "ignore", message=".*`?(code_permalink|author|author_email|algorithm_name|description)`? is"
            )
            warnings.filterwarnings("ignore", message=".*(`eval_env` is set to None|env_spec is None)")
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=None if env is None else _recoverable(env),
                observation_space=observation_space,
                action_space=action_space,
                jpeg_encoding=False,
                **facts,
            )
        if dataset.total_episodes == 0:
            raise ValueError(f"There are no episodes to write to {dataset_id!r}")
        new = Path(aside) / dataset_id
        compact_hdf5(new / "data" / "main_data.hdf5")
        # Minari drops the scores of a dataset without environment, and asks a random policy for the lower one
        dataset.storage.update_metadata({**scores, "dataset_size": dataset.storage.get_size()})
        if check is not None:
            check(new)
        namespace = parse_dataset_id(dataset_id)[0]
        if namespace is not None and namespace not in list_local_namespaces():
            with suppress(ValueError):
                create_namespace(namespace)
        folder, old = root / dataset_id, Path(aside) / "replaced"
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
    return folder


def compact_hdf5(file: Path) -> None:
    """Rewrite a file of Minari's with fixed and compressed instead of growable arrays, in place.

    Every value and type is kept. Minari's growable arrays take about 16 kB for an episode, however short.

    :param file: The file.
    """
    import h5py

    compacted = file.with_suffix(".compact")
    with h5py.File(file, "r") as old, h5py.File(compacted, "w", libver=("v110", "v110")) as new:

        def copy(name: str, item: Any) -> None:
            if isinstance(item, h5py.Group):
                made = new.require_group(name)
            elif item.nbytes >= _SMALLEST_COMPRESSED_BYTES and item.dtype.kind in "biuf":
                made = new.create_dataset(name, data=item[()], chunks=item.shape, compression="gzip", shuffle=True)
            else:
                made = new.create_dataset(name, data=item[()], dtype=item.dtype)
            made.attrs.update(item.attrs)

        for index in range(len(old)):
            copy(f"episode_{index}", old[f"episode_{index}"])
            old[f"episode_{index}"].visititems(lambda name, item, index=index: copy(f"episode_{index}/{name}", item))
    os.replace(compacted, file)


class _SpecOnly(gym.Env[Any, Any]):
    """Hands a spec to Minari, which would otherwise make an environment to look at its spaces."""

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec


def _recoverable(env: gym.Env[Any, Any]) -> gym.Env[Any, Any] | None:
    """Bring the spec of an environment into a form that can be written; with a warning, none if there is no such form."""
    if env.spec is None:
        return None
    spec = copy.deepcopy(env.spec)
    entry_point: Any = spec.entry_point
    if callable(entry_point) and str(getattr(entry_point, "__qualname__", "<>")).isidentifier():
        # Registered as a class; its name says the same, if it is importable
        spec.entry_point = f"{entry_point.__module__}:{entry_point.__qualname__}"
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"The environment {spec.id} cannot be recovered from the dataset, as its spec cannot be written: {error} "
            "Register it with entry_point='module:Class' and arguments of plain types.",
            stacklevel=3,
        )
        return None
    return _SpecOnly(spec)


@contextmanager
def _minari_root(path: Path) -> Iterator[None]:
    """Let Minari read and write below another folder."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
