"""TD3C: the constraint holds, the multiplier follows it, the reference is the right policy."""

import copy
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_offline_ft import TD3BC, TD3C, CollapseGuard, LearnerSnapshot
from sb3_offline_ft.td3c.multiplier import Multiplier
from tests import hooks

DATASET = "bundled:pendulum-medium"
SMALL = {"net_arch": [16, 16]}


def make(env="Pendulum-v1", **settings) -> TD3C:
    defaults = {
        "dataset": DATASET,
        "policy_kwargs": SMALL,
        "seed": 0,
        "device": "cpu",
        "learning_rate": 1e-3,
        "batch_size": 8,
        "warmup_steps": 0,
    }
    return TD3C("MlpPolicy", env, **(defaults | settings))


class ConstantPush(nn.Module):
    """A critic that always wants larger actions: Q = 100 + push * sum(a)."""

    def __init__(self, push: float) -> None:
        super().__init__()
        self.push = push
        self.unused = nn.Parameter(th.zeros(1))

    def q1_forward(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return 100 + self.push * actions.sum(dim=1, keepdim=True)


def start(model: TD3C) -> None:
    """Pretrain and go online without a step."""
    model.pretrain(50)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*learns what is best from an EvalCallback")
        model.learn(0)


def push(model: TD3C, strength: float, updates: int) -> list[tuple[float, float]]:
    """Update the actor under a constant push; returns the distance to the reference and the multiplier after each update."""
    model.critic.q1_forward = ConstantPush(strength).q1_forward
    model.kernel = "autograd"
    trace = []
    for _ in range(updates):
        batch = model.draw_batch(64)
        hooks.update_actor(model, batch)
        model.updater.kernel.update_targets(model.tau, True)
        reference = model.reference_actor or model.actor_target
        with th.no_grad():
            distance = (model.actor(batch.observations) - reference(batch.observations)).square().mean()
        trace.append((float(distance), model.multiplier))
    return trace


@pytest.mark.parametrize("reference", ["pretrained", "target"])
def test_policy_stays_within_epsilon_and_the_multiplier_decays_when_the_push_is_gone(reference):
    epsilon = 1e-3
    model = make(
        constraint_reference=reference, epsilon=epsilon, multiplier_learning_rate=5e-2, initial_multiplier=0.1, tau=0.01
    )
    start(model)

    trace = push(model, strength=50.0, updates=1600)
    adapted = np.array(trace[1000:])
    # The root mean square distance to the reference; 20 % over it for the swings of a primal-dual iteration
    assert math.sqrt(adapted[:, 0].mean()) <= 1.2 * math.sqrt(epsilon)
    assert adapted[:, 0].mean() >= 0.2 * epsilon, "the constraint is not active: nothing is tested"
    under_push = adapted[-1, 1]
    assert under_push > 0.1

    free = push(model, strength=0.0, updates=1200)
    assert free[-1][1] < 0.05 * under_push
    distances = [distance for distance, _ in free]
    assert distances[-1] < epsilon


def test_without_the_constraint_the_same_push_leaves_the_reference():
    model = make(constraint_reference="pretrained", epsilon=4.0, min_multiplier=1e-9, initial_multiplier=1e-9)
    start(model)
    assert push(model, strength=50.0, updates=400)[-1][0] > 0.1


def make_saturated(trust_region: float | None) -> TD3C:
    """On one side the reference's actions are at their bound, on the other side the policy's, where gradients vanish."""
    model = make(constraint_reference="pretrained", epsilon=1e-2, initial_multiplier=1e3, trust_region=trust_region)
    start(model)
    for actor, bias in ((model.reference_actor, 15.0), (model.actor, -15.0)):
        with th.no_grad():
            actor.mu[-2].bias.fill_(bias)
    return model


def test_gradients_do_not_bring_a_saturated_policy_back_and_the_trust_region_does():
    assert push(make_saturated(None), 0.0, 100)[-1][0] == pytest.approx(4.0, rel=1e-3)
    model = make_saturated(2.0)
    assert push(model, 0.0, 100)[-1][0] < 2e-2
    assert 0 < model.constraint.mean_distance <= 2e-2


@pytest.mark.parametrize("reference", ["pretrained", "target"])
def test_the_policy_stays_in_the_trust_region_whatever_the_multiplier_does(reference):
    """The multiplier is fixed near 0 here, and a constant push drives the policy away."""
    settings = {
        "constraint_reference": reference,
        "epsilon": 1e-3,
        "initial_multiplier": 1e-3,
        "multiplier_learning_rate": 0.0,
        "learning_rate": 1e-4,
        "tau": 1e-3,
    }
    free, kept = make(**settings, trust_region=None), make(**settings)
    for model in (free, kept):
        start(model)
    assert push(free, 50.0, 300)[-1][0] > 0.05
    trace = np.array(push(kept, 50.0, 300))[:, 0]
    running, weight = 0.0, 0.1
    for distance in trace:
        running += weight * (distance - running)
        # It is moved back before the next step: one step of slack
        assert running <= 1.25 * 2e-3
    assert trace[100:].mean() > 5e-4, "the policy does not move: nothing is tested"
    assert 0 < kept.updater.pop_means()["train/moved_back"] < 1


def test_the_policy_that_acts_is_in_the_trust_region_too():
    """The average remembers where the policy was allowed to be before epsilon fell to a tenth."""
    model = make(constraint_reference="pretrained", epsilon=1e-2, policy_averaging=0.99, initial_multiplier=1e-3,
                 multiplier_learning_rate=0.0, learning_rate=1e-4)  # fmt: skip
    start(model)
    model.learn(1)
    model.critic.q1_forward = ConstantPush(50.0).q1_forward
    model.kernel = "autograd"
    model.replay_buffer.offline_fraction = 1.0
    observations = model.draw_batch(1000).observations

    @th.no_grad()
    def acting() -> float:
        return float((model.actor(observations) - model.reference_actor(observations)).square().mean())

    model.train(400, 64)
    assert acting() > 4e-3, "the policy does not move: nothing is tested"
    model.scale_epsilon(0.1)
    # Ten steps of the actor until it is looked at
    model.train(20, 64)
    for _ in range(50):
        model.train(2, 64)
        # Measured on other states
        assert acting() < 1.25 * 2e-3
    assert acting() > 2e-4


class Reads(TorchDispatchMode):
    """Counts how often the value of a tensor is read, for which a GPU has to be waited for; but for Adam's own counters."""

    def __init__(self, model: TD3C) -> None:
        super().__init__()
        self.n = 0
        self.optimizers = {model.actor.optimizer, model.critic.optimizer}
        self.hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self.optimizers.add(optimizer))

    def __exit__(self, *args):
        self.hook.remove()
        super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is th.ops.aten._local_scalar_dense.default:
            counters = [state["step"] for optimizer in self.optimizers for state in optimizer.state.values()]
            memory = {counter.untyped_storage().data_ptr() for counter in counters}
            self.n += args[0].untyped_storage().data_ptr() not in memory
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
def test_gradient_steps_read_no_value_of_a_tensor(kernel):
    model = make(constraint_reference="pretrained", epsilon=1e-6, kernel=kernel, critic_penalty=0.1)
    start(model)
    model.learn(8)
    counts = []
    for gradient_steps in (4, 44):
        model.updater.pop_means()
        with Reads(model) as reads:
            model.train(gradient_steps, 8)
        counts.append(reads.n)
    # What is left is read once at the end, for the log
    assert counts[0] == counts[1] > 0
    assert model.logger.name_to_value["train/moved_back"] > 0


def test_a_run_goes_on_in_its_trust_region(tmp_path):
    model = make(constraint_reference="pretrained", epsilon=0.1)
    start(model)
    push(model, 50.0, 30)
    model.save(tmp_path / "model")
    loaded = TD3C.load(tmp_path / "model")
    assert loaded.constraint.mean_distance == model.constraint.mean_distance > 0
    snapshot = LearnerSnapshot.take(model)
    before = model.constraint.mean_distance
    push(model, 50.0, 3)
    assert model.constraint.mean_distance != before
    snapshot.restore(model)
    assert model.constraint.mean_distance == before
    model.set_reference_policy()
    assert model.constraint.mean_distance == 0


def test_multiplier_is_bounded():
    model = make(epsilon=0.0, multiplier_learning_rate=5.0, max_multiplier=7.0, min_multiplier=0.5)
    start(model)
    assert push(model, 50.0, 10)[-1][1] == pytest.approx(7.0)
    model.epsilon = 1.0
    model.scale_epsilon(10.0)
    assert push(model, 0.0, 10)[-1][1] == pytest.approx(0.5)


def test_objective_and_dual_step_are_the_documented_ones():
    model = make(constraint_reference="pretrained", epsilon=0.01, initial_multiplier=2.0, multiplier_learning_rate=0.1)
    start(model)
    with th.no_grad():
        for parameter in model.actor.parameters():
            parameter.add_(0.5 * th.randn_like(parameter))
    batch = model.draw_batch(64)
    actions, reference = model.actor(batch.observations), model.reference_actor(batch.observations)
    q_values = model.critic.q1_forward(batch.observations, actions)
    distance = ((actions - reference) ** 2).mean()
    expected = (-q_values.mean() / q_values.abs().mean() + 2.0 * distance) / 3.0
    loss = hooks.objective(model, batch, actions, q_values).loss(actions, q_values)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance.item() > 0.01
    hooks.update_actor(model, batch)
    # The first step of Adam has the length of the learning rate, here upwards, on log scale
    assert model.multiplier == pytest.approx(2.0 * math.exp(0.1), rel=1e-4)


def test_offline_it_is_td3bc():
    ours = make(alpha=1.5, batch_size=8).pretrain(60)
    theirs = TD3BC("MlpPolicy", "Pendulum-v1", dataset=DATASET, policy_kwargs=SMALL, seed=0, device="cpu", learning_rate=1e-3,
                   alpha=1.5, batch_size=8).pretrain(60)  # fmt: skip
    for a, b in zip(ours.policy.state_dict().values(), theirs.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
def test_penalty_in_the_critics_targets_by_hand(kernel):
    """The same batch and noise with and without it: they differ by the documented term, whose scale is that of the start."""
    model = make(constraint_reference="pretrained", critic_penalty=0.5, initial_multiplier=2.0, gamma=0.9, kernel=kernel)
    start(model)
    with th.no_grad():
        for network in (model.actor_target.mu, *model.critic_target.q_networks):
            for parameter in network.parameters():
                parameter.add_(0.3 * th.randn_like(parameter))
    batch = model.draw_batch(64)
    targets = []
    for penalty in (0.5, 0.0, 0.5):
        model.critic_penalty = penalty
        th.manual_seed(1)
        targets.append(hooks.targets(model, batch))
    th.manual_seed(1)
    noise = th.empty_like(batch.actions).normal_(0, 0.2).clamp(-0.5, 0.5)
    with th.no_grad():
        actions = (model.actor_target(batch.next_observations) + noise).clamp(-1, 1)
        distance = ((actions - model.reference_actor(batch.next_observations)) ** 2).mean(1, keepdim=True)
        scale = th.minimum(*model.critic_target(batch.next_observations, actions)).abs().mean()
    expected = 0.9 * (1 - batch.dones) * 0.5 * 2.0 * scale * distance
    assert float(expected.mean()) > 1e-3
    assert th.allclose(targets[1] - targets[0], expected, rtol=1e-3, atol=1e-5)
    # Values that have grown since do not change the scale
    with th.no_grad():
        for network in model.critic_target.q_networks:
            network[-1].weight.mul_(100)
    th.manual_seed(1)
    large = hooks.targets(model, batch)
    model.critic_penalty = 0.0
    th.manual_seed(1)
    assert th.allclose(hooks.targets(model, batch) - large, expected, rtol=1e-2, atol=1e-3)


def test_offline_the_critics_are_those_of_td3bc_with_a_penalty_too():
    ours, theirs = make(critic_penalty=1.0).pretrain(20), make().pretrain(20)
    for a, b in zip(ours.policy.state_dict().values(), theirs.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)
    assert ours.constraint.value_scale.isnan()


def test_the_scale_of_the_penalty_is_kept(tmp_path):
    """In files and snapshots; a run of its own measures it anew."""
    model = make(constraint_reference="pretrained", critic_penalty=1.0, offline_steps=20).learn(20)
    scale = model.constraint.value_scale
    assert scale > 0 and "train/critic_penalty" in model.logger.name_to_value
    model.save(tmp_path / "model")
    loaded = TD3C.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert loaded.constraint.value_scale == scale
    snapshot = LearnerSnapshot.take(model)
    model.learn(0)
    assert model.constraint.value_scale.isnan()
    snapshot.restore(model)
    assert model.constraint.value_scale == scale


def test_the_scale_of_the_penalty_stays_after_a_rollback_to_before_it_was_measured():
    """The batches after a rollback hold what the collapsed policy did; the scale is that of the run's first one."""
    guard = CollapseGuard(remedies=[], ratchet=False, verbose=0)
    scales = []

    class Spoil(BaseCallback):
        def _on_step(self) -> bool:
            scales.append(float(self.model.constraint.value_scale))
            if self.num_timesteps == 400:
                with th.no_grad():
                    self.model.actor.mu[0].weight[0, 0] = math.nan
            return True

    model = make(env=gym.make("Pendulum-v1", max_episode_steps=50), constraint_reference="pretrained", critic_penalty=1.0,
                 offline_steps=20, warmup_steps=300, train_freq=10)  # fmt: skip
    model.learn(450, callback=[guard, Spoil()])
    assert guard.rollbacks == 1 and math.isnan(scales[299])
    assert set(scales[320:]) == {scales[320]} and scales[320] > 0


def test_a_scale_that_is_not_finite_is_measured_again():
    model = make(constraint_reference="pretrained", critic_penalty=1.0)
    start(model)
    batch = model.draw_batch(8)
    hooks.next_value_penalty(model, batch, batch.actions, th.full((8, 1), math.inf))
    hooks.next_value_penalty(model, batch, batch.actions, th.full((8, 1), 3.0))
    assert model.constraint.value_scale == 3


def test_values_stay_bounded_under_a_penalty():
    """
    Pendulum's values are negative: a penalty that grew with them would let them grow without bound.

    With ``c = critic_penalty * multiplier * distance``, values of a fixed policy sink by ``c * scale / (1 - gamma)`` at most.
    """
    model = make(constraint_reference="pretrained", critic_penalty=1.0, initial_multiplier=20.0, multiplier_learning_rate=0.0,
                 gamma=0.9, tau=0.3, offline_steps=50, learning_rate=1e-2, offline_fraction=1.0)  # fmt: skip
    model.learn(0)
    with th.no_grad():
        model.actor_target.mu[-2].bias.add_(1.0)
    for _ in range(1500):
        batch = model.draw_batch(64)
        hooks.update_critic(model, batch)
        model.updater.kernel.update_targets(model.tau, False)
    values = th.cat(model.critic(batch.observations, batch.actions), dim=1).detach()
    # Rewards are above -16.3, distances in [0, 4]
    least = (-16.3 - 0.9 * 20 * 4 * model.constraint.value_scale) / (1 - 0.9)
    assert least < float(values.min()) < float(values.mean()) < 0


def test_a_penalty_makes_a_policy_that_has_left_worth_less():
    """The value of a target policy that has left its reference, from the same start on the same batches."""

    def value(critic_penalty):
        model = make(constraint_reference="pretrained", critic_penalty=critic_penalty, initial_multiplier=5.0, gamma=0.9,
                     multiplier_learning_rate=0.0, offline_steps=50, offline_fraction=1.0, tau=0.05)  # fmt: skip
        model.learn(0)
        with th.no_grad():
            model.actor_target.mu[-2].bias.add_(1.0)
        for _ in range(400):
            batch = model.draw_batch(64)
            hooks.update_critic(model, batch)
            model.updater.kernel.update_targets(model.tau, False)
        return float(th.cat(model.critic(batch.observations, batch.actions), dim=1).detach().mean())

    assert value(1.0) < value(0.0) - 1.0


class Watch(BaseCallback):
    """Copies the actor and the reference at every step."""

    def _on_step(self) -> bool:
        self.weights = getattr(self, "weights", [])
        reference = self.model.reference_actor
        pair = [copy.deepcopy(net.state_dict()) if net is not None else None for net in (self.model.actor, reference)]
        self.weights.append(pair)
        return True


def same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return all(th.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_best_reference_is_the_policy_of_the_best_evaluation(tmp_path):
    """A controlled evaluation environment decides which evaluation is the best one."""
    # Each evaluation of one step resets twice: at its start, and by itself at its end
    rewards = iter(np.repeat([0.0, -5.0, 3.0, 1.0, 4.0, 2.0], 2).tolist())

    class Scripted(gym.Wrapper):
        def reset(self, **kwargs):
            self.reward = next(rewards)
            return super().reset(**kwargs)

        def step(self, action):
            observation, _, _, _, info = super().step(action)
            return observation, self.reward, True, False, info

    env = Monitor(Scripted(gym.make("Pendulum-v1")))
    evaluation = EvalCallback(env, eval_freq=10, n_eval_episodes=1, log_path=str(tmp_path))
    watch = Watch()
    model = make(constraint_reference="best", offline_steps=20)
    model.learn(50, callback=[watch, evaluation])
    assert _evaluated(evaluation) == [0.0, -5.0, 3.0, 1.0, 4.0, 2.0]
    # watch.weights[k] is taken at step k + 1, before the evaluation and the update of that step
    promoted = [k for k in range(1, 50) if not same(watch.weights[k][1], watch.weights[k - 1][1])]
    for k in promoted:
        assert k % 10 == 0, "the reference changes only right after an evaluation"
        assert same(watch.weights[k][1], watch.weights[k - 1][0]), "and becomes the policy that was evaluated"
    assert promoted == [20, 40]


def _evaluated(evaluation: EvalCallback) -> list[float]:
    return [float(np.mean(result)) for result in evaluation.evaluations_results]


@pytest.mark.parametrize("reference", ["pretrained", "target"])
def test_other_references_ignore_evaluations(reference):
    model = make(constraint_reference=reference, offline_steps=20)
    watch = Watch()
    model.learn(30, callback=[watch, EvalCallback(Monitor(gym.make("Pendulum-v1")), eval_freq=5, n_eval_episodes=1)])
    if reference == "target":
        assert all(weights is None for _, weights in watch.weights)
    else:
        assert all(same(weights, watch.weights[0][0]) for _, weights in watch.weights)


def test_best_without_an_eval_callback_is_said():
    model = make(offline_steps=5)
    with pytest.warns(UserWarning, match="learns what is best from an EvalCallback"):
        model.learn(3)


def test_dataset_without_pretraining_is_said():
    model = make()
    with pytest.warns(UserWarning, match="no pretrained policy to stay near"):
        model.learn(3)
    assert model.reference_actor is None and "train/policy_distance" not in model.logger.name_to_value


def test_scheduled_epsilon(tmp_path):
    model = make(epsilon="geo_0.001_0.1", offline_steps=10, constraint_reference="pretrained")
    model.learn(100)
    model.save(tmp_path / "model")
    for each in (model, TD3C.load(tmp_path / "model")):
        for progress_remaining, epsilon in ((1.0, 0.001), (0.5, 0.01), (0.0, 0.1)):
            hooks.set_progress_remaining(each, progress_remaining)
            assert each.current_epsilon == pytest.approx(epsilon)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint_reference": "last"}, "must be one of 'target', 'pretrained', 'best', 'champion', found 'last'"),
        ({"epsilon": -0.1}, "`epsilon`"),
        ({"epsilon": "fast"}, "`epsilon` is 'fast'"),
        ({"initial_multiplier": 0.0}, "min_multiplier"),
        ({"initial_multiplier": 1e9}, "max_multiplier"),
        ({"multiplier_learning_rate": -1}, "multiplier_learning_rate"),
        ({"trust_region": 0.5}, "`trust_region` must be at least 1, as it is in multiples of `epsilon`, or None .* found 0.5"),
        ({"trust_region": float("inf")}, "`trust_region` must be at least 1"),
        ({"critic_penalty": -0.5}, "`critic_penalty` must be at least 0, found -0.5"),
        ({"critic_penalty": float("nan")}, "`critic_penalty` must be at least 0"),
        ({"critic_penalty": 1.0, "constraint_reference": "target"}, "`critic_penalty` has no use with"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_multiplier_is_adam_on_log_scale() -> None:
    """Against torch's own Adam on the logarithm, with bounds; a state goes on where it was."""
    multiplier = Multiplier(2.0, 0.3, 0.5, 7.0)
    logarithm = th.tensor(math.log(2.0), dtype=th.float64, requires_grad=True)
    optimizer = th.optim.Adam([logarithm], lr=0.3)
    other, violations = Multiplier(1.0, 0.3, 0.5, 7.0), [0.5, -0.1, 2.0, 2.0, 2.0, 2.0, -3.0, -3.0]
    for step, violation in enumerate(violations):
        logarithm.grad = th.tensor(-violation, dtype=th.float64)
        optimizer.step()
        with th.no_grad():
            logarithm.clamp_(math.log(0.5), math.log(7.0))
        multiplier.step(th.tensor(violation))
        assert float(multiplier) == pytest.approx(math.exp(logarithm.item()), rel=1e-6)
        assert not multiplier.value.requires_grad and float(multiplier.value) == pytest.approx(float(multiplier))
        if step == 3:
            other.load_state_dict(multiplier.state_dict() | {"something": np.zeros(2)})
        if step >= 3:
            assert float(other) == float(multiplier)
            other.step(th.tensor(violations[step + 1] if step + 1 < len(violations) else 0.0))
    unchanged = float(other)
    with pytest.warns(UserWarning, match="starts at its initial value"):
        other.load_state_dict({})
    assert float(other) == unchanged
    assert Multiplier(1.0, 0.3, 0.5, 7.0).state_dict().keys() == {"log_multiplier"}
