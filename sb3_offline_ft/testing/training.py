"""Clauses about training: randomness, phases, batches, environments, schedules."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.testing.clause import clause
from sb3_offline_ft.testing.learners import (
    Algorithm,
    Record,
    State,
    actions_of,
    assert_finite,
    assert_moved,
    assert_same,
    assert_same_learner,
    differs,
    folder,
    make,
    moving,
    reloaded,
    small_extractor,
    state,
    vec_env,
    vector_data,
)
from sb3_offline_ft.testing.point_env import VECTOR, PointEnv, record
from sb3_offline_ft.testing.spaces import OTHERS_WITH_DATA, VECTORS
from sb3_offline_ft.update import Batch, FastKernel, NotSupportedError


def _noise() -> NormalActionNoise:
    return NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))


@clause
def check_same_seed_same_result(algorithm: Algorithm, **settings: Any) -> None:
    """The same seed gives the same networks to the bit, in both phases; another seed gives others."""

    def run(seed: int, disturbance: int = 0) -> tuple[State, OfflineTD3]:
        model = make(algorithm, settings, seed=seed, dataset=vector_data(), action_noise=_noise())
        # Others may use the global generators between construction and pretraining
        np.random.rand(disturbance)
        th.rand(disturbance)
        offline = state(model.pretrain(20))
        model.set_random_seed(seed)
        return offline, model.learn(40)

    (first, one), (second, two), (third, three) = run(0), run(0, disturbance=2), run(1)
    assert_same(second, first, "the same seed gives the same pretraining")
    assert_same_learner(two, one, "the same seed gives the same finetuning")
    assert differs(third, first, "actor.") and differs(third, first, "critic."), "the seed does not matter for pretraining"
    assert differs(state(three), state(one), "actor."), "the seed does not matter for finetuning"


@clause
def check_set_random_seed(algorithm: Algorithm, **settings: Any) -> None:
    """``set_random_seed`` starts all random streams anew: two learners with the same networks do the same afterwards."""
    one = make(algorithm, settings, seed=0, dataset=vector_data())
    two = make(algorithm, settings, seed=1, dataset=vector_data())
    two.policy.load_state_dict(one.policy.state_dict())
    for model in (one, two):
        model.set_random_seed(7)
        model.pretrain(10).learn(20)
    assert_same_learner(two, one, "after `set_random_seed` with the same seed, the same networks do the same")


@clause
def check_phases(algorithm: Algorithm, **settings: Any) -> None:
    """Pretraining takes no step in the environment, the warm-up no gradient step, and no action is random."""
    watch, n_offline, n_warm = Record(), 15, 20
    model = make(
        algorithm, settings, dataset=vector_data(), offline_steps=n_offline, warmup_steps=n_warm, action_noise=_noise()
    )
    before = state(model)
    model.pretrain(5)
    assert model.num_timesteps == 0 and model.replay_buffer is not None and model.replay_buffer.size() == 0, (
        "pretraining acts in the environment"
    )
    assert model.remaining_offline_steps == n_offline - 5, "pretraining is not counted"
    model.learn(60, callback=watch)
    assert model.offline_steps_done == n_offline, f"`learn` leaves {model.offline_steps_done} offline steps, not {n_offline}"
    assert len(watch.actions) == 60, f"`learn(60)` took {len(watch.actions)} steps"
    pretrained = watch.states[0]
    assert differs(pretrained, before, "actor.") and differs(pretrained, before, "critic."), "pretraining changed nothing"
    frozen = make(algorithm, settings, dataset=None)
    frozen.policy.load_state_dict(pretrained)
    for step in range(n_warm):
        assert_same(watch.states[step], pretrained, f"nothing is updated in the warm-up (step {step + 1})")
        expected = frozen.predict(watch.observations[step], deterministic=True)[0]
        assert np.allclose(watch.actions[step], expected, atol=1e-5), f"step {step + 1} of the warm-up is not the policy's"
    assert watch.updates[n_warm] == n_offline, "a gradient step is counted in the warm-up"
    assert_moved(model, pretrained, "finetuning")


@clause
def check_without_data(algorithm: Algorithm, **settings: Any) -> None:
    """Without a dataset it trains as SB3's ``TD3`` does: ``learning_starts`` random actions, then updates."""
    watch = Record()
    model = make(algorithm, settings, dataset=None, learning_starts=20)
    before = state(model)
    model.learn(60, callback=watch)
    # The callback sees the state before the update of its step
    assert watch.updates[20] == 0 and watch.updates[21] > 0, f"updates begin at another step: {watch.updates}"
    assert_same(watch.states[20], before, "nothing is updated before `learning_starts`")
    assert_moved(model, before, "training without data")


@clause
def check_offline_fraction(algorithm: Algorithm, **settings: Any) -> None:
    """Each online batch holds exactly the share of offline rows that is asked for, each offline batch no other rows."""
    for fraction, expected in ((0.0, 0), (0.25, 4), (1.0, 16), ("lin_1.0_0.0", None)):
        model = make(algorithm, settings, dataset=vector_data(), offline_steps=4, offline_fraction=fraction, batch_size=16)
        batches: list[Batch] = []
        _watch_updates(model, batches.append)
        model.learn(40)
        n_offline = [int(batch.is_offline.sum()) for batch in batches]  # type: ignore[union-attr]
        assert n_offline[:4] == [16] * 4, f"batches of 16 in pretraining have {n_offline[:4]} offline rows"
        online = n_offline[4:]
        assert online, f"offline_fraction={fraction!r}: nothing is trained online"
        if expected is not None:
            assert set(online) == {expected}, f"offline_fraction={fraction!r}: batches of 16 have {set(online)} offline rows"
        else:
            assert online == sorted(online, reverse=True) and len(set(online)) > 8, f"{fraction!r} gives {online}"


def _watch_updates(model: OfflineTD3, look: Callable[[Batch], object]) -> None:
    """From now on, have a look at each batch before the critics are updated with it."""
    update = model._update_critic

    def look_and_update(batch: Batch) -> None:
        look(batch)
        update(batch)

    model._update_critic = look_and_update  # type: ignore[method-assign]


@clause
def check_targets(algorithm: Algorithm, **settings: Any) -> None:
    """The critics' targets are finite, bootstrap from no terminal state, and discount n-step returns as the batch says."""
    for n_steps in (1, 3):
        model = make(
            algorithm, settings, dataset=vector_data(), n_steps=n_steps, target_policy_noise=0.0, batch_size=64
        ).pretrain(5)
        batches: list[Batch] = []
        _watch_updates(model, batches.append)
        _watch_updates(model, partial(_check_targets_of, model))
        model.pretrain(1)
        assert len(batches) == 1, "the critics are not updated by `_update_critic`"


def _check_targets_of(model: OfflineTD3, batch: Batch) -> None:
    targets = model._target_q_values(batch)
    assert targets.shape == (64, 1), f"targets have the shape {tuple(targets.shape)}, expected (64, 1)"
    assert not targets.requires_grad and bool(th.isfinite(targets).all()), "targets are not finite constants"
    ended = model._target_q_values(batch._replace(dones=th.ones_like(batch.dones)))
    assert th.allclose(ended, batch.rewards, atol=1e-6), "the target at a terminal state is not the reward alone"
    if model.n_steps == 1:
        return
    assert batch.discounts is not None, f"with n_steps={model.n_steps} batches have no discounts"
    expected = {round(model.gamma**k, 4) for k in range(1, model.n_steps + 1)}
    found = {round(float(value), 4) for value in batch.discounts.ravel()}
    assert found <= expected and len(found) > 1, f"discounts are {found}, expected powers of gamma: {expected}"
    going_on = batch._replace(dones=th.zeros_like(batch.dones))
    short = model._target_q_values(going_on._replace(discounts=th.zeros_like(batch.discounts)))
    assert th.allclose(short, batch.rewards, atol=1e-6), "`batch.discounts` is not what the bootstrap is discounted by"
    assert not th.allclose(model._target_q_values(going_on), short), "targets do not bootstrap"


@clause
def check_n_step_returns(algorithm: Algorithm, **settings: Any) -> None:
    """n-step returns work with and without data, and give other results than one-step returns."""
    for dataset in (None, vector_data()):
        results = []
        for n_steps in (1, 3):
            model = make(algorithm, settings, dataset=dataset, n_steps=n_steps, offline_steps=10)
            with moving(model, f"training with n_steps={n_steps}"):
                model.learn(60)
            results.append(state(model))
        data = "without data" if dataset is None else "with data"
        assert differs(results[1], results[0], "critic."), f"{data}, `n_steps` changes nothing"


@clause
def check_several_environments(algorithm: Algorithm, **settings: Any) -> None:
    """Several environments at once are counted, stored and learned from as in SB3, with and without data."""
    for n_envs in (2, 4):
        for dataset in (None, vector_data()):
            model = make(algorithm, settings, vec_env(n_envs), dataset=dataset, offline_steps=8, gradient_steps=-1)
            with moving(model, f"training in {n_envs} environments"):
                model.learn(80)
            assert model.num_timesteps == 80, f"80 steps in {n_envs} environments are counted as {model.num_timesteps}"
            buffer = model.replay_buffer
            assert buffer is not None and buffer.n_envs == n_envs and buffer.size() * n_envs == 80, (
                f"of 80 steps in {n_envs} environments {buffer and buffer.size() * n_envs} are stored"
            )


def _reloaded_statistics(env: VecNormalize, space: spaces.Space[Any] = VECTOR) -> VecNormalize:
    with folder() as path:
        env.save(str(path / "statistics.pkl"))
        return VecNormalize.load(str(path / "statistics.pkl"), vec_env(2, space))


@clause
def check_vec_normalize(algorithm: Algorithm, **settings: Any) -> None:
    """``VecNormalize`` works as in SB3, with and without data, and through a file."""
    for norm_obs, norm_reward in ((True, False), (False, True)):
        for dataset in (None, vector_data()):
            env = VecNormalize(vec_env(2), norm_obs=norm_obs, norm_reward=norm_reward)
            model = make(algorithm, settings, env, dataset=dataset, offline_steps=6)
            with moving(model, f"training with VecNormalize({norm_obs=}, {norm_reward=})"):
                model.learn(60)
            raw = model.replay_buffer.rewards[: model.replay_buffer.size()]  # type: ignore[union-attr]
            assert raw.min() >= -np.sqrt(2.0) - 1e-5 and raw.max() <= 0.0, "stored rewards are not those of the environment"
            loaded = reloaded(model, _reloaded_statistics(env), dataset=dataset)
            assert np.array_equal(actions_of(loaded), actions_of(model)), "with VecNormalize a loaded model acts otherwise"
            loaded.learn(20, reset_num_timesteps=False)
            assert_finite(loaded)


@clause
def check_combinations(algorithm: Algorithm, **settings: Any) -> None:
    """n-step returns, several environments, normalized rewards and data go together for arrays and dictionaries."""
    for name in ("matrix", "dict with an image"):
        space = {**VECTORS, **OTHERS_WITH_DATA}[name]
        dataset = record(PointEnv(space), 60)
        learners = []
        env = VecNormalize(vec_env(2, space), norm_obs=False)
        common: dict[str, Any] = {"n_steps": 3, "buffer_size": 100, "policy_kwargs": small_extractor(space)}
        model = make(algorithm, settings, env, dataset=dataset, offline_steps=4, **common)
        with moving(model, f"training on observations {name}"):
            model.learn(24)
        for _ in range(2):
            loaded = reloaded(model, _reloaded_statistics(env, space), with_buffer=True, dataset=dataset)
            loaded.set_random_seed(3)
            learners.append(loaded.learn(16, reset_num_timesteps=False))
        n_steps = learners[0].num_timesteps
        assert n_steps == 40, f"observations {name}: 24 + 16 steps are counted as {n_steps}"
        assert differs(state(learners[0]), state(model)), f"observations {name}: a loaded model does not train on"
        assert_same_learner(learners[1], learners[0], f"observations {name}: two loaded models do the same")


@clause
def check_rollouts(algorithm: Algorithm, **settings: Any) -> None:
    """``train_freq`` in steps and episodes, ``gradient_steps`` and ``policy_delay`` mean what they mean in SB3."""
    for wanted, expected in (
        ({"train_freq": 4}, 20),
        ({"train_freq": (4, "step"), "gradient_steps": 3}, 60),
        ({"train_freq": 4, "gradient_steps": -1}, 80),
    ):
        model = make(algorithm, settings, dataset=None, learning_starts=20, **wanted).learn(100)
        assert model._n_updates == expected, f"{wanted}: {model._n_updates} gradient steps in 80 steps, expected {expected}"
    for gradient_steps in (2, -1):
        watch = Record()
        model = make(
            algorithm, settings, dataset=None, learning_starts=0, train_freq=(1, "episode"), gradient_steps=gradient_steps
        ).learn(60, callback=watch)
        assert model._n_updates > 0 and (gradient_steps == -1 or model._n_updates % gradient_steps == 0), (
            f"train_freq=(1, 'episode'), {gradient_steps=}: {model._n_updates} gradient steps"
        )
        n_steps = [watch.updates.count(number) for number in sorted(set(watch.updates))]
        assert max(n_steps) <= 20 and len(n_steps) > 2, f"train_freq=(1, 'episode'): rollouts of {n_steps} steps"
        if gradient_steps == -1:
            assert model._n_updates == len(watch.updates), f"{model._n_updates} gradient steps in {len(watch.updates)} steps"
    for delay in (1, 3):
        model = make(algorithm, settings, dataset=vector_data(), policy_delay=delay).pretrain(delay - 1 or 1)
        before = state(model)
        model.pretrain(1)
        # Counted from the first gradient step, so that it is now time for the policy
        assert differs(state(model), before, "actor."), f"policy_delay={delay}: no step of the policy when it is due"
        if delay > 1:
            before = state(model)
            model.pretrain(delay - 1)
            after = state(model)
            assert not differs(after, before, "actor."), f"policy_delay={delay}: a step of the policy too early"
            assert differs(after, before, "critic."), f"policy_delay={delay}: the critics wait too"


@clause
def check_action_noise(algorithm: Algorithm, **settings: Any) -> None:
    """Action noise of every kind explores, within the bounds, and is not in deterministic predictions."""
    kinds: dict[str, Callable[[], ActionNoise]] = {
        "normal": _noise,
        "Ornstein-Uhlenbeck": lambda: OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.5 * np.ones(2)),
        "large": lambda: NormalActionNoise(np.zeros(2), 5.0 * np.ones(2)),
    }
    for kind, noise in kinds.items():
        for n_envs in (1, 2):
            watch = Record()
            env = vec_env(n_envs)
            model = make(algorithm, settings, env, dataset=vector_data(), offline_steps=5, action_noise=noise())
            model.learn(20, callback=watch)
            actions = np.stack(watch.actions)
            assert np.abs(actions).max() <= 1.0, f"{kind} action noise leaves the bounds"
            model.policy.load_state_dict(watch.states[0])
            policy = model.predict(watch.observations[0], deterministic=True)[0]
            assert not np.allclose(actions[0], policy, atol=1e-4), f"{kind} action noise is not added in {n_envs} environments"


@clause
def check_learning_rate_schedules(algorithm: Algorithm, **settings: Any) -> None:
    """A learning rate that is a function follows the online run and stays at its start while pretraining."""
    model = make(algorithm, settings, dataset=vector_data(), learning_rate=lambda remaining: 1e-3 * remaining)
    model.pretrain(5)
    groups = [optimizer.param_groups[0] for optimizer in (model.actor.optimizer, model.critic.optimizer)]
    rates = [group["lr"] for group in groups]
    assert rates == [1e-3, 1e-3], f"while pretraining the learning rates are {rates}, expected 0.001"
    model.learn(40)
    rates = [group["lr"] for group in groups]
    assert max(rates) < 1e-4, f"at the end of a schedule to zero the learning rates are {rates}"


@clause
def check_kernels_agree(algorithm: Algorithm, **settings: Any) -> None:
    """The update kernel does not matter: autograd and the default give the same networks up to rounding."""
    finals = []
    for kernel in ("autograd", "auto"):
        model = make(algorithm, settings, dataset=vector_data(), kernel=kernel, batch_size=64)
        model.load_offline_data()
        start = state(model)
        try:
            FastKernel.check(model.policy)
            is_fast = kernel == "auto"
        except NotSupportedError:
            is_fast = False
        original = FastKernel.update_critics
        with mock.patch.object(FastKernel, "update_critics", autospec=True, side_effect=original) as by_fast_kernel:
            model.pretrain(6)
        finals.append(state(model))
        expected = 6 if is_fast else 0
        found = by_fast_kernel.call_count
        assert found == expected, f"kernel={kernel!r}: {found} of 6 updates by the fast kernel, expected {expected}"
    names = [name for name, value in finals[0].items() if value.is_floating_point()]
    moved = sum(float((finals[0][name] - start[name]).square().sum()) for name in names) ** 0.5
    apart = sum(float((finals[0][name] - finals[1][name]).square().sum()) for name in names) ** 0.5
    assert moved > 0, "6 gradient steps change nothing"
    assert apart <= 0.02 * moved, f"after 6 gradient steps of length {moved:.2g} the kernels are {apart:.2g} apart"


@clause
def check_make_vec_env(algorithm: Algorithm, **settings: Any) -> None:
    """An environment may be given by its id, as a Gymnasium environment or as a vectorized one."""
    for env in ("Pendulum-v1", make_vec_env("Pendulum-v1", 2, seed=0)):
        model = make(algorithm, settings, env, dataset="bundled:pendulum-medium", offline_steps=3)
        model.learn(20)
        assert model.num_timesteps == 20, f"20 steps are counted as {model.num_timesteps}"
