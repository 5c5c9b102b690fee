"""One good example of every kind of file that is read, and how it is read: all of it, as the commands do."""

import gzip
import json
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pandas as pd
import torch as th
import yaml
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import (
    TD3BC,
    TD3C,
    ChampionChallenger,
    CheckpointRun,
    CollapseGuard,
    LearnerSnapshot,
    load_dataset,
    resume,
)
from sb3_offline_ft.buffers.files import read_arrays
from sb3_offline_ft.collapse.events import encode_events, read_events
from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.common.reading import read_text
from sb3_offline_ft.controllers.contract import contract_file, read_contract, spaces_of
from sb3_offline_ft.datasets import check_spec
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.tables import read_tables
from sb3_offline_ft.datasets.files.zoo import read_zoo_yaml
from sb3_offline_ft.evaluation import summarize_run
from sb3_offline_ft.evaluation.robustness.result import Policy, Response, RobustnessResult
from sb3_offline_ft.export import export_policy
from sb3_offline_ft.policies.guide import read_zip
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.engine.folder import read_result
from sb3_offline_ft.trial.journal import Journal
from sb3_offline_ft.trial.reading import read_plan
from sb3_offline_ft.trial.report import what_was_expected

HERE = Path(__file__).parent
ENV = "Pendulum-v1"
EPISODES, STEPS = 3, 20
N = EPISODES * STEPS
SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu", "batch_size": 8}


@dataclass(frozen=True)
class Format:
    """
    A kind of file.

    :param make: Writes an example into an empty folder
    :param files: What may be mutated: names in the folder
    :param read: Reads what is in the folder, and gives what says whether it is the same
    :param fits: Whether what was found may be there after a change of bytes alone, where checksums or hashes guard all values
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], str]
    fits: Callable[[str, str], bool] | None = None


def never(found: str, expected: str) -> bool:
    """Values that a checksum guards are never others."""
    return False


def columns() -> dict[str, np.ndarray]:
    """Arrays of a small dataset."""
    rng = np.random.default_rng(0)
    ends = np.zeros(N, bool)
    ends[STEPS - 1 :: STEPS] = True
    return {
        "observations": rng.normal(size=(N, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, 1)).astype(np.float32),
        "rewards": rng.normal(size=N).astype(np.float32),
        "terminations": np.zeros(N, bool),
        "truncations": ends,
        "next_observations": rng.normal(size=(N, 3)).astype(np.float32),
    }


def make_npz(folder: Path) -> None:
    np.savez_compressed(folder / "data.npz", **columns())


def make_keyed_npz(folder: Path) -> None:
    arrays = columns()
    for name in ("observations", "next_observations"):
        array = arrays.pop(name)
        arrays |= {f"{name}/position": array[:, :2], f"{name}/velocity": array[:, 2:]}
    np.savez(folder / "data.npz", **arrays)


def make_hdf5(folder: Path) -> None:
    with h5py.File(folder / "data.hdf5", "w") as file:
        for name, array in columns().items():
            file.create_dataset(name, data=array, **({"compression": "gzip"} if name == "actions" else {}))


def load(name: str) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        check_spec(str(folder / name), download=False)
        return load_dataset(str(folder / name), download=False).fingerprint

    return read


def make_minari(data_format: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        arrays = columns()
        buffers = []
        for index in range(EPISODES):
            rows = slice(index * STEPS, (index + 1) * STEPS)
            buffers.append(
                EpisodeBuffer(
                    id=index,
                    observations=list(np.vstack([arrays["observations"][rows], np.ones((1, 3), np.float32)])),
                    actions=list(arrays["actions"][rows]),
                    rewards=[float(one) for one in arrays["rewards"][rows]],
                    terminations=[False] * STEPS,
                    truncations=[False] * (STEPS - 1) + [True],
                    infos={},
                )
            )
        os.environ["MINARI_DATASETS_PATH"] = str(folder / "root")
        minari.create_dataset_from_buffers(
            "made/up-v0",
            buffers,
            env=ENV,
            observation_space=spaces.Box(-10, 10, (3,), np.float32),
            action_space=spaces.Box(-1, 1, (1,), np.float32),
            data_format=data_format,
            description="x", author="x", author_email="x@x.x", code_permalink="x", algorithm_name="x",
        )  # fmt: skip
        del os.environ["MINARI_DATASETS_PATH"]
        shutil.move(folder / "root" / "made" / "up-v0" / "data", folder / "data")
        shutil.rmtree(folder / "root")

    return make


def table() -> pd.DataFrame:
    arrays = columns()
    named = {f"obs_{index}": arrays["observations"][:, index].astype(float) for index in range(3)}
    ends = {"terminated": arrays["terminations"].astype(int), "truncated": arrays["truncations"].astype(int)}
    episode = np.repeat(np.arange(EPISODES), STEPS)
    return pd.DataFrame(
        {"episode": episode, **named, "action_0": arrays["actions"][:, 0], "reward": arrays["rewards"], **ends}
    )


def make_parquet(folder: Path) -> None:
    frame = table()
    frame["action_0"] = [np.array([value, 0.5]) for value in frame["action_0"]]
    frame.to_parquet(folder / "data.parquet")


def make_csv(folder: Path) -> None:
    table().round(4).to_csv(folder / "data.csv", index=False)


def make_packed_csv(folder: Path) -> None:
    (folder / "data.csv.gz").write_bytes(gzip.compress(table().round(4).to_csv(index=False).encode()))


def convert(name: str) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        return read_tables([folder / name]).fingerprint

    return read


MAP = {"observations": ["obs_*"], "actions": ["action_0"], "reward": "reward", "truncated": "truncated", "episode": "episode"}


def make_map(folder: Path) -> None:
    make_csv(folder)
    (folder / "columns.yml").write_text(yaml.safe_dump(MAP))
    lines = [f"{key} = {json.dumps(value)}" for key, value in MAP.items()]
    (folder / "columns.toml").write_text("\n".join(lines) + "\n")


def read_maps(folder: Path) -> str:
    maps = [ColumnMap.from_file(folder / name) for name in ("columns.yml", "columns.toml")]
    return " ".join(read_tables([folder / "data.csv"], each).fingerprint for each in maps)


def make_study(folder: Path) -> None:
    methods = {name: {"algorithm": name, "hyperparams": {"batch_size": 32}} for name in ("td3", "td3bc", "td3c")}
    content = {
        "name": "small", "env": ENV, "datasets": {"medium": "bundled:pendulum-medium"}, "seeds": [0, 1, 2],
        "interactions": 20000, "evaluation": {"every": 500, "episodes": 5}, "methods": methods,
        "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 100}},
    }  # fmt: skip
    content |= {"factors": {"tau": [0.005, 0.01]}, "reference_method": "td3c", "random_return": -1200.0}
    (folder / "study.yml").write_text(yaml.safe_dump(content, sort_keys=False))


def read_study(folder: Path) -> str:
    protocol = Protocol.load(folder)
    return repr([protocol.name, protocol.interactions, protocol.evaluation, [cell.name for cell in protocol.cells()]])


TRIAL = {
    "baseline": "random", "candidate": "zero", "env": ENV, "primary": {"metric": "return", "smallest_effect": 50.0},
    "budget": {"episodes": 40}, "seed": 3, "metrics": {"energy": {"from": "info.energy", "better": "lower"}},
    "stages": [{"name": "shadow", "episodes": 3}, {"name": "pilot", "episodes": 8, "share": 0.25},
               {"name": "ramp 50 %", "episodes": 12, "share": 0.5}],
    "guardrails": {"energy": {"margin": 5.0}}, "blocks": {"episodes": 4, "wash_in_steps": 5},
    "abort": {"limits": {"info.energy": {"max": 10.0}}, "most": 2},
    "robustness": {"seeds": 4, "perturb": {"gravity": [9.0, 10.0]}},
}  # fmt: skip


def make_trial(folder: Path) -> None:
    (folder / "trial.yml").write_text(yaml.safe_dump(TRIAL, sort_keys=False))


def read_trial(folder: Path) -> str:
    return read_plan(folder).digest


def make_journal(folder: Path) -> None:
    journal = Journal(folder / "journal.jsonl")
    for index in range(12):
        journal.append("episode", episode=index, metrics={"return": -100.5 * index}, excluded=None, arm="baseline")


def read_journal(folder: Path) -> str:
    return json.dumps(Journal(folder / "journal.jsonl").events)


def is_beginning(found: str, expected: str) -> bool:
    """That the last lines of a journal are missing cannot be seen."""
    return expected.startswith(found[:-1])


def learner() -> TD3BC:
    model = TD3BC("MlpPolicy", gym.make(ENV), dataset="bundled:pendulum-medium?episodes=1", offline_steps=2, seed=0, **SMALL)
    model.pretrain(2)
    return model


def make_buffer(folder: Path) -> None:
    model = learner()
    model.learn(30)
    model.save_replay_buffer(folder / "buffer.npz")


def read_buffer(folder: Path) -> str:
    # As data, and as the learner's own memory
    data = load_dataset(str(folder / "buffer.npz")).fingerprint
    facts, arrays = read_arrays(folder / "buffer.npz")
    return data + json.dumps(facts) + repr({name: array.tobytes() for name, array in arrays.items()})


EVENTS: list[dict[str, Any]] = [
    {"event": "start", "timestep": 0, "episode": 0, "settings": {"alpha": 0.05}},
    *({"event": "episode", "timestep": 200 * index, "episode": index, "return": -1.5 * index} for index in range(8)),
]


def make_events(folder: Path) -> None:
    (folder / "collapse_events.jsonl").write_bytes(encode_events(EVENTS))


def read_event_file(folder: Path) -> str:
    return repr(read_events(folder / "collapse_events.jsonl"))


RUN = "medium/td3c"


def make_result(folder: Path) -> None:
    with tarfile.open(HERE.parent / "studies" / "pendulum" / "runs.tar.xz") as archive:
        names = [name for name in archive.getnames() if name.startswith(f"runs/{RUN}/seed0-")]
        archive.extractall(folder, [archive.getmember(name) for name in names], filter="data")
    (run,) = (folder / "runs" / RUN).iterdir()
    shutil.move(run, folder / "seed0")
    shutil.rmtree(folder / "runs")


def read_cell(folder: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = read_result(folder / "seed0")
    if result is None:
        raise ValueError(str(caught[-1].message) if caught else "nothing was said")
    return result.to_json()


def make_robustness(folder: Path) -> None:
    levels = (0.8, 1.0, 1.2)
    rows = tuple({"return": (-100.0, -120.0, -90.5 - level)} for level in levels)
    response = Response("gravity", "the factor of gravity", 1.0, levels, {"policy": rows})
    RobustnessResult(ENV, {}, 0, -1200.0, {"policy": Policy("a.zip", "0" * 64)}, (response,), {"numpy": "2"}).save(
        folder / "robustness.json"
    )


def read_robustness(folder: Path) -> str:
    result = RobustnessResult.read(folder / "robustness.json")
    kept = [result.kept(role, response) for role in result.policies for response in result.responses]
    return repr((result, kept, result.metrics, result.n_seeds))


def make_snapshot(folder: Path) -> None:
    LearnerSnapshot.take(learner()).save(folder / "learner.pt")


def read_snapshot(folder: Path) -> str:
    snapshot = LearnerSnapshot.load(folder / "learner.pt")
    return repr({name: value for name, value in sorted(vars(snapshot).items())})


def make_run(folder: Path) -> None:
    run = folder / "td3bc" / f"{ENV}_1"
    (run / ENV).mkdir(parents=True)
    learner().save(run / ENV)
    rng = np.random.default_rng(0)
    np.savez(run / "evaluations.npz", timesteps=np.arange(5), results=rng.normal(size=(5, 3)), ep_lengths=np.full((5, 3), 200))
    rows = "".join(f"{-1.5 * index},200,{index}.25\n" for index in range(6))
    (run / "0.monitor.csv").write_text(f'#{{"t_start": 17.5, "env_id": "{ENV}"}}\nr,l,t\n{rows}')


def read_run(folder: Path) -> str:
    return repr(summarize_run(folder / "td3bc" / f"{ENV}_1")).replace(str(folder), "")


def make_config(folder: Path) -> None:
    (folder / "config.yml").write_text(
        "!!python/object/apply:collections.OrderedDict\n- - - batch_size\n    - 256\n  - - normalize\n    - false\n"
        "  - - policy\n    - MlpPolicy\n  - - range\n    - !!python/tuple [1, 2]\n"
    )


def read_config(folder: Path) -> str:
    return repr(read_zoo_yaml(folder / "config.yml"))


def make_guide(folder: Path) -> None:
    learner().save(folder / "guide.zip")


def read_guide(folder: Path) -> str:
    with naming_damage(folder / "guide.zip", "a zip file saved by a Stable-Baselines3 algorithm"):
        settings, weights = read_zip(folder / "guide.zip", th.device("cpu"))
        return repr(sorted(settings)) + repr({name: weight.sum().item() for name, weight in weights.items()})


STATES: dict[str, tuple[str, Callable[[], Any]]] = {
    "guard": ("collapse_guard_state", lambda: CollapseGuard(verbose=0, signal_freq=0)),
    "champion": (
        "champion_challenger_state",
        lambda: ChampionChallenger(verbose=0, random_return=-1600.0, min_updates=3, risk_budget=0.9),
    ),
}


def short_env() -> gym.Env[Any, Any]:
    return Monitor(gym.make(ENV, max_episode_steps=5))


def make_state(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        name, callback = STATES[kind]
        model = TD3C("MlpPolicy", short_env(), learning_starts=5, seed=0, **SMALL)
        model.learn(80, callback=callback())
        model.save(folder / "learner.zip")
        assert kind == "guard" or json.loads(getattr(model, name))["contest"]["budget"], "it is not worth damaging"
        (folder / "state.json").write_text(getattr(model, name))

    return make


def read_state(kind: str) -> Callable[[Path], str]:
    """A state is an attribute of the learner; what is said of it when it cannot be taken up is a warning."""

    def read(folder: Path) -> str:
        name, callback = STATES[kind]
        file = folder / "state.json"
        model = TD3C.load(folder / "learner.zip", env=short_env(), safe_load=True)
        # No file in reality: what is no text in UTF-8 cannot be there
        setattr(model, name, read_text(file))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model.learn(7, callback=callback(), reset_num_timesteps=False)
            except ValueError as error:
                if "`segment_steps` is" not in str(error):
                    raise
                raise ValueError(f"{file}: {error}") from error
        said = [text for one in caught if "cannot be taken up" in (text := str(one.message))]
        if said:
            raise ValueError(f"{file}: {said[0]}")
        return str(getattr(model, name))

    return read


def make_checkpoint(folder: Path) -> None:
    model = TD3C("MlpPolicy", short_env(), learning_starts=5, buffer_size=100, seed=0, **SMALL)
    model.learn(40, callback=CheckpointRun(save_freq=20, path=folder))
    # As if the run had died
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.split("_")[1]) > 20:
            shutil.rmtree(path)


def read_checkpoint(folder: Path) -> str:
    model = resume(folder, short_env())
    model.learn(40)
    weights = (value.numpy().tobytes() for value in model.policy.state_dict().values())
    return sha256(b"".join([*weights, model.replay_buffer.observations.tobytes()])).hexdigest()


def make_expectations(folder: Path) -> None:
    make_trial(folder)
    chances = {kind: {"go": go, "no_go": 5, "trials": 100} for kind, go in (("better", 80), ("equal", 5), ("worse", 1))}
    (folder / "plan.json").write_text(json.dumps(chances | {"digest": read_plan(folder).digest, "verdict": None}))


def read_expectations(folder: Path) -> str:
    if not os.path.lexists(folder / "plan.json"):
        raise FileNotFoundError(f"{folder / 'plan.json'} is gone, as before a plan is made")
    return repr(what_was_expected(folder, read_plan(folder)))


def is_told(found: str, _: str) -> bool:
    """That a plan was not asked for must not be said of one that is there."""
    return "was not asked" not in found


def make_contract(folder: Path) -> None:
    learner().save(folder / "learner.zip")
    export_policy(folder / "learner.zip", folder / "policy.pt", data="bundled:pendulum-medium?episodes=1")


def read_contract_file(folder: Path) -> str:
    policy = folder / "policy.pt"
    contract = read_contract(policy)
    return repr(contract and (contract, spaces_of(contract, contract_file(policy))))


_RUN = f"td3bc/{ENV}_1"
_CHECKPOINT = ("checkpoints/step_*/*", "checkpoints/buffer/*")
_SEED = ("seed0/manifest.json", "seed0/evaluations.npz", "seed0/training.npz")

FORMATS = {
    "npz": Format(make_npz, ("data.npz",), load("data.npz"), fits=never),
    "npz with keys": Format(make_keyed_npz, ("data.npz",), load("data.npz"), fits=never),
    "hdf5": Format(make_hdf5, ("data.hdf5",), load("data.hdf5")),
    "minari hdf5": Format(make_minari("hdf5"), ("data/metadata.json", "data/main_data.hdf5"), load("data")),
    "minari arrow": Format(make_minari("arrow"), ("data/metadata.json", "data/0/*", "data/1/*"), load("data")),
    "minari parquet": Format(make_minari("parquet"), ("data/metadata.json", "data/0/*", "data/1/*"), load("data")),
    "parquet": Format(make_parquet, ("data.parquet",), convert("data.parquet")),
    "csv": Format(make_csv, ("data.csv",), convert("data.csv")),
    "csv.gz": Format(make_packed_csv, ("data.csv.gz",), convert("data.csv.gz"), fits=never),
    "column map": Format(make_map, ("columns.yml", "columns.toml"), read_maps),
    "study.yml": Format(make_study, ("study.yml",), read_study),
    "trial.yml": Format(make_trial, ("trial.yml",), read_trial),
    "trial journal": Format(make_journal, ("journal.jsonl",), read_journal, is_beginning),
    "replay buffer": Format(make_buffer, ("buffer.npz",), read_buffer, fits=never),
    "events": Format(make_events, ("collapse_events.jsonl",), read_event_file),
    "study run": Format(make_result, _SEED, read_cell),
    "robustness.json": Format(make_robustness, ("robustness.json",), read_robustness),
    "snapshot": Format(make_snapshot, ("learner.pt",), read_snapshot, fits=never),
    "zoo run": Format(make_run, (f"{_RUN}/evaluations.npz", f"{_RUN}/0.monitor.csv", f"{_RUN}/{ENV}.zip"), read_run),
    "zoo config": Format(make_config, ("config.yml",), read_config),
    "guard's state": Format(make_state("guard"), ("state.json",), read_state("guard")),
    "champion's state": Format(make_state("champion"), ("state.json",), read_state("champion")),
    "checkpoint": Format(make_checkpoint, _CHECKPOINT, read_checkpoint, fits=never),
    "plan.json": Format(make_expectations, ("plan.json",), read_expectations, fits=is_told),
    "contract": Format(make_contract, ("policy.json",), read_contract_file),
    "guide": Format(make_guide, ("guide.zip",), read_guide, fits=never),
}


def make_examples(folder: Path) -> None:
    """Write one example of each format into a folder of its own."""
    for name, each in FORMATS.items():
        (folder / name).mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.make(folder / name)
