"""Clauses about saving, loading and copying."""

import copy
import io
import zipfile
from pkgutil import resolve_name
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch as th
from stable_baselines3 import TD3

from sb3_offline_ft.algorithms import ALGORITHMS
from sb3_offline_ft.collapse import LearnerSnapshot
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.testing.clause import clause
from sb3_offline_ft.testing.learners import (
    Algorithm,
    ExtraState,
    State,
    actions_of,
    assert_same,
    assert_same_learner,
    differs,
    extra_state,
    folder,
    make,
    moments,
    reloaded,
    state,
    vector_data,
)
from sb3_offline_ft.testing.point_env import PointEnv, record

PLAIN = (bool, int, float, str, type(None))


def _settings_of(model: OfflineTD3) -> dict[str, Any]:
    """The plain ones among the constructor's arguments that are kept under their own names."""
    names = constructor_arguments(type(model))
    return {name: value for name, value in vars(model).items() if name in names and isinstance(value, PLAIN)}


def _trained(algorithm: Algorithm, settings: dict[str, Any], steps: int = 30, **wanted: Any) -> OfflineTD3:
    common: dict[str, Any] = {"dataset": vector_data(), "offline_steps": 11, "warmup_steps": 10}
    return make(algorithm, settings, **(common | wanted)).learn(steps)


@clause
def check_save_load(algorithm: Algorithm, **settings: Any) -> None:
    """A loaded model is the saved one: networks, optimizers, settings, counters, what it keeps besides, predictions."""
    model = _trained(algorithm, settings)
    before, extra = state(model), extra_state(model)
    with folder() as path:
        model.save(path / "model")
        stream = io.BytesIO()
        model.save(stream)
        stream.seek(0)
        assert_same(state(model), before, "saving changes nothing")
        assert_same(extra_state(model), extra, "saving changes nothing")
        assert isinstance(model.dataset, type(vector_data())), "saving takes the dataset from the model"
        loaded = {
            "a file": algorithm.load(path / "model", device="cpu"),
            "a file, with an environment": algorithm.load(path / "model", env=PointEnv(), device="cpu"),
            "a stream": algorithm.load(stream, device="cpu"),
        }
        for source, again in loaded.items():
            what = f"a model loaded from {source} is the saved one"
            assert type(again) is algorithm, f"{what}, but it is a {type(again).__name__}"
            assert_same_learner(again, model, what)
            assert np.array_equal(actions_of(again), actions_of(model)), f"{what}, but it acts otherwise"
            for name in ("num_timesteps", "_n_updates", "offline_steps_done", "_episode_num", "dataset_fingerprint"):
                expected, found = getattr(model, name), getattr(again, name)
                assert found == expected, f"{what}, but {name} is {found!r}, expected {expected!r}"
            ours, theirs = _settings_of(again), _settings_of(model)
            different = [name for name in theirs if ours.get(name, "nothing") != theirs[name] and name != "dataset"]
            assert not different, f"{what}, but other settings: {', '.join(different)}"
    # Without its data it has no sampler of it
    again = reloaded(model, PointEnv(), dataset=vector_data())
    again.load_offline_data()
    assert_same_learner(again, model, "a loaded model keeps what the saved one kept", extra=True)
    assert_same_learner(reloaded(again), model, "a model saved twice is the same")


@clause
def check_resumed_pretraining(algorithm: Algorithm, **settings: Any) -> None:
    """Pretraining that is saved in the middle, loaded and resumed ends, to the bit, where uninterrupted pretraining does."""
    whole = make(algorithm, settings, dataset=vector_data()).pretrain(33)
    half = make(algorithm, settings, dataset=vector_data()).pretrain(16)
    with folder() as path:
        half.save(path / "model")
        th.rand(3)
        np.random.rand(3)
        resumed = algorithm.load(path / "model", device="cpu", dataset=vector_data())
    assert resumed.offline_steps_done == 16, f"{resumed.offline_steps_done} offline steps are counted, expected 16"
    resumed.pretrain(17)
    assert_same_learner(resumed, whole, "resumed pretraining is the same to the bit", extra=True)


@clause
def check_resumed_finetuning(algorithm: Algorithm, **settings: Any) -> None:
    """Model and replay buffer, saved and loaded, go on as the saved learner does in the same environment, to the bit."""
    model = _trained(algorithm, settings)
    resumed = reloaded(model, PointEnv(), with_buffer=True, dataset=vector_data())
    model.set_env(PointEnv())
    assert resumed.replay_buffer is not None and model.replay_buffer is not None
    assert np.array_equal(resumed.replay_buffer.rewards, model.replay_buffer.rewards), "the replay buffer is not the saved one"
    for learner in (model, resumed):
        learner.set_random_seed(5)
        learner.learn(25, reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps == 55, f"after 30 + 25 steps {resumed.num_timesteps} are counted"
    assert_same_learner(resumed, model, "resumed finetuning is the same to the bit", extra=True)


@clause
def check_files_hold_no_data(algorithm: Algorithm, **settings: Any) -> None:
    """Neither the model's file nor that of the replay buffer holds offline data, whatever its size."""
    sizes = {}
    for n_rows in (100, 5000):
        model = _trained(algorithm, settings, steps=15, dataset=record(PointEnv(), n_rows), buffer_size=50)
        with folder() as path:
            model.save(path / "model")
            model.save_replay_buffer(path / "buffer.npz")
            with zipfile.ZipFile(path / "model.zip") as archive:
                sizes[n_rows] = sum(entry.file_size for entry in archive.infolist()), (path / "buffer.npz").stat().st_size
    for index, what in enumerate(("model", "replay buffer")):
        growth = sizes[5000][index] - sizes[100][index]
        assert abs(growth) < 1000, f"the file of the {what} grows by {growth} bytes with 4,900 more offline rows"


@clause
def check_dataset_is_found_again(algorithm: Algorithm, **settings: Any) -> None:
    """A model whose data was given as a spec is loaded with that spec and its fingerprint, and pretrains on."""
    spec = "bundled:pendulum-medium"
    model = make(algorithm, settings, "Pendulum-v1", dataset=spec).pretrain(3)
    loaded = reloaded(model)
    found = (loaded.dataset, loaded.dataset_fingerprint)
    assert found == (spec, model.dataset_fingerprint), f"the loaded model has the dataset {found}"
    loaded.pretrain(3)
    assert loaded.offline_steps_done == 6, f"{loaded.offline_steps_done} offline steps are counted, expected 6"


@clause
def check_exchange(algorithm: Algorithm, **settings: Any) -> None:
    """Its files and those of SB3's ``TD3`` and of the other algorithms of this package load into one another."""
    partners: list[type[TD3]] = [TD3, OfflineTD3, *map(resolve_name, ALGORITHMS.values())]
    for partner in partners:
        with folder() as path:
            for saver, loader in ((algorithm, partner), (partner, algorithm)):
                what = f"{loader.__name__} loads what {saver.__name__} saved"
                model = _saved_by(saver, settings if saver is algorithm else {})
                model.save(path / "model")
                # What SB3 saved has no setting of it
                wanted: dict[str, Any] = {"warmup_steps": 0} if issubclass(loader, OfflineTD3) else {}
                loaded = loader.load(path / "model", env=PointEnv(), device="cpu", **wanted)
                assert type(loaded) is loader, f"{what}: it is a {type(loaded).__name__}"
                assert_same_learner(loaded, model, what)
                assert np.array_equal(actions_of(loaded), actions_of(model)), f"{what}, but it acts otherwise"
                if isinstance(loaded, OfflineTD3):
                    assert loaded.remaining_offline_steps == 0, f"{what}, but would pretrain it again"
                updates = loaded._n_updates
                loaded.learn(10, reset_num_timesteps=False)
                assert loaded._n_updates > updates, f"{what}, but does not train on"


def _saved_by(algorithm: type[TD3], settings: dict[str, Any]) -> TD3:
    if issubclass(algorithm, OfflineTD3):
        return _trained(algorithm, settings, steps=15)
    common: dict[str, Any] = {"policy_kwargs": {"net_arch": [16, 16]}, "batch_size": 8, "seed": 0, "device": "cpu"}
    return algorithm("MlpPolicy", PointEnv(), learning_starts=10, buffer_size=1000, **common).learn(15)


@clause
def check_parameters(algorithm: Algorithm, **settings: Any) -> None:
    """``set_parameters`` makes another learner act and update as the one of ``get_parameters``, without a tie between them."""
    model = _trained(algorithm, settings)
    # Autograd's Adam changes its moments in place, wherever they come from
    other = make(algorithm, settings, seed=1, dataset=vector_data(), kernel="autograd")
    assert differs(state(other), state(model)), "learners with different seeds start with the same networks"
    other.set_parameters(model.get_parameters(), exact_match=True, device="cpu")
    assert_same_learner(other, model, "parameters that are set are those that were got")
    assert np.array_equal(actions_of(other), actions_of(model)), "with the same parameters it acts otherwise"
    expected, expected_moments = state(model), moments(model)
    other.pretrain(4)
    assert_same(state(model), expected, "training one learner leaves the other's networks alone")
    assert_same(moments(model), expected_moments, "training one learner leaves the other's optimizers alone")


@clause
def check_copies(algorithm: Algorithm, **settings: Any) -> None:
    """``copy.deepcopy`` and ``cloudpickle`` make independent learners, as they do of SB3's ``TD3``."""
    model = _trained(algorithm, settings)
    for what, twin in (
        ("a deep copy", copy.deepcopy(model)),
        ("an unpickled copy", cloudpickle.loads(cloudpickle.dumps(model))),
    ):
        assert_same_learner(twin, model, f"{what} is the same", extra=True)
        expected = state(model)
        twin.learn(15, reset_num_timesteps=False)
        assert differs(state(twin), expected), f"{what} does not train"
        assert_same(state(model), expected, f"training {what} leaves the original alone")


@clause
def check_snapshot(algorithm: Algorithm, **settings: Any) -> None:
    """``LearnerSnapshot`` puts it back, in memory and through a file: it does the same updates again, to the bit."""
    model = _trained(algorithm, settings)
    snapshot = LearnerSnapshot.take(model)
    taken = state(model)
    with folder() as path:
        snapshot.save(path / "snapshot")
        read = LearnerSnapshot.load(path / "snapshot")

    def go_on() -> tuple[State, ExtraState]:
        for _ in range(9):
            model.train(1, model.batch_size)
        return state(model), extra_state(model)

    expected, extra = go_on()
    assert differs(expected, taken), "nine gradient steps change nothing"
    for what, kept in (("a snapshot", snapshot), ("a snapshot from a file", read)):
        kept.restore(model)
        assert_same(state(model), taken, f"{what} restores the networks")
        found, found_extra = go_on()
        assert_same(found, expected, f"after {what} the same updates follow")
        assert_same(found_extra, extra, f"after {what} the same updates follow")
