"""The parts of observations and observation spaces, which for ``Dict`` spaces are several."""

from typing import Any

import numpy as np
from gymnasium import spaces


def by_key(observations: Any) -> dict[str, Any]:
    """
    :param observations: An observation space, or arrays of observations
    :return: What each key of a ``Dict`` has; for other spaces and single arrays the thing itself, with an empty key
    """
    if isinstance(observations, spaces.Dict):
        return dict(observations.spaces)
    return observations if isinstance(observations, dict) else {"": observations}


def kind_of(space: spaces.Space[Any]) -> str:
    """
    :param space: An observation space, not a ``Dict``
    :return: ``"image"`` for uint8 of two dimensions or more, ``"vector"`` for other numbers but uint8, else ``"other"``
    """
    if not isinstance(space, spaces.Box) or (space.dtype == np.uint8 and len(space.shape) < 2):
        return "other"
    return "image" if space.dtype == np.uint8 else "vector"
