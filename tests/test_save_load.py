"""Models and replay buffers go through files: into themselves, into one another, into plain SB3."""

import io
import json
import pickle
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env

from sb3_offline_ft import TD3BC, TD3C, OfflineDataset, OfflineTD3, ReBRAC, load_dataset
from tests import hooks

ENV = "Pendulum-v1"
DATASET = "bundled:pendulum-medium"
SMALL = {"net_arch": [16, 16]}
ALL = [TD3, OfflineTD3, TD3BC, TD3C, ReBRAC]


def trained(algorithm: type[TD3], **settings) -> TD3:
    common = {"policy_kwargs": SMALL, "seed": 0, "device": "cpu", "batch_size": 8, **settings}
    if algorithm is TD3:
        return TD3("MlpPolicy", ENV, learning_starts=10, **common).learn(40)
    if algorithm is TD3C:
        common = {"constraint_reference": "pretrained"} | common
    return algorithm("MlpPolicy", ENV, dataset=DATASET, offline_steps=30, warmup_steps=5, **common).learn(40)


def load(algorithm: type[TD3], path, saved_by: type[TD3], **settings) -> TD3:
    if algorithm is TD3C and saved_by is not TD3C:
        with pytest.warns(UserWarning, match="the Lagrange multiplier starts at its initial value"):
            return algorithm.load(path, **settings)
    return algorithm.load(path, **settings)


def assert_same_learner(a: TD3, b: TD3) -> None:
    for name, value in a.policy.state_dict().items():
        assert th.equal(value, b.policy.state_dict()[name]), name
    for name in ("actor", "critic"):
        x, y = (getattr(model, name).optimizer.state_dict()["state"] for model in (a, b))
        assert x.keys() == y.keys()
        assert all(th.equal(x[key][k], y[key][k]) for key in x for k in x[key])


@pytest.mark.parametrize("saved_by", ALL)
@pytest.mark.parametrize("loaded_by", ALL)
def test_every_algorithm_loads_every_other(saved_by, loaded_by, tmp_path):
    model = trained(saved_by)
    model.save(tmp_path / "model")
    loaded = load(loaded_by, tmp_path / "model", saved_by, env=gym.make(ENV))
    assert type(loaded) is loaded_by
    assert_same_learner(model, loaded)
    observation = model.observation_space.sample()
    assert np.array_equal(model.predict(observation)[0], loaded.predict(observation)[0])
    # and it goes on, and back again
    settings = {} if loaded_by is not TD3C else {"constraint_reference": "pretrained"}
    for name, value in settings.items():
        setattr(loaded, name, value)
    if loaded_by is not TD3:
        assert loaded.remaining_offline_steps == 0
        loaded.warmup_steps = 5
    loaded.learn(20)
    loaded.save(tmp_path / "again")
    # SB3's TD3 carries what it does not know along
    back = load(saved_by, tmp_path / "again", TD3C if loaded_by is TD3 else loaded_by, env=gym.make(ENV))
    assert_same_learner(loaded, back)


@pytest.mark.parametrize(("saved", "given", "expected"), [(None, None, 0.99), (0.5, None, 0.5), (None, 0.0, 0.0)])
def test_a_default_of_another_algorithm_is_not_taken_over(tmp_path, saved, given, expected):
    """A loaded file of TD3BC is finetuned by TD3C as a TD3C that took over its weights: by TD3C's defaults."""
    settings = {} if saved is None else {"policy_averaging": saved}
    trained(TD3BC, **settings).save(tmp_path / "model")
    kwargs = {} if given is None else {"policy_averaging": given}
    loaded = load(TD3C, tmp_path / "model", TD3BC, **kwargs)
    assert loaded.policy_averaging == expected
    loaded.save(tmp_path / "again")
    assert TD3C.load(tmp_path / "again").policy_averaging == expected
    assert TD3BC.load(tmp_path / "again").policy_averaging == (0.0 if expected == 0.99 else expected)


class MineOfTD3C(TD3C):
    """An algorithm as the documentation recommends it, which names its own arguments only."""

    def __init__(self, *args, mine=1, **kwargs):
        self.mine = mine
        super().__init__(*args, **kwargs)


class OtherDefaults(TD3BC):
    def __init__(self, policy, env, *args, gamma=0.9, buffer_size=500, offline_fraction=0.25, n_steps=3, **kwargs):
        own = {"gamma": gamma, "buffer_size": buffer_size, "offline_fraction": offline_fraction, "n_steps": n_steps}
        super().__init__(policy, env, *args, **own, **kwargs)


def test_defaults_of_an_algorithm_that_passes_keywords_on_are_known(tmp_path):
    trained(TD3C).save(tmp_path / "td3c")
    trained(TD3BC).save(tmp_path / "td3bc")
    assert MineOfTD3C.load(tmp_path / "td3c").policy_averaging == 0.99
    with pytest.warns(UserWarning, match="the Lagrange multiplier starts at its initial value"):
        mine = MineOfTD3C.load(tmp_path / "td3bc")
    assert mine.policy_averaging == 0.99
    mine.save(tmp_path / "mine")
    assert TD3BC.load(tmp_path / "mine").policy_averaging == 0.0
    with pytest.warns(UserWarning, match="the Lagrange multiplier starts at its initial value"):
        loaded = TD3C.load(tmp_path / "td3bc", custom_objects={"policy_averaging": 0.25})
    assert loaded.policy_averaging == 0.25


def test_own_defaults_are_what_the_loaded_learner_is_made_with(tmp_path):
    trained(TD3BC).save(tmp_path / "model")
    loaded = OtherDefaults.load(tmp_path / "model", env=gym.make(ENV))
    buffer = loaded.replay_buffer
    assert (loaded.gamma, loaded.buffer_size, loaded.offline_fraction, loaded.n_steps) == (0.9, 500, 0.25, 3)
    assert (buffer.gamma, buffer.buffer_size, buffer.offline_fraction, buffer.n_steps) == (0.9, 500, 0.25, 3)
    stream = io.BytesIO((tmp_path / "model.zip").read_bytes())
    assert OtherDefaults.load(stream).buffer_size == 500
    assert TD3BC.load(tmp_path / "model").buffer_size == 1_000_000


def test_an_average_that_there_is_goes_on_in_another_algorithm(tmp_path):
    trained(TD3C).save(tmp_path / "middle")
    loaded = TD3BC.load(tmp_path / "middle", env=gym.make(ENV))
    assert loaded.policy_averaging == 0.99
    loaded.learn(20, reset_num_timesteps=False)
    learned = loaded.acting.learned_weights.values
    assert any(not th.equal(value, learned[name]) for name, value in loaded.actor.named_parameters())


def test_td3c_takes_up_multiplier_and_reference(tmp_path):
    model = trained(TD3C, epsilon=1e-6, multiplier_learning_rate=0.1)
    model.save(tmp_path / "model")
    loaded = TD3C.load(tmp_path / "model", env=gym.make(ENV))
    assert loaded.multiplier == model.multiplier != model.initial_multiplier
    for a, b in zip(model.reference_actor.state_dict().values(), loaded.reference_actor.state_dict().values(), strict=True):
        assert th.equal(a, b)
    assert any(not th.equal(a, b) for a, b in zip(loaded.actor.parameters(), loaded.reference_actor.parameters(), strict=True))
    ours, theirs = ({k: v for k, v in m.extra_state().items() if "multiplier" in k} for m in (model, loaded))
    assert ours.keys() == theirs.keys() and len(ours) == 4 and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    rows = model.replay_buffer.sample(32)
    for m in (model, loaded):
        hooks.update_actor(m, next(m.updater.choose_kernel(m).batches(rows, 32)))
    assert loaded.multiplier == model.multiplier


def test_continued_run_does_not_begin_anew(tmp_path):
    model = trained(TD3C)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = TD3C.load(tmp_path / "model", env=gym.make(ENV))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.load_offline_data()
    reference = {name: value.clone() for name, value in loaded.reference_actor.state_dict().items()}
    loaded.learn(10, reset_num_timesteps=False)
    assert (
        loaded.num_timesteps == 50 and hooks.n_updates(loaded) == hooks.n_updates(model) + 10 and loaded.first_warmup_end == 5
    )
    assert all(th.equal(value, loaded.reference_actor.state_dict()[name]) for name, value in reference.items())


def test_pretrained_file_is_not_pretrained_again(tmp_path):
    """rl-zoo3 passes the preset's ``offline_steps`` to ``load``."""
    settings = {"env": gym.make(ENV), "dataset": DATASET, "offline_steps": 500, "warmup_steps": 0}
    trained(TD3).save(tmp_path / "sb3")
    trained(TD3BC).save(tmp_path / "finetuned")
    half = TD3BC("MlpPolicy", ENV, dataset=DATASET, offline_steps=60, policy_kwargs=SMALL, device="cpu").pretrain(40)
    half.save(tmp_path / "interrupted")
    half.pretrain().save(tmp_path / "pretrained")
    left = {name: OfflineTD3.load(tmp_path / name, **settings).remaining_offline_steps
            for name in ("sb3", "finetuned", "interrupted", "pretrained")}  # fmt: skip
    assert left == {"sb3": 0, "finetuned": 0, "interrupted": 460, "pretrained": 0}
    model = OfflineTD3.load(tmp_path / "pretrained", **settings)
    assert model.pretrain(5).offline_steps_done == 65, "asked for by name, it is done"
    model.learn(4)
    assert model.offline_steps_done == 65


def test_untrained_file_is_not_taken_for_a_pretrained_one(tmp_path):
    TD3BC("MlpPolicy", ENV, policy_kwargs=SMALL, device="cpu", learning_starts=7).save(tmp_path / "model")
    model = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    with pytest.warns(UserWarning, match="neither a dataset nor pretrained weights"):
        model.learn(3)
    assert model.learning_starts == 7


def test_run_that_goes_on_with_another_reference_is_constrained(tmp_path):
    trained(TD3C, constraint_reference="target").save(tmp_path / "model")
    model = TD3C.load(tmp_path / "model", env=gym.make(ENV), constraint_reference="pretrained")
    assert model.reference_actor is None
    model.learn(5, reset_num_timesteps=False)
    assert model.reference_actor is not None


def test_zip_holds_spec_and_fingerprint_but_no_data(tmp_path):
    model = trained(TD3BC)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 200_000 < model.replay_buffer.offline_data.nbytes
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        facts = json.loads(file.read("data"))
    assert facts["dataset"] == DATASET
    assert facts["dataset_fingerprint"] == load_dataset(DATASET).fingerprint
    assert isinstance(facts["_extra_state"], str)


def test_dataset_given_as_an_object_is_saved_as_its_spec(tmp_path):
    dataset = load_dataset(DATASET)
    for given, saved in ((dataset, DATASET), (dataset.with_facts(spec=None), None)):
        model = TD3BC("MlpPolicy", ENV, dataset=given, policy_kwargs=SMALL, device="cpu").pretrain(3)
        model.save(tmp_path / "model")
        assert model.dataset is given, "saving does not change the model"
        loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
        assert loaded.dataset == saved
    with pytest.raises(ValueError, match="pretrained on data given as an object"):
        loaded.pretrain(3)
    with pytest.warns(UserWarning, match="goes on without it"):
        loaded.warmup_steps = 0
        loaded.learn(3)
    again = TD3BC.load(tmp_path / "model", env=gym.make(ENV), dataset=dataset)
    assert again.pretrain(3).offline_steps_done == 6


def test_interrupted_pretraining_on_an_object_does_not_go_online_without_it(tmp_path):
    dataset = load_dataset(DATASET).with_facts(spec=None)
    model = TD3BC("MlpPolicy", ENV, dataset=dataset, offline_steps=50, policy_kwargs=SMALL, device="cpu").pretrain(20)
    model.save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    with pytest.raises(ValueError, match="30 of 50 offline steps are left to do, but the dataset was given as an object"):
        loaded.learn(10)
    assert loaded.num_timesteps == 0
    TD3BC.load(tmp_path / "model", env=gym.make(ENV), dataset=None, warmup_steps=0).learn(10)


def test_new_seed_means_new_random_streams(tmp_path):
    trained(TD3BC).save(tmp_path / "model")

    def offline_rows(**settings):
        model = TD3BC.load(tmp_path / "model", **settings)
        model.load_offline_data()
        return model.replay_buffer.sample(8, offline_fraction=1.0).observations

    assert th.equal(offline_rows(), offline_rows(seed=None))
    assert th.equal(offline_rows(seed=1), offline_rows(seed=1))
    assert not th.equal(offline_rows(seed=1), offline_rows(seed=2))


def test_other_data_under_the_same_name_is_said(tmp_path):
    dataset = load_dataset(DATASET)
    model = TD3BC("MlpPolicy", ENV, dataset=DATASET, policy_kwargs=SMALL, device="cpu").pretrain(3)
    model.save(tmp_path / "model")
    changed = dataset.from_columns(
        dataset.observations, dataset.actions, dataset.rewards + 1, dataset.next_observations, dataset.terminations,
        dataset.truncations,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="is not the one this model was pretrained on"):
        TD3BC.load(tmp_path / "model", dataset=changed).pretrain(1)


def test_loading_to_predict_reads_no_data(tmp_path):
    model = trained(TD3C)
    model.dataset = "gone/away-v0"
    model.save(tmp_path / "model")
    loaded = TD3C.load(tmp_path / "model", seed=1, custom_objects={"learning_rate": 0.0, "lr_schedule": lambda _: 0.0})
    assert loaded.offline_dataset is None
    loaded.predict(loaded.observation_space.sample())


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C, ReBRAC])
def test_unknown_keyword_in_load_is_refused(algorithm, tmp_path):
    trained(algorithm).save(tmp_path / "model")
    with pytest.raises(TypeError, match="unknown keyword 'offline_fractoin': did you mean 'offline_fraction'"):
        algorithm.load(tmp_path / "model", offline_fractoin=0.3)
    with pytest.raises(TypeError, match="unknown keyword 'zzzz': known are action_noise"):
        algorithm.load(tmp_path / "model", zzzz=1)


def test_settings_given_to_load_are_checked_like_the_constructors(tmp_path):
    trained(TD3C).save(tmp_path / "model")
    for settings, message in (
        ({"offline_fraction": 1.5}, "offline_fraction"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"n_steps": 0}, "`n_steps` must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TD3C.load(tmp_path / "model", **settings)
    loaded = TD3C.load(tmp_path / "model", offline_fraction=0.25, epsilon="lin_0.1_0.2")
    assert loaded.replay_buffer.offline_fraction == 0.25
    hooks.set_progress_remaining(loaded, 0.0)
    assert loaded.current_epsilon == 0.2


def test_save_to_a_stream():
    stream = io.BytesIO()
    model = trained(TD3BC)
    model.save(stream)
    stream.seek(0)
    assert_same_learner(model, TD3BC.load(stream))


# Replay buffers


def test_replay_buffer_of_sb3_is_taken_over(tmp_path):
    td3 = trained(TD3)
    td3.save_replay_buffer(tmp_path / "replay_buffer.pkl")
    model = trained(TD3BC)
    model.load_replay_buffer(tmp_path / "replay_buffer.pkl", trust_pickle=True)
    assert model.replay_buffer.online_size == 40 and model.replay_buffer.offline_size == 20_000
    assert np.allclose(model.replay_buffer.observations[:40], td3.replay_buffer.observations[:40])


def test_zoo_replay_buffer_name_and_suffixes(tmp_path):
    model = trained(TD3BC)
    for name in ("replay_buffer.pkl", "buffer", "other.npz"):
        model.save_replay_buffer(tmp_path / name)
        fresh = TD3BC("MlpPolicy", ENV, policy_kwargs=SMALL, device="cpu")
        fresh.load_replay_buffer(tmp_path / name)
        assert np.array_equal(fresh.replay_buffer.rewards, model.replay_buffer.rewards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buffer.npz", "other.npz", "replay_buffer.pkl"]


def test_replay_buffer_through_streams():
    model = trained(TD3BC)
    ours, theirs = io.BytesIO(), io.BytesIO()
    model.save_replay_buffer(ours)
    trained(TD3).save_replay_buffer(theirs)
    assert len(ours.getvalue()) < 10_000 < model.replay_buffer.offline_data.nbytes
    fresh = TD3BC("MlpPolicy", ENV, policy_kwargs=SMALL, device="cpu")
    other = TD3BC("MlpPolicy", "MountainCarContinuous-v0", policy_kwargs=SMALL, device="cpu")
    for stream in (ours, theirs):
        stream.seek(0)
        fresh.load_replay_buffer(stream, trust_pickle=stream is theirs)
        assert fresh.replay_buffer.online_size == 40 and fresh.offline_dataset is None
        stream.seek(0)
        with pytest.raises(ValueError, match="observation shape"):
            other.load_replay_buffer(stream, trust_pickle=stream is theirs)


def test_damaged_replay_buffers_are_refused_and_change_nothing(tmp_path):
    model = trained(TD3BC)
    model.save_replay_buffer(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "garbage.pkl").write_bytes(b"garbage")
    (tmp_path / "empty.pkl").write_bytes(b"")
    (tmp_path / "dict.pkl").write_bytes(pickle.dumps({}))
    np.save(tmp_path / "array.npy", np.zeros(3))
    buffer, state = model.replay_buffer, model.replay_buffer.get_sampler_state()
    for name in ("half.npz", "garbage.pkl", "empty.pkl", "dict.pkl", "array.npy"):
        with pytest.raises(ValueError, match=name):
            model.load_replay_buffer(tmp_path / name, trust_pickle=name.endswith("pkl"))
        assert model.replay_buffer is buffer and buffer.online_size == 40 and buffer.get_sampler_state() == state


def test_replay_buffer_of_another_shape_is_refused(tmp_path):
    trained(TD3BC).save_replay_buffer(tmp_path / "ours.npz")
    trained(TD3).save_replay_buffer(tmp_path / "theirs.pkl")
    model = TD3BC("MlpPolicy", make_vec_env(ENV, 2), policy_kwargs=SMALL, device="cpu")
    buffer = model.replay_buffer
    for name in ("ours.npz", "theirs.pkl"):
        with pytest.raises(ValueError, match="n_envs 1, this learner has 2"):
            model.load_replay_buffer(tmp_path / name, trust_pickle=name == "theirs.pkl")
        assert model.replay_buffer is buffer and buffer.size() == 0
    hopper = TD3BC("MlpPolicy", "MountainCarContinuous-v0", policy_kwargs=SMALL, device="cpu")
    with pytest.raises(ValueError, match="observation shape"):
        hopper.load_replay_buffer(tmp_path / "ours.npz")
    with pytest.raises(FileNotFoundError):
        model.load_replay_buffer(tmp_path / "missing.npz")


def save_columns(path) -> None:
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(21, 3)).astype(np.float32)
    np.savez(
        path,
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=generator.uniform(-2, 2, size=(20, 1)).astype(np.float32),
        rewards=np.ones(20, np.float32),
        terminations=np.zeros(20, bool),
    )


def test_dataset_given_to_load_as_a_path(tmp_path):
    save_columns(tmp_path / "data.npz")
    trained(TD3BC).save(tmp_path / "model")
    model = TD3BC.load(tmp_path / "model", dataset=tmp_path / "data.npz", env=gym.make("Pendulum-v1"))
    with pytest.warns(UserWarning, match="is not the one this model was pretrained on"):
        model.pretrain(1)
    assert model.offline_dataset.spec == str(tmp_path / "data.npz")


def test_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    save_columns(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    TD3BC("MlpPolicy", "Pendulum-v1", dataset="data.npz", batch_size=4).pretrain(1).save(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    TD3BC.load(tmp_path / "model", env=gym.make("Pendulum-v1")).pretrain(1)


@pytest.mark.parametrize("as_list", [False, True])
def test_data_given_as_an_object_is_missed_even_if_it_was_not_used_before_saving(as_list, tmp_path):
    save_columns(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as columns:
        data = OfflineDataset.from_columns(**columns)
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset=[data, data] if as_list else data, offline_steps=3)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="3 of 3 offline steps are left to do, but the dataset was given as an object"):
        TD3BC.load(tmp_path / "model", env=gym.make("Pendulum-v1")).learn(10)


def test_n_step_keywords_given_to_load_are_refused(tmp_path):
    trained(TD3BC).save(tmp_path / "model")
    with pytest.raises(ValueError, match="`replay_buffer_kwargs` has 'n_steps'"):
        TD3BC.load(tmp_path / "model", replay_buffer_kwargs={"n_steps": 3})


def test_augmentation_in_units_of_data_that_is_not_there_is_refused_before_the_first_step():
    model = TD3BC("MlpPolicy", "Pendulum-v1", replay_buffer_kwargs={"augmentation": "gaussian_noise"})
    with pytest.raises(ValueError, match="'gaussian_noise' is in units of the dataset's standard deviations"):
        model.learn(10)
    assert model.num_timesteps == 0
