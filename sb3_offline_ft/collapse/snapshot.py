"""Exact copies of what an off-policy learner has learned."""

import copy
import io
import os
import random
import zipfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.collapse.fitting import COUNTERS, FIX, check_counters, check_is_number, check_optimizer, check_tensors
from sb3_offline_ft.collapse.learner import extra_state, has_extra_state, position, set_extra_state, set_position
from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.plain import from_plain, to_plain
from sb3_offline_ft.common.reading import read_bytes

FORMAT = "sb3_offline_ft.LearnerSnapshot"
VERSION = 1
PARTS = {
    "algorithm": str,
    "num_timesteps": int,
    "n_updates": int,
    "modules": dict,
    "optimizers": dict,
    "variables": dict,
    "extra": dict,
    "counters": dict,
    "vec_normalize": dict,
    "action_noise": dict,
    "generators": dict,
}


class LearnerSnapshot:
    """
    Everything that makes an off-policy learner behave as it did, copied: networks with their targets and normalization
    statistics, the optimizers' moments, the entropy coefficient, what else the algorithm keeps (a Lagrange multiplier, a
    reference policy), its counters, ``VecNormalize``'s statistics, the state of the action noise and of the generators.

    After :meth:`restore` the learner does the same updates, to the bit, as after :meth:`take`, if its replay buffer holds the
    same rows and draws them alike (balanced replay goes on learning). What counts progress (``num_timesteps``, episodes,
    ``offline_steps_done``), the replay buffer and the environment are not part of it. The position in the life cycle of
    :class:`~sb3_offline_ft.OfflineTD3` is: a snapshot from before the finetuning leads back before it. What the algorithm has
    measured once since then, such as the return of the pretrained policy in a warm-up, it still knows after :meth:`restore`.

    The action noise may be of any class: SB3's own are known, of others the attributes are copied. These stay in memory,
    :meth:`save` leaves them out; and since a generator may be among them, they are restored with the generators only.
    The noise matrix that gSDE has drawn is kept until SB3 draws the next one.

    :param content: What :meth:`take` gathers; a snapshot is made with :meth:`take` or :meth:`load`
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    @property
    def algorithm(self) -> str:
        """Name of the learner's class."""
        return str(self._content["algorithm"])

    @property
    def num_timesteps(self) -> int:
        """Environment steps the learner had done; information only."""
        return int(self._content["num_timesteps"])

    @property
    def n_updates(self) -> int:
        """Gradient steps the learner had done."""
        return int(self._content["n_updates"])

    @property
    def nbytes(self) -> int:
        """Memory that the copied tensors and arrays take."""
        return sum(leaf.nbytes for leaf in _leaves(self._content) if isinstance(leaf, th.Tensor | np.ndarray))

    @property
    def policy_state(self) -> Mapping[str, th.Tensor]:
        """The policy's parameters and statistics, for ``torch.func.functional_call``; not to be changed."""
        return MappingProxyType(self._content["modules"]["policy"])

    @property
    def parameters(self) -> dict[str, Any]:
        """Networks' and optimizers' states, as SB3's ``set_parameters`` takes them; not to be changed."""
        optimizers = {name: entry["state"] for name, entry in self._content["optimizers"].items()}
        return {**self._content["modules"], **optimizers}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.algorithm}, num_timesteps={self.num_timesteps}, n_updates={self.n_updates})"

    @classmethod
    def take(cls, model: OffPolicyAlgorithm) -> "LearnerSnapshot":
        """
        Copy the learner's state, which this does not change.

        :param model: The learner
        :return: The snapshot; it shares no memory with the learner
        :raises ValueError: The action noise is of an unknown class and cannot be copied
        """
        modules, optimizers, variables = _parts_of(model)
        live = {
            "algorithm": type(model).__name__,
            "num_timesteps": int(model.num_timesteps),
            "n_updates": int(model._n_updates),
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizers": {
                name: {"class": type(optimizer).__name__, "state": optimizer.state_dict()}
                for name, optimizer in optimizers.items()
            },
            "variables": variables,
            "extra": extra_state(model),
            "counters": {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)} | position(model),
            "vec_normalize": _vec_normalize_state(model.get_vec_normalize_env()),
            "action_noise": _noise_state(model.action_noise),
            "generators": _generator_state(model),
        }
        return cls(_copied(live))

    def restore(self, model: OffPolicyAlgorithm, generators: bool = True) -> None:
        """
        Make the learner what it was. Parameters, modules and optimizers stay the same objects.

        :param model: The learner the snapshot was taken of, or another with the same algorithm and networks
        :param generators: Whether to restore the random generators too: Python's, NumPy's and torch's global ones, the action
            space's and the algorithm's own. Without them the learner draws other batches than it did
        :raises ValueError: The snapshot does not fit the model, which is unchanged then
        """
        content = _copied(self._content)
        noise = self._checked_noise(model, generators)
        before, noise_before = LearnerSnapshot.take(model), model.action_noise
        try:
            _apply(content, model, noise, generators)
        except Exception as error:
            _apply(before._content, model, noise_before, generators=True)
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"The snapshot of {self.algorithm} is damaged ({type(error).__name__}: {error}). {FIX}")

    def _checked_noise(self, model: OffPolicyAlgorithm, generators: bool) -> ActionNoise | None:
        """The action noise that a model shall have, which the snapshot fits; ``ValueError`` if it does not."""
        try:
            noise = _vectorized_if_needed(self._content["action_noise"], model)
            self._check(model, noise, generators)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damaged(error) from error
        return noise

    def check(self, model: OffPolicyAlgorithm, generators: bool = True) -> None:
        """
        Check that the snapshot can be restored into a model, which :meth:`restore` does by itself.

        :param model: The learner
        :param generators: Whether the random generators shall be restored too
        :raises ValueError: It cannot; names what differs
        """
        self._checked_noise(model, generators)

    def _check(self, model: OffPolicyAlgorithm, noise: ActionNoise | None, generators: bool) -> None:
        what = f"The snapshot of {self.algorithm} does not fit this {type(model).__name__}"
        content = self._content
        modules, optimizers, variables = _parts_of(model)
        for name, saved, live in (
            ("networks", content["modules"], modules),
            ("optimizers", content["optimizers"], optimizers),
            ("tensors", content["variables"], variables),
        ):
            if saved.keys() != live.keys():
                raise ValueError(f"{what}: expected the {name} {', '.join(live)}, found {', '.join(saved) or 'none'}. {FIX}")
        for name, module in modules.items():
            check_tensors(what, name + ".", content["modules"][name], module.state_dict())
        check_tensors(what, "", content["variables"], variables)
        for name, optimizer in optimizers.items():
            check_optimizer(what, name, content["optimizers"][name], optimizer)
        check_counters(what, content["counters"], model)
        if (content["extra"] or has_extra_state(model)) and self.algorithm != type(model).__name__:
            raise ValueError(f"{what}: they keep different things beyond their networks. {FIX}")
        _check_vec_normalize(what, content["vec_normalize"], model.get_vec_normalize_env())
        _check_noise(what, content["action_noise"], noise)
        if generators:
            _check_generators(what, content["generators"], model)

    def state_dict(self) -> dict[str, Any]:
        """Its content, from which another one can be made, but for the state of an action noise of an unknown class."""
        return self._content | {"action_noise": _known_noise(self._content["action_noise"])}

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Write the snapshot to one file, whole or not at all, without pickled objects.

        The state of an action noise of an unknown class is left out.

        :param path: The file; an existing one is replaced
        :raises ValueError: The learner keeps something that is neither a tensor, an array nor a plain value; nothing is
            written then
        """
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "content": to_plain(self.state_dict(), "the snapshot", "keep this snapshot in memory"),
        }
        with atomic_write(path) as file:
            th.save(plain, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: th.device | str = "cpu") -> "LearnerSnapshot":
        """
        Read a snapshot written with :meth:`save`. No code in the file is run.

        :param path: The file
        :param device: Where the networks are kept; :meth:`restore` works from any device to any other
        :return: The snapshot
        :raises ValueError: The file is damaged, is not a snapshot, or was written by a newer version of this package
        """
        stream = io.BytesIO(read_bytes(path))
        with naming_damage(path, "a snapshot saved by `LearnerSnapshot.save`"):
            with zipfile.ZipFile(stream) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} has changed")
            stream.seek(0)
            plain = th.load(stream, map_location="cpu", weights_only=True)
            if not isinstance(plain, dict) or plain.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            version = plain["version"]
            content = from_plain(plain["content"]) if version == VERSION else {}
            wrong = [name for name, kind in PARTS.items() if version == VERSION and not isinstance(content.get(name), kind)]
            if wrong:
                raise ValueError(f"it lacks {', '.join(wrong)}")
        if version != VERSION:
            raise ValueError(
                f"{path} is a snapshot of version {version}, expected {VERSION}: read it with the version of sb3-offline-ft "
                "that wrote it."
            )
        return cls.from_state_dict(content, device)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: th.device | str = "cpu") -> "LearnerSnapshot":
        """
        :param state: What :meth:`state_dict` returned, which becomes the snapshot's own
        :param device: Where the networks are kept
        :return: The snapshot
        """
        for module in state["modules"].values():
            module.update({name: value.to(device) for name, value in module.items() if isinstance(value, th.Tensor)})
        return cls(state)


def _parts_of(
    model: OffPolicyAlgorithm,
) -> tuple[dict[str, th.nn.Module], dict[str, th.optim.Optimizer], dict[str, th.Tensor]]:
    names, variable_names = model._get_torch_save_params()
    objects = {name: recursive_getattr(model, name) for name in names}
    modules = {name: value for name, value in objects.items() if isinstance(value, th.nn.Module)}
    optimizers = {name: value for name, value in objects.items() if name not in modules}
    return modules, optimizers, {name: recursive_getattr(model, name) for name in variable_names}


def _apply(content: dict[str, Any], model: OffPolicyAlgorithm, noise: ActionNoise | None, generators: bool) -> None:
    """Make a learner what a snapshot's content says; the content is its own from then on."""
    modules, optimizers, variables = _parts_of(model)
    for name, module in modules.items():
        state = module.state_dict()
        state.update(content["modules"][name])
        module.load_state_dict(state)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name]["state"])
    with th.no_grad():
        for name, variable in variables.items():
            variable.copy_(content["variables"][name])
    set_extra_state(model, content["extra"], generators)
    set_position(model, content["counters"])
    for name in COUNTERS:
        if name in content["counters"] and hasattr(model, name):
            setattr(model, name, content["counters"][name])
    _restore_vec_normalize(content["vec_normalize"], model.get_vec_normalize_env())
    model.action_noise = noise
    _restore_noise(content["action_noise"], noise, generators)
    if generators:
        _restore_generators(content["generators"], model)


# Copies


def _copied(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else copy.deepcopy(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


# Normalization


def _running_statistics(vec_normalize: VecNormalize) -> dict[str, RunningMeanStd]:
    # Without `norm_obs` there is no such attribute
    observations = vars(vec_normalize).get("obs_rms", {})
    if not isinstance(observations, dict):
        observations = {"": observations}
    return {"returns": vec_normalize.ret_rms, **{f"observations {key}": rms for key, rms in observations.items()}}


def _vec_normalize_state(vec_normalize: VecNormalize | None) -> dict[str, Any]:
    if vec_normalize is None:
        return {}
    statistics = _running_statistics(vec_normalize)
    return {
        "running_returns": vec_normalize.returns,
        "statistics": {name: {"mean": rms.mean, "var": rms.var, "count": rms.count} for name, rms in statistics.items()},
    }


def _check_vec_normalize(what: str, saved: dict[str, Any], vec_normalize: VecNormalize | None) -> None:
    shapes = []
    for state in (_vec_normalize_state(vec_normalize), saved):
        statistics = {name.strip(): np.shape(entry["mean"]) for name, entry in state.get("statistics", {}).items()}
        shapes.append(statistics | {"environments": np.shape(state["running_returns"])} if state else "none")
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{what}: VecNormalize keeps {shapes[0]} in the model's environment and {shapes[1]} in the snapshot. "
            "Restore it into a model whose environment is wrapped in the same way."
        )

    if saved:
        numbers = {"running returns": saved["running_returns"]}
        for name, entry in saved["statistics"].items():
            numbers |= {f"{part} of {name}": entry[part] for part in ("mean", "var", "count")}
            if np.shape(entry["var"]) != np.shape(entry["mean"]) or np.shape(entry["count"]):
                raise ValueError(f"{what}: VecNormalize's {name} have parts of different shapes in the snapshot. {FIX}")
        for name, value in numbers.items():
            check_is_number(what, f"VecNormalize's {name}", value)
            if name.startswith(("var of", "count of")) and (np.asarray(value) < 0).any():
                raise ValueError(f"{what}: VecNormalize's {name} is below 0 in the snapshot. {FIX}")


def _restore_vec_normalize(saved: dict[str, Any], vec_normalize: VecNormalize | None) -> None:
    if vec_normalize is None:
        return
    vec_normalize.returns = saved["running_returns"]
    for name, rms in _running_statistics(vec_normalize).items():
        entry = saved["statistics"][name]
        rms.mean, rms.var, rms.count = entry["mean"], entry["var"], entry["count"]


# Action noise


def _noise_state(noise: ActionNoise | None) -> dict[str, Any]:
    if noise is None or type(noise) is NormalActionNoise:
        return {}
    state: dict[str, Any] = {"class": type(noise).__name__}
    if type(noise) is OrnsteinUhlenbeckActionNoise:
        state["previous"] = np.asarray(noise.noise_prev)
    elif type(noise) is VectorizedActionNoise:
        state["noises"] = [_noise_state(single) for single in noise.noises]
    else:
        try:
            state["attributes"] = copy.deepcopy(vars(noise))
        except Exception as error:
            raise ValueError(
                f"The action noise {type(noise).__name__} cannot be copied ({type(error).__name__}: {error}): "
                "use one of SB3's, or give it a `__deepcopy__` or attributes that can be copied."
            ) from error
    return state


def _known_noise(state: dict[str, Any]) -> dict[str, Any]:
    if "attributes" in state:
        return {}
    if "noises" in state:
        return state | {"noises": [_known_noise(single) for single in state["noises"]]}
    return state


def _keeps_anything(state: dict[str, Any]) -> bool:
    return any(map(_keeps_anything, state["noises"])) if "noises" in state else bool(state)


def _vectorized_if_needed(saved: dict[str, Any], model: OffPolicyAlgorithm) -> ActionNoise | None:
    # As SB3's `learn` does before its first step
    noise = model.action_noise
    if noise is None or "noises" not in saved or isinstance(noise, VectorizedActionNoise) or model.n_envs == 1:
        return noise
    return VectorizedActionNoise(noise, model.n_envs)


def _check_noise(what: str, saved: dict[str, Any], noise: ActionNoise | None) -> None:
    if not _keeps_anything(saved):
        return
    expected, found = type(noise).__name__ if noise is not None else "none", saved["class"]
    if expected == found and isinstance(noise, VectorizedActionNoise) and "noises" in saved:
        expected, found = f"{expected} of {len(noise.noises)}", f"{found} of {len(saved['noises'])}"
    elif expected == found and isinstance(noise, OrnsteinUhlenbeckActionNoise):
        check_is_number(what, "the previous noise", saved["previous"])
        expected, found = (f"{found} of shape {np.shape(array)}" for array in (noise.noise_prev, saved["previous"]))
    if expected != found:
        raise ValueError(
            f"{what}: the action noise is {expected} in the model and {found} in the snapshot. "
            "Restore it into a model with the same action noise and number of environments."
        )
    if isinstance(noise, VectorizedActionNoise) and "noises" in saved:
        for single, entry in zip(noise.noises, saved["noises"], strict=True):
            _check_noise(what, entry, single)


def _restore_noise(saved: dict[str, Any], noise: ActionNoise | None, generators: bool) -> None:
    if noise is None or not _keeps_anything(saved):
        return
    if "previous" in saved and isinstance(noise, OrnsteinUhlenbeckActionNoise):
        noise.noise_prev = saved["previous"]
    elif "noises" in saved and isinstance(noise, VectorizedActionNoise):
        for single, entry in zip(noise.noises, saved["noises"], strict=True):
            _restore_noise(entry, single, generators)
    elif generators:
        vars(noise).clear()
        vars(noise).update(saved["attributes"])


# Generators


def _generator_state(model: OffPolicyAlgorithm) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state(model.device) if model.device.type == "cuda" else None,
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def _check_generators(what: str, saved: dict[str, Any], model: OffPolicyAlgorithm) -> None:
    live = _generator_state(model)
    for name in ("numpy", "action_space"):
        expected, found = live[name]["bit_generator"], saved[name]["bit_generator"]
        if expected != found:
            raise ValueError(
                f"{what}: the random generator {name} is {expected} now and {found} in the snapshot. "
                "Use the same one, or restore with `generators=False`."
            )


def _restore_generators(saved: dict[str, Any], model: OffPolicyAlgorithm) -> None:
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    th.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and model.device.type == "cuda":
        th.cuda.set_rng_state(saved["cuda"], model.device)
    model.action_space.np_random.bit_generator.state = saved["action_space"]
