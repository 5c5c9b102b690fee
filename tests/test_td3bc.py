"""TD3BC: its update is the paper's, and its limits are TD3 and behavior cloning."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3
from sb3_offline_ft.datasets import scale_actions
from tests import hooks

SMALL = {"net_arch": [16, 16]}
PLAIN = {"net_arch": [16, 16], "layer_norm": False}


def layers(state: dict[str, th.Tensor], prefix: str) -> list[th.Tensor]:
    return [value.clone().double() for name, value in state.items() if name.startswith(prefix)]


def normalized(state: dict[str, th.Tensor], observations: th.Tensor) -> th.Tensor:
    prefix = "actor.features_extractor.observation_"
    return (observations - state[prefix + "mean"].double()) / state[prefix + "std"].double()


def actor(weights: list[th.Tensor], x: th.Tensor) -> th.Tensor:
    w1, b1, w2, b2, w3, b3 = weights
    return th.tanh((((x @ w1.T + b1).relu() @ w2.T + b2).relu()) @ w3.T + b3)


def critic(weights: list[th.Tensor], x: th.Tensor, actions: th.Tensor) -> th.Tensor:
    w1, b1, g1, c1, w2, b2, g2, c2, w3, b3 = weights
    x = th.cat([x, actions], 1)
    for w, b, gain, shift in ((w1, b1, g1, c1), (w2, b2, g2, c2)):
        x = x @ w.T + b
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * gain + shift
        x = x.relu()
    return x @ w3.T + b3


class Adam:
    """Kingma & Ba 2015, algorithm 1, with beta = (0.9, 0.999) and epsilon = 1e-8."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.moments: list[tuple[th.Tensor, th.Tensor]] = []
        self.t = 0

    def step(self, weights: list[th.Tensor], loss: Callable[[list[th.Tensor]], th.Tensor]) -> list[th.Tensor]:
        weights = [weight.detach().requires_grad_() for weight in weights]
        gradients = th.autograd.grad(loss(weights), weights)
        self.moments = self.moments or [(th.zeros_like(w), th.zeros_like(w)) for w in weights]
        self.t += 1
        stepped = []
        for k, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            mean, square = self.moments[k]
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            self.moments[k] = (mean, square)
            unbiased = mean / (1 - 0.9**self.t), square / (1 - 0.999**self.t)
            stepped.append((weight - self.rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).detach())
        return stepped


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
def test_one_update_is_the_papers(kernel):
    """
    Two gradient steps with policy_delay 2, in float64, from Fujimoto et al. 2018 and Fujimoto & Gu 2021.

    The first step updates the critics alone, the second critics, actor and targets.
    """
    rate, gamma, tau, alpha = 1e-3, 0.99, 0.005, 2.5
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", seed=0, policy_kwargs=SMALL, device="cpu",
                  learning_rate=rate, gamma=gamma, tau=tau, alpha=alpha, policy_delay=2,
                  kernel=kernel)  # fmt: skip
    model.load_offline_data()
    with th.no_grad():
        for parameter in model.policy.parameters():
            # Targets that differ from the networks, so that a mix-up shows
            parameter.add_(0.05 * th.randn_like(parameter))
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    batches = hooks.observe_batches(model)
    generator = hooks.noise_generator(model)
    model.pretrain(2)

    names = ("actor.mu", "actor_target.mu", "critic.qf0", "critic.qf1", "critic_target.qf0", "critic_target.qf1")
    nets = {name: layers(before, name) for name in names}
    optimizers = {name: Adam(rate) for name in ("critic.qf0", "critic.qf1", "actor.mu")}
    assert len(batches) == 2
    for batch in batches:
        noise = th.empty_like(batch.actions).normal_(0, 0.2, generator=generator).clamp(-0.5, 0.5).double()
        s, s2 = (normalized(before, x.double()) for x in (batch.observations, batch.next_observations))
        a, r, d = batch.actions.double(), batch.rewards.double(), batch.dones.double()
        a2 = (actor(nets["actor_target.mu"], s2) + noise).clamp(-1, 1)
        q2 = [critic(nets[name], s2, a2) for name in ("critic_target.qf0", "critic_target.qf1")]
        y = r + gamma * (1 - d) * th.minimum(*q2)
        for name in ("critic.qf0", "critic.qf1"):
            nets[name] = optimizers[name].step(nets[name], lambda w: ((critic(w, s, a) - y) ** 2).mean())  # noqa: B023
    q1 = nets["critic.qf0"]

    def actor_loss(weights):
        pi = actor(weights, s)
        q = critic(q1, s, pi)
        return -(alpha / q.detach().abs().mean() * q).mean() + ((pi - a) ** 2).mean()

    nets["actor.mu"] = optimizers["actor.mu"].step(nets["actor.mu"], actor_loss)
    for name in ("actor.mu", "critic.qf0", "critic.qf1"):
        target = name.replace(".", "_target.", 1)
        nets[target] = [(1 - tau) * old + tau * new for old, new in zip(nets[target], nets[name], strict=True)]

    after = model.policy.state_dict()
    for name, values in nets.items():
        for value, found in zip(values, layers(after, name), strict=True):
            assert found == pytest.approx(value, abs=1e-6, rel=1e-6), name
        moved = max(float((b - f).abs().max()) for b, f in zip(layers(before, name), layers(after, name), strict=True))
        assert moved > 1e-6, name


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(TD3BC, {"alpha": float("inf")}), (OfflineTD3, {}), (TD3C, {"alpha": float("inf")})],
    ids=["TD3BC", "OfflineTD3", "TD3C"],
)
def test_infinite_alpha_is_td3_to_the_bit(algorithm, settings, tmp_path):
    """Same seed, same data, 20 gradient steps: same parameters, offline."""
    common = {"seed": 3, "device": "cpu", "learning_rate": 1e-3, "gamma": 0.98}
    ours = algorithm("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", normalize_observations=False,
                     policy_kwargs=PLAIN, kernel="autograd", **common, **settings)  # fmt: skip
    ours.load_offline_data()
    theirs = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}, **common)
    theirs.set_logger(configure(str(tmp_path), []))
    data = ours.offline_dataset
    buffer = ReplayBuffer(len(data), theirs.observation_space, theirs.action_space, "cpu")
    buffer.observations[:, 0], buffer.next_observations[:, 0] = data.observations, data.next_observations
    buffer.actions[:, 0], buffer.rewards[:, 0] = scale_actions(data.actions, ours.action_space), data.rewards
    buffer.dones[:, 0], buffer.timeouts[:, 0], buffer.full = data.terminations | data.truncations, data.truncations, True
    theirs.replay_buffer = buffer

    generator = np.random.default_rng()
    generator.bit_generator.state = json.loads(ours.replay_buffer.get_sampler_state())
    chosen = iter(generator.integers(0, len(data), size=(20, 256)))
    buffer.sample = lambda batch_size, env=None: buffer._get_samples(next(chosen))
    theirs_noise = th.random.get_rng_state()
    theirs.train(20, 256)

    ours.load_extra_state(ours.extra_state() | {"noise_generator": theirs_noise.numpy()})
    ours.pretrain(20)
    for name, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(name)), name
    assert hooks.n_updates(ours) == hooks.n_updates(theirs) == 20


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C])
def test_without_dataset_and_weights_it_is_td3_online_to_the_bit(algorithm):
    common = {"seed": 1, "device": "cpu", "learning_rate": 1e-3, "learning_starts": 50}
    theirs = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}, **common).learn(300)
    ours = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=PLAIN, kernel="autograd", **common)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        ours.learn(300)
    for name, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(name)), name


def test_zero_alpha_is_behavior_cloning():
    """The policy does not depend on the critics, and the distance to the data falls to what cloning alone reaches."""

    def run(**settings):
        model = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", seed=0, policy_kwargs=SMALL, device="cpu",
                      learning_rate=1e-3, **settings)  # fmt: skip
        return model.pretrain(400)

    model = run(alpha=0.0)
    cloner = run(alpha=0.0, gamma=0.5, target_policy_noise=0.0)
    for a, b in zip(model.actor.parameters(), cloner.actor.parameters(), strict=True):
        assert th.equal(a, b)
    assert any(not th.equal(a, b) for a, b in zip(model.critic.parameters(), cloner.critic.parameters(), strict=True))

    # Independent cloning of the same rows from the same weights by least squares
    start = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", seed=0, policy_kwargs=SMALL, device="cpu")
    start.load_offline_data()
    optimizer = th.optim.Adam(start.actor.parameters(), lr=1e-3)
    for step in range(400):
        batch = start.replay_buffer.sample(256)
        if step % 2 == 1:
            optimizer.zero_grad()
            ((start.actor(batch.observations) - batch.actions) ** 2).mean().backward()
            optimizer.step()
    for a, b in zip(model.actor.parameters(), start.actor.parameters(), strict=True):
        assert th.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("online_bc", "weights"), [("keep", [1, 1]), ("drop", [0, 0]), (0.5, [0.5, 0.5]), ("lin_1.0_0.2", [1, 0.2])]
)
def test_online_weight_of_behavior_cloning(online_bc, weights):
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", online_bc=online_bc, policy_kwargs=SMALL,
                  alpha=0.0, seed=0, device="cpu")  # fmt: skip
    model.load_offline_data()
    batch = model.replay_buffer.sample(64)
    actions = model.actor(batch.observations)
    q_values = model.critic.q1_forward(batch.observations, actions)
    distance = ((actions - batch.actions) ** 2).mean().item()
    with model.life_cycle.pretraining():
        assert hooks.objective(model, batch, actions, q_values).loss(actions, q_values).item() == pytest.approx(distance)
    model.life_cycle.is_finetuning = True
    for progress_remaining, weight in zip((1.0, 0.0), weights, strict=True):
        hooks.set_progress_remaining(model, progress_remaining)
        loss = hooks.objective(model, batch, actions, q_values).loss(actions, q_values)
        assert loss.item() == pytest.approx(weight * distance)


def test_numbers_of_numpy_are_numbers():
    model = TD3C("MlpPolicy", "Pendulum-v1", alpha=np.float32(1.5), epsilon=np.float32(0.25), offline_fraction=np.int64(1))
    assert model.alpha == 1.5 and model.current_epsilon == 0.25 and model.replay_buffer.offline_fraction == 1


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), "2.5", True])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="`alpha` must be a number of at least 0"):
        TD3BC("MlpPolicy", "Pendulum-v1", alpha=alpha)


@pytest.mark.parametrize("online_bc", [-1.0, "off", "lin_x", "geo_1_0", True, None])
def test_bad_online_bc_is_refused(online_bc):
    if online_bc == "off":
        with pytest.raises(ValueError, match="expected a number, 'keep', 'drop', 'adaptive', 'lin_A'"):
            TD3BC("MlpPolicy", "Pendulum-v1", online_bc=online_bc)
    with pytest.raises((ValueError, TypeError), match="`online_bc`"):
        TD3BC("MlpPolicy", "Pendulum-v1", online_bc=online_bc)
