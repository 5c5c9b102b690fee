"""Files that version 0.1.0 wrote are opened, and what was saved in the middle of something goes on from there."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_offline_ft import TD3C, CollapseGuard, LearnerSnapshot
from tests.old_files import write

FOLDER = Path(__file__).parent / "old_files" / "0.1.0"


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def no_warning_of_short_runs() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in ("`constraint_reference='best'` learns", "The warm-up"):
            warnings.filterwarnings("ignore", message)
        yield


@pytest.mark.parametrize("name", write.MODELS)
def test_old_model_acts_as_it_did_and_goes_on_as_it_would_have(name: str, expected: dict[str, np.ndarray]) -> None:
    model, actions = write.go_on(name, FOLDER)
    np.testing.assert_allclose(actions, expected[f"{name}_actions"], atol=1e-5)
    # Another processor rounds otherwise, and 40 steps amplify it
    np.testing.assert_allclose(write.weights(model), expected[f"{name}_weights"], atol=1e-3)


def test_old_model_goes_on_with_the_replay_buffer_in_its_file(expected: dict[str, np.ndarray]) -> None:
    # Of a dataset that was an object only the buffer knows
    with pytest.warns(UserWarning, match="given as an object"):
        model = write.go_on_with_buffer(FOLDER)
    assert model.replay_buffer is not None and model.replay_buffer.size() == 60 + write.STEPS_AFTER_LOADING
    np.testing.assert_allclose(write.weights(model), expected["with_buffer_weights"], atol=1e-3)


def test_old_guard_goes_on_with_its_reference_and_counts() -> None:
    model = TD3C.load(FOLDER / "guarded.zip", env=write.make_env(), device="cpu")
    saved = json.loads(model.__dict__["collapse_guard_state"])
    guard = CollapseGuard(**write.GUARD)
    model.learn(write.STEPS_AFTER_LOADING, callback=guard, reset_num_timesteps=False)
    start = next(event for event in guard.events if event["event"] == "start")
    assert start["resumed"]
    assert next(event["episode"] for event in guard.events if event["event"] == "episode") == saved["counts"][0] + 1


def test_old_snapshot_restores_a_learner() -> None:
    snapshot = LearnerSnapshot.load(FOLDER / "snapshot.pt")
    model = TD3C.load(FOLDER / "constrained.zip", env=write.make_env(), device="cpu")
    saved = write.weights(model)
    with th.no_grad():
        for parameter in model.actor.parameters():
            parameter += 1.0
    snapshot.restore(model)
    np.testing.assert_array_equal(write.weights(model), saved)
