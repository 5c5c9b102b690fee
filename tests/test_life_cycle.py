"""Pretraining, warm-up, finetuning: what happens when, and what never happens."""

import contextlib
import copy
import csv
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, ReBRAC, load_dataset
from sb3_offline_ft.offline_td3 import Phase
from tests import hooks

ENV = "Pendulum-v1"
DATASET = "bundled:pendulum-medium"
SMALL = {"net_arch": [16, 16]}
ALGORITHMS = [OfflineTD3, TD3BC, TD3C]


def make(algorithm: type[OfflineTD3] = TD3BC, env=ENV, **settings) -> OfflineTD3:
    # Small batches: no update happens before the online part of a batch has been gathered
    defaults = {"dataset": DATASET, "policy_kwargs": SMALL, "seed": 0, "device": "cpu", "warmup_steps": 0, "batch_size": 2}
    if algorithm is TD3C:
        defaults["constraint_reference"] = "pretrained"
    return algorithm("MlpPolicy", env, **(defaults | settings))


def state(model: TD3) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def assert_same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> None:
    for name, value in a.items():
        assert th.equal(value, b[name]), name


def differs(a: dict[str, th.Tensor], b: dict[str, th.Tensor], prefix: str = "") -> bool:
    return any(not th.equal(value, b[name]) for name, value in a.items() if name.startswith(prefix))


def evaluation(**settings) -> EvalCallback:
    return EvalCallback(Monitor(gym.make(ENV)), verbose=0, **({"n_eval_episodes": 1} | settings))


class Own(TD3BC):
    """A user's subclass that does not repeat the constructor."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Record(BaseCallback):
    """Records the actions taken, the number of updates and the weights at each environment step."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[np.ndarray] = []
        self.observations: list[np.ndarray] = []
        self.updates: list[int] = []
        self.states: list[dict[str, th.Tensor]] = []

    def _on_step(self) -> bool:
        self.actions.append(self.locals["actions"].copy())
        self.observations.append(hooks.last_observations(self.model).copy())
        self.updates.append(hooks.n_updates(self.model))
        self.states.append(state(self.model))
        return True


# Determinism and resuming


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_seed_same_result_to_the_bit(algorithm):
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    runs = []
    for disturbance in (0, 1):
        model = make(algorithm, offline_steps=30, warmup_steps=20, action_noise=noise)
        # Another user of the global generators between construction and use changes the offline phase by nothing
        np.random.rand(disturbance)
        th.rand(disturbance)
        model.pretrain()
        offline = state(model)
        model.set_random_seed(7)
        model.learn(60)
        online = state(model)
        # Seeding a model seeds its own generators too
        model.set_random_seed(3)
        runs.append((offline, online, model.replay_buffer.sample(4).observations))
    assert_same(runs[0][0], runs[1][0])
    assert_same(runs[0][1], runs[1][1])
    assert th.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumed_pretraining_goes_on_to_the_bit(algorithm, tmp_path):
    whole = make(algorithm).pretrain(70)
    half = make(algorithm).pretrain(33)
    half.save(tmp_path / "model")
    th.rand(3)
    resumed = algorithm.load(tmp_path / "model")
    assert resumed.offline_steps_done == 33
    resumed.pretrain(37)
    assert_same(state(whole), state(resumed))
    for name in ("actor", "critic"):
        a, b = (getattr(model, name).optimizer.state_dict()["state"] for model in (whole, resumed))
        assert all(th.equal(x, b[key][k]) for key, moments in a.items() for k, x in moments.items())


def test_learn_does_what_is_left_of_the_pretraining():
    model = make(offline_steps=40)
    model.pretrain(15)
    assert model.remaining_offline_steps == 25
    model.learn(3)
    assert model.offline_steps_done == 40 and model.num_timesteps == 3 and hooks.n_updates(model) == 43
    model.learn(3)
    assert model.offline_steps_done == 40, "once online, learn() does not go back"
    model.pretrain(5)
    assert model.offline_steps_done == 45 and model.num_timesteps == 3


@pytest.mark.parametrize("progress_bar", [False, True])
def test_interrupt_while_pretraining_leaves_a_model_that_resumes(tmp_path, progress_bar, monkeypatch):
    model = make(offline_steps=60)
    train = model.train

    def interrupted(gradient_steps, batch_size):
        train(20, batch_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "train", interrupted)
    callback = evaluation(eval_freq=10)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10, callback=callback, progress_bar=progress_bar)
    # rl-zoo3 ends its first callback after an interrupt
    callback.on_training_end()
    assert model.offline_steps_done == 20 and model.num_timesteps == 0 and model.phase is Phase.PRETRAINED
    monkeypatch.undo()
    model.save(tmp_path / "model")
    resumed = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    resumed.learn(5)
    assert resumed.offline_steps_done == 60 and resumed.num_timesteps == 5


def test_zoo_style_progress_bar_survives_an_interrupt(monkeypatch):
    from stable_baselines3.common.callbacks import ProgressBarCallback

    model = make(offline_steps=60)
    monkeypatch.setattr(model, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    bar = ProgressBarCallback()
    with contextlib.suppress(KeyboardInterrupt):
        model.learn(10, callback=[bar])
    bar.on_training_end()


# Warm-up and switch


@pytest.mark.parametrize("n_envs", [1, 2])
def test_warm_up_updates_nothing(n_envs):
    model = make(
        TD3C, make_vec_env(ENV, n_envs), offline_steps=20, warmup_steps=20,
        action_noise=NormalActionNoise(np.zeros(1), 0.5 * np.ones(1)),
    )  # fmt: skip
    record = Record()
    model.learn(40, callback=record)
    n_warm = 20 // n_envs
    for k in range(n_warm):
        assert record.updates[k] == 20
        assert_same(record.states[k], record.states[0])
    assert record.updates[-1] > 20


def test_warm_up_actions_are_the_policys():
    noise = NormalActionNoise(np.zeros(1), 0.5 * np.ones(1))
    for with_noise in (False, True):
        model = make(offline_steps=20, warmup_steps=20, action_noise=noise, warmup_action_noise=with_noise)
        record = Record()
        model.learn(20 + 1, callback=record)
        frozen = make()
        frozen.policy.load_state_dict(record.states[0])
        equal = [
            np.allclose(frozen.predict(observation)[0], action, atol=1e-5)
            for observation, action in zip(record.observations, record.actions, strict=True)
        ]
        assert all(equal[:20]) is not with_noise
        assert not equal[20], "the first step after the warm-up explores"


def test_pretrained_agent_never_acts_at_random(tmp_path):
    model = make(offline_steps=20, learning_starts=50)
    record = Record()
    with pytest.warns(UserWarning, match="`learning_starts=50` would replace the pretrained policy by random actions"):
        model.learn(10, callback=record)
    assert model.learning_starts == 0
    model.save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    record = Record()
    loaded.learn(10, callback=record)
    before = TD3BC.load(tmp_path / "model")
    assert np.allclose(before.predict(record.observations[0])[0], record.actions[0], atol=1e-5)


def test_agent_loaded_from_sb3_never_acts_at_random(tmp_path):
    td3 = TD3("MlpPolicy", ENV, learning_starts=10, policy_kwargs=SMALL, seed=0, device="cpu").learn(30)
    td3.save(tmp_path / "td3")
    loaded = OfflineTD3.load(tmp_path / "td3", env=gym.make(ENV), warmup_steps=5)
    record = Record()
    loaded.learn(6, callback=record)
    for observation, action in zip(record.observations, record.actions, strict=True):
        assert np.allclose(td3.predict(observation)[0], action, atol=1e-5)


@pytest.mark.parametrize(("dataset", "needed"), [(None, 32), (DATASET, 24)])
def test_loaded_agent_does_not_train_on_an_almost_empty_buffer(tmp_path, dataset, needed):
    """A batch needs 32 transitions, 24 of them from online where a quarter is offline."""
    make(offline_steps=5).pretrain().save(tmp_path / "model")
    model = TD3BC.load(tmp_path / "model", env=gym.make(ENV), dataset=dataset, batch_size=32, offline_fraction=0.25)
    for reset in (True, False):
        record = Record()
        model.replay_buffer.reset()
        start = hooks.n_updates(model)
        model.learn(40, callback=record, reset_num_timesteps=reset)
        assert record.updates[needed - 1] == start
        assert record.updates[needed] == start + 1


class WarmUpAgain(Record):
    """Begins warm-ups of so many steps at these environment steps, as a guard's remedy does."""

    def __init__(self, steps: dict[int, int]) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        if self.num_timesteps in self.steps:
            self.model.begin_warmup(self.steps[self.num_timesteps])
        return super()._on_step()


def test_a_later_warm_up_is_not_taken_for_the_first(tmp_path):
    noise = NormalActionNoise(np.zeros(1), 0.5 * np.ones(1))
    model = make(offline_steps=10, warmup_steps=20, action_noise=noise)
    # The last one is over before the one that is under way
    record = WarmUpAgain({40: 20, 45: 2})
    model.learn(50, callback=record)
    assert model.first_warmup_end == 20
    model.save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    assert loaded.first_warmup_end == 20
    for one in (model, loaded):
        going_on = Record()
        one.learn(20, callback=going_on, reset_num_timesteps=False)
        assert one.first_warmup_end == 20
        # The update of step 40 is held back already, that of step 61 is not
        updates = [*record.updates, *going_on.updates]
        assert updates[20:22] == [10, 11] and updates[39:61] == [29] * 22 and updates[61] == 30
    again = Record()
    model.warmup_steps = 5
    model.learn(10, callback=again)
    assert model.first_warmup_end == 5 and again.updates[6] == again.updates[0] + 1


def test_a_warm_up_asked_for_within_the_first_prolongs_it():
    model = make(offline_steps=10, warmup_steps=20)
    record = WarmUpAgain({5: 3, 10: 20})
    model.learn(40, callback=record)
    assert model.first_warmup_end == 30
    assert record.updates[30] == 10 and record.updates[31] == 11


@pytest.mark.parametrize(
    ("n_envs", "settings", "expected"),
    [
        (1, {"buffer_size": 1}, r"`buffer_size=1`\) holds the last 1 transitions, and the run has 60 steps.*`buffer_size=60`"),
        # Rounded down to rows of four environments
        (4, {"buffer_size": 7}, r"`buffer_size=7`\) holds the last 4 transitions, and the run has 60 steps"),
        # More than a tenth of the run, but less than the four online ones of a batch
        (1, {"buffer_size": 7, "batch_size": 16}, "holds the last 7 transitions"),
        (1, {"buffer_size": 7, "batch_size": 16, "learning_starts": 3, "offline_steps": 0}, "holds the last 7 transitions"),
        (1, {"buffer_size": 10}, None),
        (1, {"buffer_size": 60, "batch_size": 100}, None),
    ],
)
def test_a_buffer_that_cannot_hold_the_run_is_said_once(n_envs, settings, expected, capsys):
    model = make(env=make_vec_env(ENV, n_envs), **({"offline_steps": 2, "verbose": 1} | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(60, log_interval=None)
        model.learn(20, log_interval=None, reset_num_timesteps=False)
    told = [str(entry.message) for entry in caught if "replay buffer" in str(entry.message)]
    printed = capsys.readouterr().out.count("older transitions are forgotten")
    if expected is None:
        # 60 rows hold the run; 10 of 60 are few, and may be meant
        assert told == [] and printed == (settings["buffer_size"] == 10)
    else:
        assert len(told) == 1 and re.search(expected, told[0]), told
        assert printed == 0


def test_a_buffer_too_small_for_a_run_in_pieces_is_said_once():
    model = make(offline_steps=2, buffer_size=10)
    model.learn(40, log_interval=None)
    with pytest.warns(UserWarning, match=r"holds the last 10 transitions, and the run has 120 steps") as caught:
        for _ in range(4):
            model.learn(40, log_interval=None, reset_num_timesteps=False)
    assert len(caught) == 1


def test_a_batch_that_grows_beyond_the_buffer_is_said_once():
    model = make(offline_steps=5, buffer_size=20, batch_size=40, offline_fraction="lin_1_0")
    with pytest.warns(UserWarning, match="holds 20 transitions, fewer than the 21 online ones of a batch") as caught:
        model.learn(60)
    assert len(caught) == 1
    assert hooks.n_updates(model) > 5 + 50


def test_a_buffer_without_a_finetuning_run_is_sb3s_own_affair():
    with pytest.warns(UserWarning, match="neither a dataset nor pretrained weights") as caught:
        make(dataset=None, buffer_size=5, learning_starts=10).learn(100)
    assert len(caught) == 1


def test_critic_warm_up_updates_only_the_critics():
    model = make(offline_steps=20, critic_warmup_steps=10)
    record = Record()
    model.learn(30, callback=record)
    first, during, after = record.states[0], record.states[10], record.states[-1]
    assert not differs(first, during, "actor")
    assert differs(first, during, "critic.") and differs(first, during, "critic_target.")
    assert differs(during, after, "actor.mu") and differs(during, after, "actor_target.mu")


@pytest.mark.parametrize("reset", [True, False])
def test_optimizers_are_reset_at_the_switch_if_asked(reset):
    model = make(offline_steps=20, reset_optimizers=reset, warmup_steps=5)
    with pytest.warns(UserWarning, match="nothing will be learned online"):
        model.learn(4)
    states = [model.actor.optimizer.state, model.critic.optimizer.state]
    assert all(bool(s) is not reset for s in states)


def test_warm_up_longer_than_the_run_is_said():
    with pytest.warns(UserWarning, match="nothing will be learned online"):
        make(offline_steps=5, warmup_steps=100).learn(10)


def test_exact_share_of_offline_rows_while_finetuning():
    model = make(offline_steps=3, offline_fraction="lin_0.75_0.25", batch_size=40)
    shares = hooks.observe_batches(model)
    model.learn(100)
    assert all(batch.is_offline.all() for batch in shares[:3])
    counts = [int(batch.is_offline.sum()) for batch in shares[3:]]
    first = 101 - len(counts)
    assert first == 12, "before that, fewer transitions than the online part of a batch"
    assert counts == [round((0.25 + 0.5 * (1 - k / 100)) * 40) for k in range(first, 101)]


# Callbacks, evaluation, logging


def test_pretrained_policy_is_evaluated_before_the_first_step(tmp_path):
    model = make(offline_steps=10, warmup_steps=30)
    callback = evaluation(eval_freq=20, log_path=str(tmp_path))
    model.learn(50, callback=EveryNTimesteps(1, callback))
    assert callback.evaluations_timesteps == [0, 20, 40]
    assert callback.n_calls == 50
    untrained = evaluation(eval_freq=20, log_path=str(tmp_path / "untrained"))
    make().learn(30, callback=untrained)
    assert untrained.evaluations_timesteps == [20]


class NeedsStart(BaseCallback):
    """An ordinary callback: it has what it needs once training has started."""

    def _on_training_start(self) -> None:
        self.timesteps: list[int] = []

    def _on_step(self) -> bool:
        self.timesteps.append(self.num_timesteps)
        return True


def test_callbacks_have_started_before_the_initial_evaluation():
    child = NeedsStart()
    make(offline_steps=10).learn(50, callback=evaluation(eval_freq=20, callback_after_eval=child))
    assert child.timesteps == [0, 20, 40]


def test_initial_evaluation_can_stop_the_run():
    stop = StopTrainingOnRewardThreshold(-1e9)
    model = make(offline_steps=10)
    model.learn(50, callback=evaluation(eval_freq=20, callback_on_new_best=stop))
    assert model.num_timesteps == 1, "SB3 asks after a step"


def test_function_as_callback():
    steps = []
    make(offline_steps=5).learn(7, callback=lambda locals_, globals_: steps.append(1) or True)
    assert len(steps) == 7


class Reads(BaseCallback):
    """Reads what SB3 tells about the environment's last step, in one way or another."""

    def __init__(self, read) -> None:
        super().__init__()
        self.read = read

    def _on_step(self) -> bool:
        self.read(self.locals)
        return True


READ = ["dones", "rewards", "infos", "new_obs", "actions"]
WAYS = [lambda d, n: d[n], lambda d, n: d.get(n), lambda d, n: n in d]
NESTED = [
    lambda child: child,
    lambda child: [CheckpointCallback(1000, "nowhere"), CallbackList([child])],
    lambda child: EveryNTimesteps(2, child),
    lambda child: evaluation(eval_freq=2, callback_after_eval=child),
    lambda child: lambda locals_, globals_: child.read(locals_) is not globals_,
]


# Each name with each nesting, and each of the two in each way
@pytest.mark.parametrize(
    ("name", "read", "nested"),
    [(name, WAYS[(i + j) % 3], nested) for i, name in enumerate(READ) for j, nested in enumerate(NESTED)],
)
def test_a_callback_that_reads_steps_of_the_environment_is_told_that_pretraining_has_none(name, read, nested):
    model = make()
    callback = nested(Reads(lambda locals_: read(locals_, name)))
    with pytest.raises(ValueError, match=f"`locals\\['{name}'\\]`, but there are no episodes in `pretrain`.*to `learn`"):
        model.pretrain(4, callback=callback)
    assert 0 < model.offline_steps_done <= 2 and model.num_timesteps == 0
    if not isinstance(callback, EvalCallback):
        # In the online phase they are there, but for an evaluation before the first step
        model.learn(4, callback=callback)


def test_callbacks_that_count_episodes_are_refused_before_anything_is_done():
    model = make()
    for callback in (StopTrainingOnMaxEpisodes(5), [evaluation(callback_after_eval=StopTrainingOnMaxEpisodes(5))]):
        with pytest.raises(ValueError, match="StopTrainingOnMaxEpisodes counts episodes, but there are no episodes in `pret"):
            model.pretrain(4, callback=callback)
        assert model.offline_steps_done == 0 and model.offline_dataset is None


def test_callbacks_of_the_zoo_and_those_that_need_no_episode_run_while_pretraining(tmp_path):
    from rl_zoo3.callbacks import RawStatisticsCallback, SaveVecNormalizeCallback

    seen = []
    callbacks = [
        SaveVecNormalizeCallback(2, str(tmp_path)),
        Reads(lambda locals_: seen.append((locals_["gradient_steps"], "other" in locals_, locals_.get("other", 3)))),
        EveryNTimesteps(2, NeedsStart()),
    ]
    model = make(env=VecNormalize(make_vec_env(ENV), norm_obs=False, norm_reward=False))
    model.pretrain(2, callback=callbacks, progress_bar=True)
    assert seen == [(2, False, 3)] * 2 and (tmp_path / "vecnormalize.pkl").exists()
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    with pytest.raises(ValueError, match="no episodes"):
        model.pretrain(4, callback=RawStatisticsCallback())
    model = make()
    model.pretrain(10, callback=evaluation(eval_freq=3, callback_on_new_best=StopTrainingOnRewardThreshold(-1e9)))
    assert model.offline_steps_done == 3, "it is good enough at the first evaluation"


def test_pretrain_runs_ordinary_callbacks_against_gradient_steps(tmp_path):
    model = make()
    evaluations = evaluation(eval_freq=10, log_path=str(tmp_path), best_model_save_path=str(tmp_path))
    model.pretrain(30, callback=[evaluations, CheckpointCallback(15, str(tmp_path))])
    assert evaluations.evaluations_timesteps == [10, 20, 30]
    assert (tmp_path / "rl_model_15_steps.zip").exists() and (tmp_path / "rl_model_30_steps.zip").exists()
    assert model.num_timesteps == 0
    loaded = TD3BC.load(tmp_path / "rl_model_15_steps.zip")
    assert loaded.num_timesteps == 0 and loaded.offline_steps_done == 15 and loaded.phase is Phase.PRETRAINED


def test_logs_may_be_dumped_while_pretraining():
    make().pretrain(20, callback=LogEveryNTimesteps(5))


def test_model_can_be_copied_after_learning():
    model = make(TD3C, offline_steps=10)
    model.learn(20, callback=evaluation(eval_freq=5))
    twin = copy.deepcopy(model)
    assert_same(state(model), state(twin))
    assert model.evaluations.callbacks == []


def test_callback_can_stop_pretraining():
    model = make()

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 7

    model.pretrain(30, callback=Stop())
    assert model.offline_steps_done == 7


def test_offline_and_online_values_are_logged_apart(tmp_path):
    model = make(offline_steps=40)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.pretrain(20, callback=evaluation(eval_freq=10), log_interval=10)
    model.learn(450, callback=evaluation(eval_freq=100), log_interval=1)
    model.logger.close()
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=False)) for line in lines[1:]]
    offline = [row for row in rows if row.get("offline/gradient_steps")]
    online = [row for row in rows if row.get("train/critic_loss")]
    assert [int(row["offline/gradient_steps"]) for row in offline][-1] == 40
    assert online and not any(row.get("offline/critic_loss") for row in online)
    assert all(not row.get("train/critic_loss") and not row.get("eval/mean_reward") for row in offline)
    for key in ("offline/critic_loss", "offline/actor_loss", "offline/bc_loss", "offline/eval_mean_reward", "train/bc_weight"):
        assert key in header


def test_train_and_pretrain_work_before_learn():
    model = make()
    model.load_offline_data()
    model.train(2)
    assert hooks.n_updates(model) == 2 and model.offline_steps_done == 0


def test_progress_bars_of_both_phases(capsys):
    make(TD3C, offline_steps=60).learn(30, progress_bar=True)
    shown = "".join(capsys.readouterr())
    assert "TD3C offline" in shown and "60/60" in shown and "30/30" in shown


def test_learning_rate_schedule_stays_at_its_start_while_pretraining():
    model = make(learning_rate=lambda progress_remaining: 1e-3 * progress_remaining)
    model.learn(10)
    assert hooks.progress_remaining(model) == 0
    model.pretrain(2)
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-3
    assert hooks.progress_remaining(model) == 0


# Normalizer


def test_normalizer_is_fitted_once_and_travels(tmp_path):
    data = load_dataset(DATASET)
    model = make(TD3C, offline_steps=10)
    model.pretrain(5)
    normalizers = model.policy.normalizers()
    assert len(normalizers) == 4
    for normalizer in normalizers:
        assert normalizer.observation_mean.numpy() == pytest.approx(data.observations.mean(0), abs=1e-5)
        assert normalizer.observation_std.numpy() == pytest.approx(data.observations.std(0) + 1e-3, abs=1e-5)
    before = state(model)
    model.learn(20)
    model.save(tmp_path / "model")
    loaded = TD3C.load(tmp_path / "model", env=gym.make(ENV))
    loaded.load_offline_data()
    for name, value in state(loaded).items():
        if "observation_" in name:
            assert th.equal(value, before[name])
    observation = data.observations[0]
    features = loaded.actor.features_extractor(th.tensor(observation[None])).numpy()
    assert features == pytest.approx(
        (observation[None] - data.observations.mean(0)) / (data.observations.std(0) + 1e-3), abs=1e-4
    )


def test_agent_trained_without_a_dataset_is_not_normalized_later(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(dataset=None, learning_starts=10).learn(20)
    model.save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV), dataset=DATASET, offline_steps=0)
    loaded.load_offline_data()
    assert all((normalizer.observation_std == 1).all() for normalizer in loaded.policy.normalizers())


def test_unfitted_normalizer_changes_nothing_to_the_bit():
    normalizer = make().actor.features_extractor
    x = th.randn(50, 3) * 1e3
    assert th.equal(normalizer(x), x)


def test_normalizer_that_cannot_be_applied_is_said():
    from stable_baselines3.common.torch_layers import FlattenExtractor

    model = make(policy_kwargs=SMALL | {"features_extractor_class": FlattenExtractor})
    with pytest.warns(UserWarning, match="`normalize_observations` is not applied"):
        model.pretrain(2)


def test_vec_normalize_is_warned_about_and_replaces_the_normalizer():
    env = VecNormalize(make_vec_env(ENV, 1))
    model = make(env=env)
    with pytest.warns(UserWarning) as caught:
        model.pretrain(2)
    said = " ".join(str(warning.message) for warning in caught)
    assert "VecNormalize updates its statistics online" in said and "norm_reward=False" in said
    assert all((normalizer.observation_std == 1).all() for normalizer in model.policy.normalizers())


def test_vec_normalize_on_top_of_the_normalizer_is_refused(tmp_path):
    def normalized():
        return VecNormalize(make_vec_env(ENV, 1), training=False, norm_reward=False)

    model = make(offline_steps=5).pretrain()
    model.save(tmp_path / "model")
    model.set_env(normalized())
    loaded = TD3BC.load(tmp_path / "model", env=normalized())
    for learner in (model, loaded):
        with pytest.raises(ValueError, match="VecNormalize would normalize them a second time"):
            learner.learn(5)
        assert learner.num_timesteps == 0


def test_frozen_vec_normalize_is_fine():
    env = VecNormalize(make_vec_env(ENV, 1), training=False, norm_reward=False)
    make(env=env, offline_steps=5).learn(10)


# Environments


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_several_environments(vec_env_cls):
    env = make_vec_env(ENV, 3, seed=0, vec_env_cls=vec_env_cls)
    model = make(TD3C, env, offline_steps=10, warmup_steps=30, gradient_steps=-1)
    model.learn(90)
    assert model.num_timesteps == 90 and hooks.n_updates(model) == 10 + 60
    assert model.replay_buffer.online_size == 90
    env.close()


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (TD3BC, {"offline_fraction": lambda progress_remaining: 0.5 * progress_remaining}),
        (TD3BC, {"online_bc": lambda progress_remaining: progress_remaining}),
        (TD3C, {"epsilon": "geo_0.1_0.001"}),
    ],
)
def test_schedules_end_with_the_run_though_steps_overshoot(algorithm, settings):
    model = make(algorithm, make_vec_env(ENV, 3), offline_steps=10, **settings)
    model.learn(100)
    assert model.num_timesteps == 102 and hooks.progress_remaining(model) < 0
    if algorithm is TD3C:
        assert model.current_epsilon == pytest.approx(0.001)


def test_integer_observations(tmp_path):
    class Counter(gym.Env):
        observation_space = gym.spaces.Box(0, 9, (2,), np.int64)
        action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.int64), {}

        def step(self, action):
            return np.ones(2, np.int64), 0.0, False, True, {}

    n = 20
    np.savez(tmp_path / "counter.npz", observations=np.zeros((n, 2), np.int64), actions=np.zeros((n, 1), np.float32),
             rewards=np.zeros(n), next_observations=np.ones((n, 2), np.int64), terminations=np.ones(n, bool))  # fmt: skip
    model = make(TD3BC, Counter(), dataset=tmp_path / "counter.npz", offline_steps=3)
    model.learn(10)
    assert model.dataset == str(tmp_path / "counter.npz")


def test_subclass_with_any_keyword(tmp_path):
    make(Own, offline_steps=3).pretrain().save(tmp_path / "model")
    assert isinstance(Own.load(tmp_path / "model", warmup_steps=3), Own)
    with pytest.raises(TypeError, match="Own got an unknown keyword 'warmup': did you mean 'warmup_steps'"):
        make(Own, warmup=3)


def test_image_observations_without_a_dataset_train_like_sb3():
    from stable_baselines3.common.envs import FakeImageEnv

    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    model = OfflineTD3("CnnPolicy", env, learning_starts=10, buffer_size=100, batch_size=4, seed=0, device="cpu",
                       policy_kwargs={"features_extractor_kwargs": {"features_dim": 16}, "net_arch": [8]})  # fmt: skip
    with pytest.warns(UserWarning, match="trains online like TD3"):
        model.learn(15)


def test_n_step_returns_without_a_dataset_train_like_sb3():
    theirs = TD3("MlpPolicy", ENV, policy_kwargs=SMALL, n_steps=3, seed=0, device="cpu", learning_rate=3e-4).learn(150)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        ours = make(OfflineTD3, dataset=None, n_steps=3, batch_size=256, kernel="autograd",
                    policy_kwargs=SMALL | {"layer_norm": False}).learn(150)  # fmt: skip
    for name, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(name)), name


def test_speed_is_logged_while_pretraining(tmp_path):
    model = make()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.pretrain(20, callback=LogEveryNTimesteps(10))
    model.logger.close()
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    elapsed = [float(row[name]) for row in rows for name in row if "time_elapsed" in name and row[name]]
    assert elapsed and max(elapsed) < 100


class ReadsACopy(BaseCallback):
    def _on_step(self):
        copy = dict(self.locals)
        return bool(copy["dones"].any())


def test_a_callback_that_copies_what_it_reads_is_told_too():
    with pytest.raises(ValueError, match="there are no episodes in `pretrain`"):
        make(offline_steps=5).pretrain(callback=ReadsACopy())


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C, ReBRAC])
def test_warnings_name_the_users_line(algorithm, tmp_path):
    make(TD3BC).pretrain(1).save(tmp_path / "model")
    unnormalized = SMALL | {"features_extractor_class": FlattenExtractor}
    with pytest.warns(UserWarning) as told:
        make(algorithm, dataset=None).learn(1)
        make(algorithm, policy_kwargs=unnormalized, warmup_steps=5, learning_starts=9, offline_steps=1).learn(5)
        make(algorithm, policy_kwargs=unnormalized).pretrain(1)
        algorithm.load(tmp_path / "model", env=gym.make(ENV), dataset=[DATASET, DATASET]).pretrain(1)
    assert {warning.filename for warning in told} == {__file__}
    # TD3C says besides that the file has no multiplier
    assert len(told) == (7 if algorithm is TD3C else 6)
