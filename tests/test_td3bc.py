"""TD3BC: its update is the paper's, and its limits are TD3 and behavior cloning."""

import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3

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


def adam_step(weights: list[th.Tensor], loss: th.Tensor, rate: float) -> list[th.Tensor]:
    """The first step of Adam (Kingma & Ba 2015, algorithm 1), beta = (0.9, 0.999), epsilon = 1e-8."""
    gradients = th.autograd.grad(loss, weights)
    stepped = []
    for weight, gradient in zip(weights, gradients, strict=True):
        mean, square = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
        stepped.append(weight.detach() - rate * mean / (square.sqrt() + 1e-8))
    return stepped


def test_one_update_is_the_papers(monkeypatch):
    """Two gradient steps with policy_delay 2, in float64, written from Fujimoto et al. 2018 and Fujimoto & Gu 2021."""
    rate, gamma, tau, alpha = 1e-3, 0.99, 0.005, 2.5
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", seed=0, policy_kwargs=SMALL, device="cpu",
                  learning_rate=rate, gamma=gamma, tau=tau, alpha=alpha, policy_delay=1)  # fmt: skip
    model.load_offline_data()
    with th.no_grad():
        for parameter in model.policy.parameters():
            # Targets that differ from the networks, so that a mix-up shows
            parameter.add_(0.05 * th.randn_like(parameter))
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    batches = []
    sample = model._sample_batch

    def remember(batch_size):
        batches.append(sample(batch_size))
        return batches[-1]

    monkeypatch.setattr(model, "_sample_batch", remember)
    generator = th.Generator().set_state(model._noise_generator.get_state())
    model.pretrain(1)

    (batch,) = batches
    noise = th.empty_like(batch.actions).normal_(0, 0.2, generator=generator).clamp(-0.5, 0.5).double()
    s, s2 = (normalized(before, x.double()) for x in (batch.observations, batch.next_observations))
    a, r, d = batch.actions.double(), batch.rewards.double(), batch.dones.double()
    nets = {name: layers(before, name) for name in
            ("actor.mu", "actor_target.mu", "critic.qf0", "critic.qf1", "critic_target.qf0", "critic_target.qf1")}  # fmt: skip
    a2 = (actor(nets["actor_target.mu"], s2) + noise).clamp(-1, 1)
    y = r + gamma * (1 - d) * th.minimum(critic(nets["critic_target.qf0"], s2, a2), critic(nets["critic_target.qf1"], s2, a2))
    expected = {}
    for name in ("critic.qf0", "critic.qf1"):
        weights = [weight.requires_grad_() for weight in nets[name]]
        expected[name] = adam_step(weights, ((critic(weights, s, a) - y) ** 2).mean(), rate)
    weights = [weight.requires_grad_() for weight in nets["actor.mu"]]
    pi = actor(weights, s)
    q = critic(expected["critic.qf0"], s, pi)
    lmbda = alpha / q.detach().abs().mean()
    expected["actor.mu"] = adam_step(weights, -(lmbda * q).mean() + ((pi - a) ** 2).mean(), rate)
    for name in ("actor.mu", "critic.qf0", "critic.qf1"):
        target = name.replace(".", "_target.", 1)
        old = nets[target]
        expected[target] = [(1 - tau) * o + tau * n for o, n in zip(old, expected[name], strict=True)]

    after = model.policy.state_dict()
    for name, values in expected.items():
        for value, found in zip(values, layers(after, name), strict=True):
            assert found == pytest.approx(value.detach(), abs=1e-6, rel=1e-6), name
        moved = max(float((b - f).abs().max()) for b, f in zip(layers(before, name), layers(after, name), strict=True))
        assert moved > 1e-5, name


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(TD3BC, {"alpha": float("inf")}), (OfflineTD3, {}), (TD3C, {"alpha": float("inf")})],
    ids=["TD3BC", "OfflineTD3", "TD3C"],
)
def test_infinite_alpha_is_td3_to_the_bit(algorithm, settings, tmp_path):
    """Same seed, same data, 20 gradient steps: same parameters, offline."""
    common = {"seed": 3, "device": "cpu", "learning_rate": 1e-3, "gamma": 0.98}
    ours = algorithm("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", normalize_observations=False,
                     policy_kwargs=PLAIN, **common, **settings)  # fmt: skip
    ours.load_offline_data()
    theirs = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}, **common)
    theirs.set_logger(configure(str(tmp_path), []))
    data = ours.offline_dataset
    buffer = ReplayBuffer(len(data), theirs.observation_space, theirs.action_space, "cpu")
    buffer.observations[:, 0], buffer.next_observations[:, 0] = data.observations, data.next_observations
    buffer.actions[:, 0], buffer.rewards[:, 0] = ours.replay_buffer._offline_actions, data.rewards
    buffer.dones[:, 0], buffer.timeouts[:, 0], buffer.full = data.terminations | data.truncations, data.truncations, True
    theirs.replay_buffer = buffer

    rows = np.random.default_rng(0).integers(0, len(data), size=(20, 256))
    chosen = iter(rows)
    buffer.sample = lambda batch_size, env=None: buffer._get_samples(next(chosen))
    theirs_noise = th.random.get_rng_state()
    theirs.train(20, 256)

    ours_chosen = iter(rows)

    class Generator:
        def integers(self, low, high, size):
            return next(ours_chosen)

    ours.replay_buffer._offline_generator = Generator()
    ours._noise_generator.set_state(theirs_noise)
    ours.pretrain(20)
    for (name, a), b in zip(ours.policy.state_dict().items(), ours.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), name
    for name, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(name)), name
    assert ours._n_updates == theirs._n_updates == 20


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C])
def test_without_dataset_and_weights_it_is_td3_online_to_the_bit(algorithm):
    common = {"seed": 1, "device": "cpu", "learning_rate": 1e-3, "learning_starts": 50}
    theirs = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}, **common).learn(300)
    ours = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=PLAIN, **common)
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
    model._pretraining = True
    assert model._actor_loss(batch, actions, q_values).item() == pytest.approx(distance)
    model._pretraining, model._finetuning = False, True
    for progress_remaining, weight in zip((1.0, 0.0), weights, strict=True):
        model._current_progress_remaining = progress_remaining
        assert model._actor_loss(batch, actions, q_values).item() == pytest.approx(weight * distance)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), "2.5", True])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="`alpha` must be a number of at least 0"):
        TD3BC("MlpPolicy", "Pendulum-v1", alpha=alpha)


@pytest.mark.parametrize("online_bc", [-1.0, "off", "lin_x", "geo_1_0", True, None])
def test_bad_online_bc_is_refused(online_bc):
    with pytest.raises((ValueError, TypeError), match="`online_bc`"):
        TD3BC("MlpPolicy", "Pendulum-v1", online_bc=online_bc)
