"""Models in ONNX's format."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose

from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.common.observations import by_key
from sb3_offline_ft.controllers.contract import contract_file, read_contract, spaces_of


class OnnxController:
    """
    A model whose inputs are the observation, or one an input for the keys of a Dict, and whose first output is the action.

    With one dimension more than the observation the first one is that of a batch. What `sb3-offline-ft export` wrote has its
    contract beside it, which says more of the spaces than the model itself.

    :param name: As the user gave it
    :param file: The file
    :raises ImportError: onnxruntime is not installed
    """

    def __init__(self, name: str, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ImportError(
                f"{name!r} needs onnxruntime, which is not installed: pip install 'sb3-offline-ft[onnx]'.", name="onnxruntime"
            ) from None
        if not file.is_file():
            raise FileNotFoundError(f"No model {str(file.absolute())!r}: expected a file in ONNX's format.")
        self.name = name
        self.sha256: str | None = hashlib.sha256(file.read_bytes()).hexdigest()
        options = onnxruntime.SessionOptions()
        # Small networks: more threads only wait for one another
        options.intra_op_num_threads = 1
        with naming_damage(f"The model {str(file)!r}", "a file in ONNX's format"):
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            self._inputs = self._session.get_inputs()
            self.observation_space: spaces.Space[Any] | None = self._declared_observations()
            self.action_space: spaces.Space[Any] | None = _declared_actions(self._session.get_outputs()[0])
        self.contract = read_contract(file)
        """As `sb3-offline-ft export` wrote it; None of other models."""
        if self.contract is not None:
            self.observation_space, self.action_space = spaces_of(self.contract, contract_file(file))
        self._images = {
            key or self._inputs[0].name: space
            for key, space in by_key(self.observation_space).items()
            if space is not None and is_image_space(space)
        }

    def reset(self, seed: int | None = None) -> None:
        """Nothing to begin."""

    def act(self, observation: Any) -> npt.NDArray[Any]:
        """Ask the model."""
        parts = observation if isinstance(observation, dict) else {self._inputs[0].name: observation}
        given, has_batch = {}, False
        for wanted in self._inputs:
            array = np.asarray(parts[wanted.name], _dtype(wanted.type))
            if wanted.name in self._images:
                # As SB3's policies do
                array = maybe_transpose(array, self._images[wanted.name])
            has_batch = len(wanted.shape) == array.ndim + 1
            given[wanted.name] = array[None] if has_batch else array
        action: npt.NDArray[Any] = self._session.run(None, given)[0]
        return action[0] if has_batch else action

    def _declared_observations(self) -> spaces.Space[Any] | None:
        declared = {each.name: _declared(each) for each in self._inputs}
        if len(declared) == 1:
            return next(iter(declared.values()))
        known = {name: space for name, space in declared.items() if space is not None}
        return spaces.Dict(known) if len(known) == len(declared) else None


def _declared(value: Any) -> spaces.Space[Any] | None:
    """What a model says of an input or output but for its batch; None if it leaves a size open."""
    dtype = np.dtype(_dtype(value.type))
    has_batch = bool(value.shape) and (value.shape[0] == 1 or not isinstance(value.shape[0], int))
    sizes = value.shape[has_batch:]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if dtype.kind in "iu":
        return spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, tuple(sizes), dtype)
    return spaces.Box(-np.inf, np.inf, tuple(sizes), np.float32)


def _declared_actions(value: Any) -> spaces.Space[Any] | None:
    """Whole numbers may be choices, of which a model does not say between how many."""
    declared = _declared(value)
    return None if declared is None or declared.dtype != np.float32 else declared


def _dtype(declared: str) -> npt.DTypeLike:
    """NumPy's name of a type such as ``tensor(float)``."""
    name = declared.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)
