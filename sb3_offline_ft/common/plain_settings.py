"""Settings of a saved model in plain JSON, so that it can be loaded without unpickling anything."""

import inspect
import io
import json
import pathlib
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import data_to_json, open_path
from stable_baselines3.common.type_aliases import GymEnv, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json, naming_damage
from sb3_offline_ft.common.plain_pickle import Name, NotPlainError
from sb3_offline_ft.common.reading import parse_json, read_member, reason_of
from sb3_offline_ft.common.schedules import GeometricSchedule
from sb3_offline_ft.common.warning import warn

MEMBER = "plain_settings.json"
"""The file in a model's zip; SB3 overlooks it."""
NEEDED: dict[str, type] = {
    "policy_class": type,
    "policy_kwargs": dict,
    "observation_space": spaces.Space,
    "action_space": spaces.Space,
}
"""What nobody acts without, and what it is."""
MOST_COPIES = 10_000
"""Environments that a file may have noise for."""
MADE_ANEW = frozenset(
    "_last_obs _last_original_obs _last_episode_starts ep_info_buffer ep_success_buffer lr_schedule "
    "exploration_schedule".split()
)
"""What SB3 makes when training goes on."""
OBJECT = "object"
SHOWN_DIGITS = 8
"""Decimals that NumPy shows of the numbers in an array; more may have been cut off."""
_PARTS = (
    ("torch.nn.modules", "torch.optim", "stable_baselines3.common.torch_layers", "sb3_offline_ft.policies.layers"),
    (th.nn.Module, th.optim.Optimizer),
)
"""Where classes may be from that policies are made of, and of what kind."""
_HOMES = re.compile(r"(stable_baselines3|sb3_contrib|sb3_offline_ft)(\.\w+)*\.(policies|buffers|her_replay_buffer|\w*online)")
"""Modules that policies and replay buffers may be from."""
_CLASS = re.compile(r"<class '(?P<module>[\w.]+)\.(?P<name>\w+)'>")
_NUMBER = re.compile(r"[-+]?(?:inf|nan|\d+\.?(?P<decimals>\d*)(?:e(?P<power>[-+]?\d+))?)")

File = str | pathlib.Path | io.BufferedIOBase
Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)


def safe_load(
    path: File, algorithm: type[Algorithm], env: GymEnv | None = None, device: th.device | str = "auto", **kwargs: Any
) -> Algorithm:
    """
    Load a model of SB3, sb3-contrib or this package without unpickling anything: settings from plain JSON and text, weights
    with PyTorch's ``weights_only=True``. SB3's own ``load`` unpickles settings, which runs whatever code a file holds.

    What only training needs and plain text does not tell (``train_freq`` in files of SB3's own algorithms) is left at its
    default, with a warning that names it.

    :param path: The zip file or binary stream
    :param algorithm: The class that saved it
    :param env: Environment to go on in; of spaces that the file does not tell exactly, its own are taken if their texts agree
    :param device: Torch device
    :param kwargs: Constructor arguments in place of the file's
    :return: The model
    :raises ValueError: The file is damaged, or names or needs something that cannot be made without unpickling; names it
    :raises FileNotFoundError: There is no such file
    """
    if "safe_load" in inspect.signature(algorithm.load).parameters:
        return algorithm.load(path, env=env, device=device, safe_load=True, **kwargs)
    stream, objects = without_pickle(path, algorithm, env, kwargs)
    with naming_misfit(path):
        return algorithm.load(stream, env=env, device=device, custom_objects=objects, **kwargs)


@contextmanager
def naming_misfit(path: File) -> Iterator[None]:
    """
    :param path: What is loaded within the block
    :raises ValueError: What SB3 and PyTorch raise, in other ways than about arguments, of a file that does not fit together
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"{_shown(path)} cannot be loaded ({reason_of(error)}): it is damaged, or another algorithm's."
        ) from error


def without_pickle(
    path: File, algorithm: type[BaseAlgorithm], env: GymEnv | None, given: Mapping[str, Any]
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    :param path: The zip file or binary stream
    :param algorithm: The class that shall be loaded
    :param env: Its environment, None for none
    :param given: What shall be taken in place of the file's settings
    :return: The file's content, and an object for each setting that it holds as a pickle: as ``custom_objects`` of SB3's
        ``load``, none is unpickled
    :raises ValueError: As in :func:`safe_load`
    """
    stream = content_of(path)
    settings, plain = read_settings(stream, path)
    objects: dict[str, Any] = {}
    defaults, unknown = constructor_arguments(algorithm), []
    for name in (name for name, entry in settings.items() if is_pickled(entry)):
        try:
            objects[name] = rebuilt(name, settings, plain, algorithm.policy_aliases.values(), env)
        except NotPlainError as error:
            if name in given:
                objects[name] = given[name]
                continue
            if name in NEEDED:
                raise _refusal(path, name, error, can_give_env=env is None) from None
            objects[name] = None if name in MADE_ANEW else defaults.get(name)
            if name not in MADE_ANEW:
                unknown.append(name)
    for name, kind in NEEDED.items():
        if not isinstance(objects.get(name, settings.get(name)), kind):
            raise ValueError(f"{_shown(path)} is damaged or of another kind: it does not tell {name}.")
    if objects.get("target_entropy") == "auto":
        # TQC would ask its environment, which there may not be
        objects["target_entropy"] = -float(np.prod(objects["action_space"].shape))
    if unknown:
        warn(
            f"{_shown(path)} tells {', '.join(f'`{name}`' for name in unknown)} as a pickle only, which is not read: the "
            "default is taken. It matters if you train on; give it as a keyword then."
        )
    return stream, objects


def policy_settings(path: pathlib.Path) -> dict[str, Any]:
    """
    :param path: The zip file of a model
    :return: What its policy is made with, nothing of it unpickled
    :raises ValueError: As in :func:`safe_load`
    """
    settings, plain = read_settings(content_of(path), path)
    found = {}
    for name in (*NEEDED, "use_sde"):
        try:
            if name in settings:
                found[name] = rebuilt(name, settings, plain)
        except NotPlainError as error:
            raise _refusal(path, name, error) from None
    return found


def _refusal(path: object, name: str, error: NotPlainError, can_give_env: bool = False) -> ValueError:
    hint = " Give `env`, whose space it is then." if can_give_env and name.endswith("_space") else ""
    return ValueError(
        f"{_shown(path)} cannot be loaded without unpickling: {name} cannot be rebuilt from its plain text ({error}).{hint} "
        "If you trust the file, load it without `safe_load`."
    )


def content_of(path: File) -> io.BytesIO:
    """A file, or a stream from where it is, as bytes in memory: what is checked is what is loaded."""
    if isinstance(path, io.BufferedIOBase):
        return io.BytesIO(path.read())
    with open_path(path, "r", suffix="zip") as file:
        return io.BytesIO(file.read())


def read_settings(stream: io.BytesIO, path: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a zip file as SB3 has written them, and those that are there in plain JSON too."""
    with naming_damage(_shown(path), "a zip file saved by a Stable-Baselines3 algorithm"), zipfile.ZipFile(stream) as archive:
        settings = parse_json(read_member(archive, "data"), "data")
        plain = parse_json(read_member(archive, MEMBER), MEMBER) if MEMBER in archive.namelist() else {}
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} has changed")
        if not (isinstance(settings, dict) and isinstance(plain, dict)):
            raise ValueError("its settings are no JSON object")
    stream.seek(0)
    return settings, plain


def add_plain_settings(content: io.BytesIO, learner: BaseAlgorithm) -> None:
    """
    :param content: A zip file that SB3 has just written. What it holds as a pickle is added in plain JSON, where it can be
    :param learner: The model in it
    """
    plain = {}
    with zipfile.ZipFile(content, "a") as archive:
        for name, entry in json.loads(archive.read("data")).items():
            if is_pickled(entry) and name not in MADE_ANEW:
                try:
                    plain[name] = encoded(vars(learner)[name])
                except NotPlainError:
                    continue
        archive.writestr(MEMBER, json.dumps(plain))


def _shown(path: object) -> str:
    return "The stream" if isinstance(path, io.BufferedIOBase) else str(path)


def is_pickled(entry: Any) -> bool:
    """Whether SB3 would unpickle a setting."""
    return isinstance(entry, dict) and ":serialized:" in entry


def rebuilt(
    name: str,
    settings: Mapping[str, Any],
    plain: Mapping[str, Any],
    policies: Iterable[type] = (),
    env: GymEnv | None = None,
) -> Any:
    """
    :param name: Name of a setting
    :param settings: All of them as SB3 has written them
    :param plain: Those that are told in plain JSON
    :param policies: Classes of policies that may be meant beside those of known packages
    :param env: Whose spaces are taken if the text of theirs is the same but not exact
    :return: Its value
    :raises NotPlainError: It cannot be made without unpickling
    """
    entry = settings[name]
    if not is_pickled(entry):
        return entry
    try:
        return decoded(plain[name], policies) if name in plain else _from_text(entry, policies)
    except NotPlainError:
        space = getattr(env, name, None) if name.endswith("_space") else None
        if space is not None and _has_text(space, entry):
            return space
        raise
    # The text may be anybody's
    except Exception as error:
        raise NotPlainError(f"{type(error).__name__}: {error}") from None


# Our own JSON


def _compact(array: np.ndarray) -> np.ndarray:
    # Images have the same bounds everywhere
    return array.flat[0].reshape(()) if array.size and (array == array.flat[0]).all() else array


def _box(low: np.ndarray, high: np.ndarray, shape: list[int], dtype: str) -> spaces.Box[Any]:
    kind: Any = np.dtype(dtype).type
    low, high = (np.broadcast_to(bound, shape).astype(kind) for bound in (low, high))
    return spaces.Box(low, high, tuple(shape), kind)


def _copies(noise: Any, count: int) -> VectorizedActionNoise:
    if count > MOST_COPIES:
        raise NotPlainError(f"it asks for {count:,} copies")
    return VectorizedActionNoise(noise, count)


_KINDS: dict[type, tuple[Callable[[Any], tuple[Any, ...]], Callable[..., Any]]] = {
    spaces.Box: (lambda it: (_compact(it.low), _compact(it.high), it.shape, it.dtype.str), _box),
    spaces.Dict: (lambda it: (list(it.spaces.items()),), lambda items: spaces.Dict(OrderedDict(items))),
    spaces.Discrete: (lambda it: (int(it.n), int(it.start)), lambda n, start: spaces.Discrete(n, start=start)),
    spaces.MultiBinary: (lambda it: (it.shape,), spaces.MultiBinary),
    spaces.MultiDiscrete: (
        lambda it: (it.nvec, it.start, it.dtype.str),
        lambda nvec, start, dtype: spaces.MultiDiscrete(nvec, np.dtype(dtype).type, start=start),
    ),
    TrainFreq: (lambda it: (it.frequency, it.unit.value), lambda n, unit: TrainFreq(n, TrainFrequencyUnit(unit))),
    NormalActionNoise: (lambda it: (it._mu, it._sigma), NormalActionNoise),
    OrnsteinUhlenbeckActionNoise: (
        lambda it: (it._mu, it._sigma, it._theta, it._dt, it.initial_noise),
        OrnsteinUhlenbeckActionNoise,
    ),
    VectorizedActionNoise: (lambda it: (it.base_noise, len(it.noises)), _copies),
    LinearSchedule: (lambda it: (it.start, it.end, it.end_fraction), LinearSchedule),
    ConstantSchedule: (lambda it: (it.val,), ConstantSchedule),
    GeometricSchedule: (lambda it: (it.start, it.end), GeometricSchedule),
    FloatSchedule: (lambda it: (it.value_schedule,), FloatSchedule),
}
"""What a setting may be: the arguments that make it again, and how."""
_BY_NAME = {kind.__name__: make for kind, (_, make) in _KINDS.items()}


def encoded(value: Any) -> Any:
    """
    :param value: A setting
    :return: The same in plain JSON
    :raises NotPlainError: It is something that is not known here
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [encoded(entry) for entry in value]
    if type(value) is dict and OBJECT not in value and all(type(key) is str for key in value):
        return {key: encoded(entry) for key, entry in value.items()}
    if isinstance(value, type):
        return {OBJECT: "class", "of": [value.__module__, value.__qualname__]}
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return {OBJECT: "array", "of": arrays_to_json({"": np.asarray(value)})[""]}
    if type(value) not in _KINDS:
        raise NotPlainError(f"it is a {type(value).__name__}")
    return {OBJECT: type(value).__name__, "of": [encoded(entry) for entry in _KINDS[type(value)][0](value)]}


def decoded(value: Any, policies: Iterable[type] = ()) -> Any:
    """
    :param value: What :func:`encoded` returned, or anything else in the form of JSON
    :param policies: Classes of policies that may be meant beside those of known packages
    :return: The setting
    :raises NotPlainError: It names what is not known here
    """
    if isinstance(value, list):
        return [decoded(entry, policies) for entry in value]
    if not isinstance(value, dict):
        return value
    if OBJECT not in value:
        return {key: decoded(entry, policies) for key, entry in value.items()}
    kind, content = value[OBJECT], value["of"]
    if kind == "class":
        module, name = content
        return _class_named(module, name, policies)
    if kind == "array":
        return arrays_from_json({"": content})[""]
    if kind not in _BY_NAME:
        raise NotPlainError(f"it names {kind!r}")
    return _BY_NAME[kind](*(decoded(entry, policies) for entry in content))


# What SB3 writes beside a pickle, for people to read


def _from_text(entry: Mapping[str, Any], policies: Iterable[type]) -> Any:
    kind = str(entry[":type:"])
    if kind in ("<class 'abc.ABCMeta'>", "<class 'type'>"):
        return _class_told(entry, policies)
    if kind == "<class 'dict'>":
        return {key: _told(value) for key, value in entry.items() if key not in (":type:", ":serialized:")}
    match _CLASS.fullmatch(kind):
        case None:
            raise NotPlainError(f"it is a {kind}")
        case found:
            name = found["name"]
    if name == "Box":
        dtype, shape = np.dtype(entry["dtype"]), entry["_shape"]
        low, high = (_numbers(entry[bound], dtype).reshape(shape) for bound in ("low", "high"))
        return _box(low, high, shape, dtype.str)
    if name == "Discrete":
        return spaces.Discrete(int(entry["n"]), start=int(entry.get("start", 0)))
    if name == "NormalActionNoise":
        return NormalActionNoise(*(_numbers(entry[part], np.dtype(float)) for part in ("_mu", "_sigma")))
    if name in ("FloatSchedule", "LinearSchedule", "ConstantSchedule"):
        return _schedule_told(name, entry)
    raise NotPlainError(f"it is a {name}")


def _told(value: Any) -> Any:
    """An argument of a policy, of whose value SB3 may have written the text."""
    if not isinstance(value, str):
        return value
    if found := _CLASS.fullmatch(value):
        return Name(found["module"], found["name"]).find(*_PARTS)
    if not re.fullmatch(r"[A-Za-z_][\w .-]*", value):
        raise NotPlainError(f"it holds {value[:60]!r}")
    return value


def _numbers(text: str, dtype: np.dtype[Any]) -> np.ndarray:
    """An array of which NumPy's text is there; only if that is exact."""
    found = list(_NUMBER.finditer(text))
    numbers = np.array([float(number[0]) for number in found]).astype(dtype)
    cut_off = [len(number["decimals"] or "") >= SHOWN_DIGITS for number in found]
    last_digits = np.array([10.0 ** (int(number["power"] or 0) - SHOWN_DIGITS) for number in found])
    # What was cut off matters only where neighbouring numbers are closer than the last digit
    if "..." in text or any(cut_off & (np.spacing(np.abs(numbers)) <= last_digits)):
        raise NotPlainError("its text leaves out digits or entries")
    return numbers


def _schedule_told(name: str, entry: Mapping[str, Any]) -> FloatSchedule:
    if name == "FloatSchedule":
        told = re.fullmatch(r"(ConstantSchedule|LinearSchedule)\((.*)\)", entry["value_schedule"])
        if told is None:
            raise NotPlainError(f"it is {entry['value_schedule']!r:.60}")
        name, entry = told[1], dict(part.split("=") for part in told[2].split(", "))
    parts = ("val",) if name == "ConstantSchedule" else ("start", "end", "end_fraction")
    return FloatSchedule(_BY_NAME[name](*(float(entry[part]) for part in parts)))


def _class_told(entry: Mapping[str, Any], policies: Iterable[type]) -> type:
    """A class by its module and what SB3 has written of its attributes."""
    module = str(entry["__module__"])
    known = [*policies, *(vars(import_module(module)).values() if _HOMES.fullmatch(module) else ())]
    written = re.match(r"<function (\w+)\.__init__ at", str(entry.get("__init__", "")))
    fitting = {
        cls
        for cls in known
        if isinstance(cls, type)
        and issubclass(cls, BasePolicy | BaseBuffer)
        and cls.__module__ == module
        and (cls.__name__ == written[1] if written else "__init__" not in vars(cls) and cls.__doc__ == entry.get("__doc__"))
    }
    if len(fitting) != 1:
        raise NotPlainError(f"it is a class in {module} that is not known here")
    return fitting.pop()


def _class_named(module: str, name: str, policies: Iterable[type]) -> type:
    for cls in policies:
        if (cls.__module__, cls.__qualname__) == (module, name):
            return cls
    if _HOMES.fullmatch(module):
        return Name(module, name).find((module,), (BasePolicy, BaseBuffer))
    return Name(module, name).find(*_PARTS)


def _has_text(space: spaces.Space[Any], entry: Mapping[str, Any]) -> bool:
    """Whether SB3 would write the same text of a space, but for its generator."""
    own = json.loads(data_to_json({"": space}))[""]
    apart = (":serialized:", "_np_random")
    return {key: text for key, text in own.items() if key not in apart} == {
        key: text for key, text in entry.items() if key not in apart
    }
