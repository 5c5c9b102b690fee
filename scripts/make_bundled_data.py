"""Make the datasets in sb3_offline_ft/datasets/bundled from recorded Minari datasets.

    python scripts/make_bundled_data.py hopper-medium=<folder> pendulum-medium=<folder>

Each folder holds a Minari dataset in hdf5 whose values are exactly representable in float32 (the recordings were rounded).
The copy keeps every value and type; it is stored without Minari's growable chunks and compressed, and its metadata
say how the data was recorded. The script ends by reading both through Minari and comparing them value by value.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
from minari.dataset.minari_storage import MinariStorage

from sb3_offline_ft.datasets.reference_scores import reference_scores_for

BUNDLED = Path(__file__).resolve().parent.parent / "sb3_offline_ft" / "datasets" / "bundled"
SMALLEST_COMPRESSED_BYTES = 1024

FACTS: dict[str, dict[str, Any]] = {
    "hopper-medium": {
        "dataset_id": "sb3-offline-ft/hopper/medium-v0",
        "algorithm_name": "SAC (stable-baselines3)",
        "code_permalink": "https://github.com/DLR-RM/rl-trained-agents/tree/cd35bde/sac/Hopper-v3_1",
        "description": (
            "Hopper-v5 driven by the stochastic policy of the SAC agent Hopper-v3_1 of rl-trained-agents (MIT licence, "
            "commit cd35bde), which scores about 1107 when deterministic: a medium agent. Whole episodes with reset seeds "
            "1000000, 1000001, ...; values rounded to float32 precision. Returns are bimodal: median 1226, 12 % above 2500."
        ),
        "requirements": ["mujoco>=3"],
    },
    "pendulum-medium": {
        "dataset_id": "sb3-offline-ft/pendulum/medium-v0",
        "algorithm_name": "SAC (stable-baselines3)",
        "code_permalink": "",
        "description": (
            "Pendulum-v1 driven by the stochastic policy of an SB3 SAC agent (two layers of 64, learning rate 1e-3) stopped "
            "after 3500 of the 4000 steps it takes to solve the task: a medium agent. Whole episodes with reset seeds "
            "32000000, 32000001, ...; values rounded to float32 precision."
        ),
        "requirements": [],
    },
}


def repack(source: Path, target: Path) -> None:
    """Copy a Minari hdf5 file, losslessly and smaller.

    :param source: The file to read.
    :param target: The file to write.
    """
    # The format of HDF5 1.10 needs a quarter less room for hundreds of small groups than the oldest one.
    with h5py.File(source, "r") as old, h5py.File(target, "w", libver=("v110", "v110")) as new:

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group):
                made: Any = new.require_group(name)
            elif item.nbytes >= SMALLEST_COMPRESSED_BYTES:
                made = new.create_dataset(
                    name, data=item[()], chunks=item.shape, compression="gzip", compression_opts=9, shuffle=True
                )
            else:
                made = new.create_dataset(name, data=item[()])
            made.attrs.update(item.attrs)

        # Episodes in numeric order, so that reading them one after the other walks through the file.
        for index in range(len(old)):
            copy(f"episode_{index}", old[f"episode_{index}"])
            old[f"episode_{index}"].visititems(lambda name, item, index=index: copy(f"episode_{index}/{name}", item))


def bundle(name: str, source: Path) -> Path:
    """Write one bundled dataset.

    :param name: A key of ``FACTS``.
    :param source: Folder of the Minari dataset to copy.
    :return: The folder written.
    """
    data = source if (source / "metadata.json").is_file() else source / "data"
    metadata = MinariStorage.read_raw_metadata(data)
    BUNDLED.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=BUNDLED))
    made = work / "data"
    made.mkdir()
    repack(data / "main_data.hdf5", made / "main_data.hdf5")
    for key in ("author_email", "ref_min_score", "ref_max_score", "num_episodes_average_score", "dataset_size"):
        metadata.pop(key, None)
    metadata |= FACTS[name] | {"author": ["sb3_offline_ft contributors"]}
    metadata["dataset_size"] = round((made / "main_data.hdf5").stat().st_size / 1e6, 1)
    write_json(made / "metadata.json", metadata)

    env_spec = minari.MinariDataset(made).env_spec
    scores = reference_scores_for(env_spec.id) if env_spec is not None else None
    if scores is not None:
        metadata |= {"ref_min_score": scores.random, "ref_max_score": scores.expert}
        write_json(made / "metadata.json", metadata)
    compare(data, made)
    work.chmod(0o755)
    shutil.rmtree(BUNDLED / name, ignore_errors=True)
    os.replace(work, BUNDLED / name)
    return BUNDLED / name


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, at once or not at all.

    :param path: The file.
    :param content: What to write.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def compare(source: Path, made: Path) -> None:
    """Read two datasets through Minari and compare every value.

    :param source: A Minari ``data`` folder.
    :param made: Another.
    :raises ValueError: at the first difference.
    """
    pairs = zip(minari.MinariDataset(source), minari.MinariDataset(made), strict=True)
    for ours, theirs in pairs:
        for column in ("observations", "actions", "rewards", "terminations", "truncations"):
            a, b = np.asarray(getattr(ours, column)), np.asarray(getattr(theirs, column))
            if a.dtype != b.dtype or not np.array_equal(a, b):
                raise ValueError(f"{made}: {column} of episode {ours.id} differ from {source}")


def main() -> None:
    """Write the datasets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="name=folder", help=f"names: {', '.join(FACTS)}")
    for argument in parser.parse_args().datasets:
        name, _, folder = argument.partition("=")
        if name not in FACTS or not folder:
            parser.error(f"expected name=folder with a name of {', '.join(FACTS)}, found {argument!r}")
        written = bundle(name, Path(folder))
        size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
        print(f"{written}: {size / 1e6:.2f} MB, equal to {folder} in every value")


if __name__ == "__main__":
    main()
