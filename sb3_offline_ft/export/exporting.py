"""From a saved model to a file that a controller runs, with its contract."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.common.observations import by_key
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.controllers import check_fits, load_controller
from sb3_offline_ft.controllers.contract import CONTRACT, OBSERVATION, VERSION, contract_file, output_name, space_facts
from sb3_offline_ft.controllers.saved_policy import PolicyController
from sb3_offline_ft.datasets import OfflineDataset, load_dataset
from sb3_offline_ft.evaluation.robustness.episodes import make_env
from sb3_offline_ft.export.formats import Format, find_format
from sb3_offline_ft.export.observations import gather, input_space
from sb3_offline_ft.export.parity import DEFINITION, TOLERANCE, Parity, compare
from sb3_offline_ft.export.raw_policy import RawPolicy
from sb3_offline_ft.export.run_facts import RunFacts, dataset_of

EXAMPLE_ROWS = 3
PACKAGES = "sb3-offline-ft stable-baselines3 sb3-contrib gymnasium mujoco numpy torch onnx onnxscript onnxruntime".split()
REPEATING = (gym.wrappers.MaxAndSkipObservation, gym.wrappers.AtariPreprocessing)
# rl_zoo3 has a time limit of its own
ONE_STEP_MODULES = ("gymnasium.wrappers.", "rl_zoo3.gym_patches", "stable_baselines3.common.monitor")
ONE_STEP = [kind.step for kind in (gym.Wrapper, gym.ObservationWrapper, gym.ActionWrapper, gym.RewardWrapper)]
"""How wrappers step that leave the time between two decisions as it is."""
Env = gym.Env[Any, Any]


@dataclass(frozen=True)
class ExportedPolicy:
    """
    What was written.

    :param file: The policy
    :param contract_file: Its contract
    :param contract: What is in it
    :param difference: The largest difference from the original, as a share of the range of the actions
    """

    file: Path
    contract_file: Path
    contract: dict[str, Any]
    difference: float


def export_policy(
    model: str | Path,
    file: str | Path,
    *,
    data: str | None = None,
    env: str | None = None,
    format: str | None = None,
    trust_pickle: bool = False,
) -> ExportedPolicy:
    """
    Write the deterministic policy of a model as one network: raw observations in, actions in the units of the environment out.
    What normalizes observations, and what scales and clips actions, is inside.

    Before anything is written, the new file is compared with the original on at least 1,000 real observations: of ``data``,
    else of the dataset that the model was trained on, else of the environment.

    :param model: A zip file of SB3, sb3-contrib or this package with continuous actions, or a run's folder of rl-zoo3, of
        which the best model is taken. It is unpickled: name only what you trust
    :param file: What to write: ``.onnx``, ``.pt`` (TorchScript) or ``.pt2`` (``torch.export``); the contract gets the same
        name with ``.json``
    :param data: Spec of a dataset
    :param env: Gymnasium id of the environment; that of the run or of the data if omitted
    :param format: ``"onnx"``, ``"torchscript"`` or ``"torch-export"``; by default, what the suffix says
    :param trust_pickle: Whether ``data`` may be unpickled
    :return: What was written
    :raises ValueError: The policy cannot be exported, differs from the original by more than 1e-5 of the range of its actions,
        or there are no observations to see it on; nothing is written then
    :raises FileNotFoundError: There is no such model or dataset
    :raises ImportError: A package is missing
    """
    target = Path(file)
    chosen = find_format(target, format)
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder: choose another name for the policy.")
    _check_replaceable(contract_file(target), target)
    policy = load_controller(str(model))
    if not isinstance(policy, PolicyController):
        raise ValueError(f"{str(model)!r} cannot be exported: expected a .zip that an algorithm saved, or a run's folder.")
    run = RunFacts.beside(policy.file)
    dataset = _dataset(policy, data, trust_pickle)
    env_id = env or run.env_id or (None if dataset is None else dataset.env_id)
    env_kwargs = _env_kwargs(env_id, run, dataset)
    with _environment(policy, env_id, env_kwargs, is_needed=env is not None) as environment:
        raw = policy.observation_space if environment is None else environment.observation_space
        network = RawPolicy(policy.policy, policy.statistics, raw, f"The policy {policy.name!r}").eval()
        observations = gather(policy, raw, dataset, environment)
        with _naming_failure(chosen):
            content = chosen.encode(network, {name: rows[:EXAMPLE_ROWS] for name, rows in observations.inputs.items()})
            parity = compare(policy, chosen.open(content), observations)
        if not parity.is_kept:
            raise ValueError(
                f"{str(target)!r} is not written: on {len(observations):,} observations of {observations.source}, its actions "
                f"differ from those of {policy.name!r} by up to {parity.difference:.2g} of their range, and {TOLERANCE:g} is "
                f"allowed.{' An action is not finite.' if math.isnan(parity.difference) else ''}"
            )
        contract = {
            "contract": CONTRACT,
            "version": VERSION,
            "policy": {"file": target.name, "format": chosen.name, "sha256": hashlib.sha256(content).hexdigest()},
            **_interface(policy, network, environment),
            "environment": None if environment is None else _environment_facts(environment, env_id, env_kwargs),
            "made_of": _origin(policy, run),
            "parity": _parity_facts(parity),
            "guard": run.guard,
            "champion": run.champion,
            "versions": installed_versions(PACKAGES),
        }
    # JSON has neither NaN nor infinities: null, as for bounds that are not there
    plain = json.loads(json.dumps(json_form(contract)), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=1) + "\n"
    # Both are on the disk before either gets its name
    with atomic_write(contract_file(target)) as contract_stream, atomic_write(target) as stream:
        contract_stream.write(text.encode())
        contract_stream.flush()
        os.fsync(contract_stream.fileno())
        stream.write(content)
    return ExportedPolicy(target, contract_file(target), plain, parity.difference)


def _check_replaceable(path: Path, target: Path) -> None:
    if not path.exists():
        return
    found = "something else"
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        content = json.loads(path.read_bytes())
        if content["contract"] == CONTRACT:
            file = content["policy"]["file"]
            if file == target.name or not path.with_name(file).exists():
                return
            found = f"the contract of {file}"
    raise ValueError(f"{str(path)!r} would get the contract, but is {found}: choose another name for the policy.")


def _dataset(policy: PolicyController, data: str | None, trust_pickle: bool) -> OfflineDataset | None:
    if data is not None:
        return load_dataset(data, trust_pickle=trust_pickle)
    spec = dataset_of(policy.file)
    if spec is None:
        return None
    try:
        return load_dataset(spec, download=False)
    except (OSError, ValueError) as error:
        warn(f"The dataset of the model, {spec!r}, cannot be read, so that observations are taken elsewhere ({error})")
        return None


def _env_kwargs(env_id: str | None, run: RunFacts, dataset: OfflineDataset | None) -> dict[str, Any]:
    """Those of the run, or with which the data were recorded, of the same environment."""
    if run.env_id is not None and _is_same(env_id, run.env_id):
        return dict(run.env_kwargs)
    recorded = None if dataset is None else dataset.provenance.get("env_spec")
    if dataset is None or not isinstance(recorded, str) or not _is_same(env_id, dataset.env_id):
        return {}
    with suppress(ValueError, AttributeError):
        # How it was drawn is nobody's business
        return {name: value for name, value in json.loads(recorded).get("kwargs", {}).items() if name != "render_mode"}
    return {}


def _is_same(env_id: str | None, other: str | None) -> bool:
    """An id may begin with the module that registers it."""
    return env_id is not None and other is not None and env_id.rpartition(":")[2] == other.rpartition(":")[2]


def _compare_bounds(policy: PolicyController, env: Env) -> None:
    own, other = policy.action_space, env.action_space
    if isinstance(own, gym.spaces.Box) and isinstance(other, gym.spaces.Box):
        if not (np.allclose(own.low, other.low) and np.allclose(own.high, other.high)):
            warn(
                f"The policy {policy.name!r} was trained with actions {own}, and the environment takes {other}: if a wrapper "
                "scaled them in training, it is not in the exported policy."
            )


@contextmanager
def _environment(
    policy: PolicyController, env_id: str | None, env_kwargs: dict[str, Any], is_needed: bool
) -> Iterator[Env | None]:
    made: Env | None = None
    if env_id is not None:
        try:
            made = make_env(env_id, env_kwargs)
            check_fits(policy, made)
            _compare_bounds(policy, made)
        except ValueError as error:
            if made is not None:
                made.close()
            if is_needed:
                raise
            warn(f"The contract says nothing of the environment. {error}")
            made = None
    try:
        yield made
    finally:
        if made is not None:
            made.close()


@contextmanager
def _naming_failure(chosen: Format) -> Iterator[None]:
    try:
        yield
    # Exporters and runtimes raise anything about operations that they do not know
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"The policy cannot be exported to {chosen.name} ({type(error).__name__}: {reason}).") from error


def _interface(policy: PolicyController, network: RawPolicy, env: Env | None) -> dict[str, Any]:
    raw = policy.observation_space if env is None else env.observation_space
    by_name = by_key(raw)
    inputs = [
        space_facts(key or OBSERVATION, input_space(by_name[key])) | _told(env, "observation", key) for key in network.keys
    ]
    assert policy.action_space is not None
    return {
        "batch": "the first dimension of every input and of the output, of any size; it is not in the shapes",
        "observations_are_dict": network.is_dict,
        "observations": inputs,
        "action": space_facts(output_name(network.keys), input_space(policy.action_space)) | _told(env, "action", ""),
    }


def _told(env: Env | None, what: str, key: str) -> dict[str, Any]:
    """Names and units of the numbers, where the environment's metadata has them."""
    told: dict[str, Any] = {"names": None, "units": None}
    if env is None:
        return told
    space, metadata = getattr(env, f"{what}_space"), env.metadata or {}
    if metadata is env.unwrapped.metadata and space != getattr(env.unwrapped, f"{what}_space"):
        # A wrapper changes what they are of
        return told
    shape = by_key(space)[key].shape or ()
    for kind in told:
        facts = metadata.get(f"{what}_{kind}")
        facts = facts.get(key) if isinstance(facts, dict) else facts
        if facts is not None and (not isinstance(facts, list | tuple) or len(facts) != math.prod(shape)):
            warn(f"The {what}_{kind} of the environment are left out: expected a list of {math.prod(shape)}, found {facts}.")
            facts = None
        told[kind] = facts
    return told


def _environment_facts(env: Env, env_id: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    seconds = _step_seconds(env)
    rate = None if seconds is None else 1 / seconds
    return {"id": env_id, "kwargs": kwargs, "step_seconds": seconds, "steps_per_second": rate}


def _step_seconds(env: Env) -> float | None:
    """MuJoCo's environments say it, and some others; a wrapper may make many steps of one."""
    layer = env
    while isinstance(layer, gym.Wrapper) and not hasattr(layer, "dt"):
        is_known = type(layer).__module__.startswith(ONE_STEP_MODULES) and not isinstance(layer, REPEATING)
        if not is_known and type(layer).step not in ONE_STEP:
            return None
        layer = layer.env
    seconds = getattr(layer, "dt", None)
    return float(seconds) if isinstance(seconds, int | float | np.floating) and 0 < seconds < math.inf else None


def _origin(policy: PolicyController, run: RunFacts) -> dict[str, Any]:
    return {
        "file": str(policy.file),
        "sha256": policy.sha256,
        "policy_class": f"{type(policy.policy).__module__}.{type(policy.policy).__name__}",
        "normalized_by_vecnormalize": policy.statistics is not None and policy.statistics.norm_obs,
        "dataset": dataset_of(policy.file),
        "manifest_sha256": run.manifest_sha256,
    }


def _parity_facts(parity: Parity) -> dict[str, Any]:
    return {
        "largest_difference": parity.difference,
        "allowed": TOLERANCE,
        "definition": DEFINITION,
        "observations": len(parity.observations),
        "from": parity.observations.source,
    }
