"""The file of ``VecNormalize``, written whole or not at all."""

import copyreg
import os
import pickle
from typing import Any

from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.common.io import atomic_write


def save_statistics(normalize: VecNormalize, path: str | os.PathLike[str]) -> None:
    """
    Save what ``VecNormalize.load`` reads.

    :param normalize: The wrapper
    :param path: The file, which is as it was if it cannot be written
    """
    with atomic_write(path) as file:
        pickle.dump(normalize, file)


class WholeVecNormalize(VecNormalize):
    """A ``VecNormalize`` whose file is never half-written, whoever saves it. The file is that of SB3's own class."""

    def save(self, save_path: str) -> None:
        """As SB3's; the file is as it was if it cannot be written."""
        save_statistics(self, save_path)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return copyreg.__newobj__, (VecNormalize,), self.__getstate__()  # type: ignore[attr-defined]
