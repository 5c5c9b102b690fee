"""Random changes of the observations of sampled batches, against overfitting to a dataset of limited size."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.observations import Observations, by_key, kind_of, mean_and_std
from sb3_offline_ft.common.suggestions import hint

Array = npt.NDArray[Any]


class Augmentation(ABC):
    """
    A random change of a batch of observations.

    A subclass sets ``name``, ``kind`` (``"vector"`` or ``"image"``: the observations it is for) and ``needs_std``.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "vector"
    needs_std: ClassVar[bool] = False
    """Whether the dataset's standard deviations are needed."""

    @abstractmethod
    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        """
        :param values: Observations, shape ``(batch, *obs_shape)``, contiguous; float32 for vectors, uint8 for images. May be
            changed in place
        :param generator: The only source of randomness
        :param std: Standard deviations over the dataset, shape ``obs_shape``, if they are needed
        :return: Changed observations of the same shape and type
        """

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027  # most have nothing to check
        """
        Check that observations of a shape can be changed.

        :param shape: Shape of one observation
        :raises ValueError: They cannot
        """


class GaussianNoise(Augmentation):
    """
    Add zero-mean Gaussian noise (S4RL, Sinha et al. 2022, arXiv 2103.06326).

    :param std: Standard deviation, in units of the dataset's per-dimension standard deviations (the unit and the default are
        ours)
    """

    name = "gaussian_noise"
    needs_std = True

    def __init__(self, std: float = 0.01) -> None:
        self.std = _positive(std, self.name, "std")

    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        assert std is not None
        noise: Array = generator.standard_normal(values.shape, dtype=np.float32)
        noise *= np.float32(self.std) * std
        values += noise
        return values


class UniformNoise(Augmentation):
    """
    Add zero-mean uniform noise (S4RL, Sinha et al. 2022).

    :param width: The noise is between ``-width`` and ``width``, in units of the dataset's per-dimension standard deviations
        (the unit and the default are ours)
    """

    name = "uniform_noise"
    needs_std = True

    def __init__(self, width: float = 0.01) -> None:
        self.width = _positive(width, self.name, "width")

    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        assert std is not None
        noise: Array = 2 * generator.random(values.shape, dtype=np.float32) - 1
        noise *= np.float32(self.width) * std
        values += noise
        return values


class AmplitudeScaling(Augmentation):
    """
    Multiply each observation by a random number (S4RL, Sinha et al. 2022).

    :param low: Smallest factor (the default is ours)
    :param high: Largest factor (the default is ours)
    """

    name = "amplitude_scaling"

    def __init__(self, low: float = 0.8, high: float = 1.2) -> None:
        self.low, self.high = _positive(low, self.name, "low"), _positive(high, self.name, "high")
        if self.low > self.high:
            raise ValueError(f"The augmentation 'amplitude_scaling' needs low <= high, found {low:g} and {high:g}.")

    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        factors = self.low + (self.high - self.low) * generator.random(len(values), dtype=np.float32)
        values *= factors.reshape(-1, *(1,) * (values.ndim - 1))
        return values


class DimensionDropout(Augmentation):
    """Set one random dimension of each observation to 0 (S4RL, Sinha et al. 2022)."""

    name = "dimension_dropout"

    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        flat = values.reshape(len(values), -1)
        flat[np.arange(len(flat)), generator.integers(0, flat.shape[1], size=len(flat))] = 0
        return values


class StateSwitch(Augmentation):
    """
    Exchange two dimensions of each observation (S4RL, Sinha et al. 2022, who choose the pairs for each environment).

    :param dimensions: Dimensions ``a, b, c, d, ...``: each observation has the dimensions of one of the pairs ``(a, b)``,
        ``(c, d)``, ... exchanged, drawn at random. By default two random dimensions are
    """

    name = "state_switch"

    def __init__(self, *dimensions: float) -> None:
        if len(dimensions) % 2 or any(int(one) != one or one < 0 for one in dimensions):
            raise ValueError(
                f"The augmentation 'state_switch' needs pairs of dimensions, found {', '.join(map(str, dimensions))}."
            )
        self.pairs = np.array(dimensions).astype(np.int64).reshape(-1, 2)

    def check(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        if size < 2 or self.pairs.max(initial=0) >= size:
            found = ", ".join(map(str, self.pairs.ravel())) or "two random ones"
            raise ValueError(f"The augmentation 'state_switch' exchanges dimensions 0 to {size - 1}, found {found}.")

    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        flat, rows = values.reshape(len(values), -1), np.arange(len(values))
        if len(self.pairs):
            first, second = self.pairs[generator.integers(0, len(self.pairs), size=len(flat))].T
        else:
            size = flat.shape[1]
            first = generator.integers(0, size, size=len(flat))
            second = (first + generator.integers(1, size, size=len(flat))) % size
        flat[rows, first], flat[rows, second] = flat[rows, second], flat[rows, first]
        return values


class RandomShift(Augmentation):
    """
    Shift each image by up to ``pad`` pixels in both directions: pad it by its border pixels, then crop it (DrQ, Kostrikov et
    al. 2021, arXiv 2004.13649). Shifts are whole pixels; all channels of an image are shifted alike.

    :param pad: Number of pixels; the paper's is 4, for images of 84 x 84
    """

    name = "random_shift"
    kind = "image"

    def __init__(self, pad: int = 4) -> None:
        if int(pad) != pad or pad < 1:
            raise ValueError(f"The augmentation 'random_shift' needs a whole number of pixels of at least 1, found {pad}.")
        self.pad = int(pad)

    def __call__(self, values: Array, generator: np.random.Generator, std: Array | None) -> Array:
        height, width = values.shape[-2:]
        n_shifts = 2 * self.pad + 1
        shifts = generator.integers(0, n_shifts * n_shifts, size=len(values))
        border = [(0, 0)] * (values.ndim - 2) + [(self.pad, self.pad)] * 2
        padded = np.pad(values, border, mode="edge")
        # A loop over the different shifts, since slices are copied much faster than pixels are gathered
        for shift in np.unique(shifts):
            rows = np.flatnonzero(shifts == shift)
            top, left = divmod(int(shift), n_shifts)
            values[rows] = padded[rows, ..., top : top + height, left : left + width]
        return values


AUGMENTATIONS: dict[str, type[Augmentation]] = {
    one.name: one for one in (GaussianNoise, UniformNoise, AmplitudeScaling, DimensionDropout, StateSwitch, RandomShift)
}


def make_augmentation(value: str | Augmentation | None) -> Augmentation | None:
    """
    Make an augmentation of a string such as ``"gaussian_noise"`` or ``"gaussian_noise_0.02"``: a name, and the numbers that
    its constructor takes.

    :param value: The string, an augmentation, or None
    :return: The augmentation, or None
    :raises ValueError: The string is not understood
    :raises TypeError: It is none of the three
    """
    if value is None or isinstance(value, Augmentation):
        return value
    if not isinstance(value, str):
        raise TypeError(f"`augmentation` must be a name such as 'gaussian_noise' or an Augmentation, found {value!r}.")
    words, numbers = value.split("_"), list[float]()
    while words and (number := _as_number(words[-1])) is not None:
        numbers.insert(0, number)
        words.pop()
    name = "_".join(words)
    if name not in AUGMENTATIONS:
        raise ValueError(f"`augmentation` is {value!r}: {hint(name, AUGMENTATIONS)}")
    chosen = AUGMENTATIONS[name]
    try:
        inspect.signature(chosen).bind(*numbers)
    except TypeError as error:
        expected = ", ".join(inspect.signature(chosen).parameters) or "none"
        raise ValueError(f"`augmentation` is {value!r}: expected after the name at most the numbers {expected}.") from error
    return chosen(*numbers)


class Augmenter:
    """
    Changes batches by an augmentation, with a random stream of its own.

    :param augmentation: The augmentation
    :param observation_space: Observation space; those of its keys that are of the augmentation's kind are changed
    :raises ValueError: It has none, or one that cannot be changed
    """

    def __init__(self, augmentation: Augmentation, observation_space: spaces.Space[Any]) -> None:
        self._augmentation = augmentation
        self._std: dict[str, Array] = {}
        parts = by_key(observation_space)
        self._keys = [key for key, space in parts.items() if kind_of(space) == augmentation.kind]
        if not self._keys:
            raise ValueError(
                f"The augmentation {augmentation.name!r} is for {augmentation.kind}s, which the observation space has not: "
                f"{observation_space}."
            )
        for key in self._keys:
            augmentation.check(parts[key].shape)

    def seed(self, seed: int) -> None:
        """Start the random stream anew."""
        self.generator = np.random.default_rng(seed)

    @property
    def needs_offline_data(self) -> bool:
        """Whether the offline data, in units of whose spread it is, has not been set."""
        return self._augmentation.needs_std and not self._std

    def set_offline_data(self, observations: Observations) -> None:
        """Take the spread of the offline data as the unit."""
        columns = by_key(observations)
        for key in self._keys if self._augmentation.needs_std else ():
            self._std[key] = mean_and_std(columns[key])[1].reshape(columns[key].shape[1:]).astype(np.float32)

    def __call__(self, observations: Observations, next_observations: Observations) -> None:
        """
        Change batches in place.

        :param observations: Shape ``(n_batches, batch_size, *obs_shape)``, or a dictionary of such
        :param next_observations: The same
        :raises ValueError: It needs offline data, and there is none
        """
        if self.needs_offline_data:
            raise ValueError(
                f"The augmentation {self._augmentation.name!r} is in units of the offline data's standard deviations, and "
                "there is no offline data: set it, or use `augmentation=None`."
            )
        both = by_key(observations), by_key(next_observations)
        # Batch after batch, so that the random stream does not depend on how many are drawn at once
        for batch in range(len(both[0][self._keys[0]])):
            for columns in both:
                for key in self._keys:
                    values = columns[key][batch]
                    changed = self._augmentation(values, self.generator, self._std.get(key))
                    if changed is not values:
                        values[...] = changed


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _positive(value: float, name: str, parameter: str) -> float:
    if not 0 < value < np.inf:
        raise ValueError(f"The augmentation {name!r} needs a positive {parameter}, found {value!r}.")
    return float(value)
