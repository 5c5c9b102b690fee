"""The file of ``VecNormalize``, written whole or not at all."""

import os
import pickle

from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.common.io import atomic_write


class WholeVecNormalize(VecNormalize):
    """A ``VecNormalize`` whose file is never half-written, whoever saves it. The file is that of SB3's own class."""

    def save(self, save_path: str) -> None:
        """As SB3's; the file is as it was if it cannot be written."""
        save_statistics(self, save_path)


def save_statistics(normalize: VecNormalize, path: str | os.PathLike[str]) -> None:
    """
    Save what ``VecNormalize.load`` reads, with or without this package.

    :param normalize: The wrapper
    :param path: The file, which is as it was if it cannot be written
    """
    own_class = type(normalize)
    if own_class is WholeVecNormalize:
        normalize.__class__ = VecNormalize
    try:
        with atomic_write(path) as file:
            pickle.dump(normalize, file)
    finally:
        normalize.__class__ = own_class
