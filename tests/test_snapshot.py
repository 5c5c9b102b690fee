"""A restored learner does the same updates, to the bit, as the one the snapshot was taken of."""

import contextlib
import random
import warnings
from collections.abc import Mapping

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecNormalize

import sb3_offline_ft.collapse.snapshot as snapshot_module
from sb3_offline_ft import TD3BC, TD3C, OfflineTD3
from sb3_offline_ft.collapse.signals import greedy_actions
from sb3_offline_ft.collapse.snapshot import LearnerSnapshot
from sb3_offline_ft.offline_td3 import Phase
from tests.hooks import noise_generator, set_progress_remaining

OURS = (OfflineTD3, TD3BC, TD3C)
DISCRETE = (DQN, QRDQN)
ALGORITHMS = (*OURS, TD3, DDPG, SAC, DQN, TQC, QRDQN, CrossQ)
SMALL = {"net_arch": [16, 16]}


def make(algorithm, env=None, **settings):
    defaults = {"policy_kwargs": dict(SMALL), "seed": 0, "device": "cpu", "batch_size": 8, "learning_rate": 1e-3}
    if algorithm in OURS:
        defaults |= {"dataset": "bundled:pendulum-medium", "warmup_steps": 0}
    else:
        defaults |= {"learning_starts": 20, "buffer_size": 1000}
    if algorithm in DISCRETE:
        defaults |= {"target_update_interval": 7}
    env = env or ("CartPole-v1" if algorithm in DISCRETE else "Pendulum-v1")
    return algorithm("MlpPolicy", env, **(defaults | settings))


def filled(algorithm, env=None, **settings):
    """A learner with some data and some updates behind it; ours have been pretrained and are finetuning."""
    model = make(algorithm, env, **settings)
    if algorithm in OURS:
        model.pretrain(21)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*learns what is best from an EvalCallback")
        return model.learn(40)


def update(model, times):
    for _ in range(times):
        model.train(1, model.batch_size)
        # DQN updates its targets there
        model._on_step()


def flat(value, name=""):
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from flat(entry, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from flat(entry, f"{name}/{index}")
    elif isinstance(value, th.Tensor):
        yield name, value.detach().numpy().tobytes()
    else:
        yield name, value.tobytes() if isinstance(value, np.ndarray) else repr(value)


def global_generators():
    return dict(flat({"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state()}))


def own_generators(model):
    state = {"action_space": model.action_space.np_random.bit_generator.state}
    if isinstance(model, OURS):
        state |= {"noise": noise_generator(model).get_state(), "sampler": model.replay_buffer.get_sampler_state()}
    return dict(flat(state))


def learned(model):
    """All that an update reads or writes, but for the generators and the data."""
    names = ["actor.optimizer", "critic.optimizer"] if hasattr(model, "critic") else ["policy.optimizer"]
    state = {name: recursive_getattr(model, name).state_dict() for name in names}
    state["policy"] = model.policy.state_dict()
    for name in ("_n_updates", "_n_calls", "exploration_rate", "_current_progress_remaining", "log_ent_coef"):
        state[name] = getattr(model, name, None)
    if getattr(model, "ent_coef_optimizer", None) is not None:
        state["ent_coef_optimizer"] = model.ent_coef_optimizer.state_dict()
    if isinstance(model, TD3C):
        reference = model.reference_actor
        state["multiplier"] = [{k: v.copy() for k, v in model.extra_state().items() if "multiplier" in k}, model.position()]
        state["reference"] = None if reference is None else reference.state_dict()
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        statistics = [vec_normalize.ret_rms, *([vec_normalize.obs_rms] if vec_normalize.norm_obs else [])]
        state["vec_normalize"] = [*map(vars, statistics), vec_normalize.returns]
    return dict(flat(state))


def whole(model):
    return learned(model) | own_generators(model) | global_generators()


def assert_same(found, expected):
    assert [name for name in expected if found.get(name) != expected[name]] == [] and found.keys() == expected.keys()


def trace(model, parts=4, times=50):
    """The learner after each quarter of 200 updates."""
    states = []
    for _ in range(parts):
        update(model, times)
        states.append(whole(model))
    return states


def assert_same_trace(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_updates_follow_live_and_from_a_file_and_in_a_new_model(algorithm, tmp_path):
    model = filled(algorithm)
    parameters = {name: id(tensor) for name, tensor in model.policy.state_dict(keep_vars=True).items()}
    objects = [id(recursive_getattr(model, name)) for name in model._get_torch_save_params()[0]]
    steps = model.num_timesteps
    snapshot = LearnerSnapshot.take(model)
    expected = trace(model)
    update(model, 300)

    snapshot.restore(model)
    assert_same_trace(trace(model), expected)
    assert {name: id(tensor) for name, tensor in model.policy.state_dict(keep_vars=True).items()} == parameters
    assert [id(recursive_getattr(model, name)) for name in model._get_torch_save_params()[0]] == objects
    assert model.num_timesteps == steps == snapshot.num_timesteps

    # Training after the restore has not changed the snapshot, nor does the file
    snapshot.save(tmp_path / "snapshot.pt")
    loaded = LearnerSnapshot.load(tmp_path / "snapshot.pt")
    new = make(algorithm, seed=7)
    new.replay_buffer = model.replay_buffer
    new.set_logger(model.logger)
    loaded.restore(new)
    assert_same_trace(trace(new), expected)
    assert new.num_timesteps == 0
    facts = ("algorithm", "num_timesteps", "n_updates", "nbytes")
    assert [getattr(loaded, fact) for fact in facts] == [getattr(snapshot, fact) for fact in facts]
    assert snapshot.algorithm == algorithm.__name__ and snapshot.nbytes > 10_000
    assert repr(loaded) == repr(snapshot)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_taking_a_snapshot_changes_nothing(algorithm):
    states = []
    for take in (False, True):
        model = filled(algorithm)
        for _ in range(5):
            update(model, 5)
            if take:
                LearnerSnapshot.take(model)
        states.append(whole(model))
    assert_same(*states)


@pytest.mark.parametrize("algorithm", [TD3BC, TD3C, SAC, DQN, CrossQ])
def test_later_training_does_not_reach_the_snapshot(algorithm):
    model = filled(algorithm)
    snapshot = LearnerSnapshot.take(model)
    at_take = whole(model)
    for _ in range(3):
        update(model, 20)
        snapshot.restore(model)
        assert_same(whole(model), at_take)


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3C, SAC, DQN])
def test_without_generators_the_streams_go_on(algorithm):
    model = filled(algorithm)
    at_take = learned(model)
    generators = global_generators() | own_generators(model)
    snapshot = LearnerSnapshot.take(model)
    update(model, 50)
    if algorithm in OURS:
        model.pretrain(5)
    th.rand(1), random.random(), model.action_space.sample()
    moved = global_generators() | own_generators(model)
    streams = {name.split("/")[1] for name in moved if moved[name] != generators[name]}
    assert streams == {name.split("/")[1] for name in moved}

    snapshot.restore(model, generators=False)
    assert_same(learned(model), at_take)
    assert_same(global_generators() | own_generators(model), moved)


def test_new_multiplier_and_no_reference_are_restored():
    model = make(TD3C)
    model.pretrain(10)
    fresh = LearnerSnapshot.take(model)
    at_take = learned(model)
    assert model.reference_actor is None and "multiplier_optimizer.step" not in model.extra_state()
    with pytest.warns(UserWarning, match="learns what is best"):
        model.learn(30)
    assert model.reference_actor is not None and "multiplier_optimizer.step" in model.extra_state()
    finetuning = LearnerSnapshot.take(model)
    reference = model.reference_actor
    expected = trace(model, 1)
    finetuning.restore(model)
    assert model.reference_actor is reference
    assert_same_trace(trace(model, 1), expected)

    fresh.restore(model)
    assert_same(learned(model), at_take)
    assert model.reference_actor is None and model.phase is Phase.PRETRAINED
    finetuning.restore(model)
    assert model.phase is Phase.FINETUNING
    assert_same_trace(trace(model, 1), expected)


@pytest.mark.parametrize("reference", ["target", "pretrained"])
def test_other_references_of_the_constraint(reference):
    model = filled(TD3C, constraint_reference=reference)
    snapshot = LearnerSnapshot.take(model)
    expected = trace(model, 2)
    update(model, 20)
    snapshot.restore(model)
    assert_same_trace(trace(model, 2), expected)


def test_a_best_policy_found_since_is_not_the_restored_one():
    env = Monitor(gym.make("Pendulum-v1"))
    evaluation = EvalCallback(env, eval_freq=1000, n_eval_episodes=1, verbose=0)
    model = make(TD3C)
    model.pretrain(10)
    model.learn(20, callback=evaluation)
    snapshot = LearnerSnapshot.take(model)
    reference = {name: value.clone() for name, value in model.reference_actor.state_dict().items()}
    evaluation.best_mean_reward = 0.0
    model.evaluations.callbacks = [evaluation]
    snapshot.restore(model)
    update(model, 10)
    assert all(th.equal(value, reference[name]) for name, value in model.reference_actor.state_dict().items())
    evaluation.best_mean_reward = 1.0
    update(model, 1)
    assert not all(th.equal(value, reference[name]) for name, value in model.reference_actor.state_dict().items())


def test_pretraining_goes_on_to_the_bit():
    model = make(TD3C)
    model.pretrain(11)
    snapshot = LearnerSnapshot.take(model)
    model.pretrain(30)
    expected = whole(model)
    model.pretrain(17)
    snapshot.restore(model)
    model.pretrain(30)
    assert_same(whole(model), expected)
    assert model.offline_steps_done == 88, "what counts progress is not restored"


@pytest.mark.parametrize("algorithm", [TD3, OfflineTD3])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_policy_delay_goes_on_where_it_was(algorithm, updates):
    model = filled(algorithm, policy_delay=3)
    update(model, updates)
    snapshot = LearnerSnapshot.take(model)
    expected = trace(model, 3, 1)
    update(model, 4)
    snapshot.restore(model)
    assert_same_trace(trace(model, 3, 1), expected)


def normalized_env(n_envs=1, **settings):
    return VecNormalize(make_vec_env("Pendulum-v1", n_envs=n_envs, seed=0), **settings)


def play(env, steps=20):
    for _ in range(steps):
        env.step(np.zeros((env.num_envs, 1)))


@pytest.mark.parametrize("settings", [{}, {"norm_reward": False}])
def test_vec_normalize(settings, tmp_path):
    env = normalized_env(2, **settings)
    model = filled(TD3, env)
    statistics, count = env.obs_rms, env.obs_rms.count
    snapshot = LearnerSnapshot.take(model)
    expected = trace(model, 1)
    play(env)
    assert env.obs_rms.count > count
    snapshot.restore(model)
    assert env.obs_rms is statistics
    assert_same_trace(trace(model, 1), expected)

    snapshot.save(tmp_path / "snapshot.pt")
    new = make(TD3, normalized_env(2, **settings), seed=7)
    new.replay_buffer = model.replay_buffer
    new.set_logger(model.logger)
    LearnerSnapshot.load(tmp_path / "snapshot.pt").restore(new)
    assert_same_trace(trace(new, 1), expected)
    play(env)
    snapshot.restore(model, generators=False)
    assert_same({"": env.obs_rms.mean.tobytes()}, {"": new.env.obs_rms.mean.tobytes()})


def test_vec_normalize_without_observations():
    env = normalized_env(norm_obs=False)
    model = filled(TD3, env)
    snapshot = LearnerSnapshot.take(model)
    count, returns = env.ret_rms.count, env.returns.copy()
    play(env)
    assert env.ret_rms.count > count and not np.array_equal(env.returns, returns)
    snapshot.restore(model)
    assert env.ret_rms.count == count and np.array_equal(env.returns, returns)


def test_vec_normalize_must_be_the_same():
    with_it, without = make(TD3, normalized_env()), make(TD3)
    snapshot = LearnerSnapshot.take(with_it)
    with pytest.raises(ValueError, match=r"VecNormalize keeps none in the model's environment and .*observations"):
        snapshot.restore(without)
    with pytest.raises(ValueError, match=r"VecNormalize keeps .* and none in the snapshot"):
        LearnerSnapshot.take(without).restore(with_it)
    with pytest.raises(ValueError, match=r"'environments': \(2,\).*'environments': \(1,\)"):
        snapshot.restore(make(TD3, normalized_env(2)))


def ornstein_uhlenbeck():
    return OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, 0.3))


class Walk(ActionNoise):
    def __init__(self):
        super().__init__()
        self.at = np.zeros(1)

    def __call__(self):
        self.at += np.random.normal(size=1)
        return self.at.copy()


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("noise", [ornstein_uhlenbeck, Walk, lambda: NormalActionNoise(np.zeros(1), np.ones(1))])
@pytest.mark.parametrize("through_file", [False, True])
def test_action_noise_goes_on_to_the_bit(noise, n_envs, through_file, tmp_path):
    def build():
        return make(TD3, make_vec_env("Pendulum-v1", n_envs=n_envs, seed=0), action_noise=noise())

    model = build().learn(50)
    live = model.action_noise
    assert isinstance(live, VectorizedActionNoise) == (n_envs > 1)
    snapshot = LearnerSnapshot.take(model)
    if through_file:
        snapshot.save(tmp_path / "snapshot.pt")
        snapshot = LearnerSnapshot.load(tmp_path / "snapshot.pt")
    expected = [model.action_noise() for _ in range(5)]
    for target in (model, build()):
        snapshot.restore(target)
        found = [target.action_noise() for _ in range(5)]
        # An unknown class's attributes stay in memory
        same = noise is not Walk or not through_file
        assert np.array_equal(found, expected) == same
    assert model.action_noise is live


def test_noise_inside_noise():
    single = VectorizedActionNoise(ornstein_uhlenbeck(), 2)
    model = make(TD3, action_noise=VectorizedActionNoise(single, 2))
    model.action_noise()
    snapshot = LearnerSnapshot.take(model)
    expected = model.action_noise()
    snapshot.restore(model)
    assert np.array_equal(model.action_noise(), expected)


def test_noise_must_be_the_same():
    snapshot = LearnerSnapshot.take(make(TD3, action_noise=ornstein_uhlenbeck()))
    for noise, found in (
        (None, "none"),
        (Walk(), "Walk"),
        (OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2)), r"OrnsteinUhlenbeckActionNoise of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"action noise is {found} in the model"):
            snapshot.restore(make(TD3, action_noise=noise))
    two = LearnerSnapshot.take(make(TD3, action_noise=VectorizedActionNoise(ornstein_uhlenbeck(), 2)))
    with pytest.raises(ValueError, match="VectorizedActionNoise of 3 in the model and VectorizedActionNoise of 2"):
        two.restore(make(TD3, action_noise=VectorizedActionNoise(ornstein_uhlenbeck(), 3)))
    # Noise without a state says nothing about the learner
    LearnerSnapshot.take(make(TD3)).restore(make(TD3, action_noise=Walk()))


def test_noise_that_cannot_be_copied_is_named():
    noise = Walk()
    noise.stream = (number for number in range(3))
    with pytest.raises(ValueError, match="action noise Walk cannot be copied"):
        LearnerSnapshot.take(make(TD3, action_noise=noise))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            lambda: make(TD3, policy_kwargs={"net_arch": [16, 16]}),
            lambda: make(TD3, policy_kwargs={"net_arch": [16, 8]}),
            r"snapshot of TD3 does not fit this TD3: policy\.actor\.mu\.2\.weight has shape \(8, 16\) and dtype float32 "
            r"in the model and shape \(16, 16\) and dtype float32 in the snapshot",
        ),
        (
            lambda: make(TD3),
            lambda: make(TD3, policy_kwargs=SMALL | {"n_critics": 3}),
            r"policy\.critic\.qf2\S* has shape .* in the model and nothing in the snapshot",
        ),
        (lambda: make(SAC), lambda: make(TD3), "snapshot of SAC does not fit this TD3: expected the optimizers"),
        (lambda: make(SAC), lambda: make(TQC), r"snapshot of SAC does not fit this TQC: policy\.critic"),
        (lambda: make(SAC), lambda: make(SAC, ent_coef=0.1), "expected the optimizers .*ent_coef_optimizer"),
        (lambda: make(DQN), lambda: make(QRDQN), r"policy\.quantile_net\S* has shape .* and nothing in the snapshot"),
        (lambda: make(TD3BC), lambda: make(TD3C), "snapshot of TD3BC does not fit this TD3C: they keep different things"),
        (lambda: make(TD3), lambda: make(DQN), "snapshot of TD3 does not fit this DQN"),
        (
            lambda: make(TD3, policy_kwargs=SMALL | {"optimizer_class": th.optim.SGD}),
            lambda: make(TD3),
            r"actor\.optimizer is Adam over \[6\] parameters in the model, SGD over \[6\] in the snapshot",
        ),
    ],
)
def test_another_architecture_is_refused_and_nothing_changed(source, target, message):
    snapshot, model = LearnerSnapshot.take(source()), target()
    before = whole(model)
    for act in (snapshot.restore, snapshot.check):
        with pytest.raises(ValueError, match=message):
            act(model)
    assert_same(whole(model), before)


def test_another_generator_is_refused_unless_left_out():
    model = make(TD3)
    snapshot = LearnerSnapshot.take(model)
    # Gymnasium has no other way to another kind of generator
    model.action_space._np_random = np.random.Generator(np.random.MT19937(0))
    with pytest.raises(ValueError, match="generator action_space is MT19937 now and PCG64"):
        snapshot.restore(model)
    snapshot.restore(model, generators=False)


def test_the_state_of_another_devices_generator_is_passed_over():
    model = filled(TD3BC)
    state = model.extra_state() | {"noise_generator": np.zeros(16, np.uint8)}
    before = own_generators(model)
    model.load_extra_state(state)
    assert own_generators(model) == before


def test_policy_state_acts_like_the_policy():
    model = filled(SAC)
    snapshot = LearnerSnapshot.take(model)
    observation = th.ones(1, 3)
    model.policy.set_training_mode(False)
    expected = greedy_actions(model, observation)
    update(model, 50)
    model.policy.set_training_mode(False)
    found = th.func.functional_call(model.policy, dict(snapshot.policy_state), (observation, True))
    assert th.equal(found, expected)
    assert not th.equal(greedy_actions(model, observation), expected)


def test_damaged_and_foreign_files(tmp_path):
    path, model = tmp_path / "snapshot.pt", make(TD3)
    LearnerSnapshot.take(model).save(path)
    content = path.read_bytes()
    refused = 0
    for position in np.linspace(0, len(content) - 1, 80).astype(int):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        # Padding between the parts of the file may change
        with contextlib.suppress(ValueError):
            LearnerSnapshot.load(path).save(tmp_path / "again.pt")
            assert (tmp_path / "again.pt").read_bytes() == content
            refused -= 1
        refused += 1
    assert refused > 40
    for text in (b"", b"text", content[:100], content[: len(content) // 2], content[:-30]):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"snapshot\.pt is damaged or not a snapshot"):
            LearnerSnapshot.load(path)
    th.save(model.policy.state_dict(), path)
    with pytest.raises(ValueError, match="format is not"):
        LearnerSnapshot.load(path)
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="not a snapshot"):
        LearnerSnapshot.load(tmp_path / "model.zip")
    plain = {"format": snapshot_module.FORMAT, "version": 1, "content": {"algorithm": "TD3"}}
    th.save(plain, path)
    with pytest.raises(ValueError, match="it lacks num_timesteps"):
        LearnerSnapshot.load(path)
    th.save(plain | {"version": 99}, path)
    with pytest.raises(ValueError, match="version 99, expected 1"):
        LearnerSnapshot.load(path)
    th.save(plain | {"content": gym.Env}, path)
    with pytest.raises(ValueError, match="damaged or not"):
        LearnerSnapshot.load(path)
    with pytest.raises(FileNotFoundError):
        LearnerSnapshot.load(tmp_path / "missing.pt")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, model = tmp_path / "snapshot.pt", make(TD3)
    LearnerSnapshot.take(model).save(path)
    before = path.read_bytes()

    def interrupted(_, file):
        file.write(b"the first half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module.th, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LearnerSnapshot.take(filled(TD3)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    set_progress_remaining(model, object())
    with pytest.raises(ValueError, match="found object in the snapshot, counters, _current_progress_remaining"):
        LearnerSnapshot.take(model).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
