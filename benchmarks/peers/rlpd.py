"""
RLPD (Ball et al. 2023, arXiv 2302.02948) on SB3's SAC, as a method of a study: no pretraining; half of each batch offline, ten
LayerNorm critics of which two drawn by chance make the target, several updates an interaction.

    external: {command: [python, ../../peers/rlpd.py], options: {updates: 4}}
    start: scratch

Settings are those of its authors for MuJoCo tasks (`configs/rlpd_config.py`, `--start_training 5000`; learning rates 3e-4,
networks 256 x 256, target entropy -dim(A) / 2). It deviates in this: `updates` gradient steps an interaction (default 4) in
place of 20, which takes a GPU; and SB3 updates the actor with each of them, where RLPD does with the last of an interaction.

It shows how the buffer of this package serves another algorithm: nothing of SAC's `train` is written anew.
"""

import itertools
from typing import Any

import numpy as np
import torch as th
from exchange import Exchange
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from sb3_offline_ft import OfflineDataset, OfflineToOnlineReplayBuffer

N_CRITICS, N_IN_TARGET = 10, 2
LEARNING_STARTS, BUFFER_SIZE, OFFLINE_FRACTION = 5000, 1_000_000, 0.5


class StackedLinear(nn.Module):
    """As many linear layers at once."""

    def __init__(self, n: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / np.sqrt(n_in)
        self.weight = nn.Parameter(th.empty(n, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(n, 1, n_out).uniform_(-bound, bound))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return th.baddbmm(self.bias, inputs, self.weight)


class EnsembleCritic(ContinuousCritic):
    """Gives all critics for a loss, two drawn by chance for a target, and their mean for the actor, as RLPD needs each."""

    def __init__(self, observation_space: Any, action_space: Any, net_arch: list[int], **kwargs: Any) -> None:
        n = kwargs.pop("n_critics")
        super().__init__(observation_space, action_space, net_arch, n_critics=0, **kwargs)
        sizes = [kwargs["features_dim"] + action_space.shape[0], *net_arch]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [StackedLinear(n, n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
        self.ensemble, self.n = nn.Sequential(*layers, StackedLinear(n, sizes[-1], 1)), n

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        inputs = th.cat([self.extract_features(obs, self.features_extractor), actions], dim=1)
        values = self.ensemble(inputs.expand(self.n, *inputs.shape))
        if not th.is_grad_enabled():
            return tuple(values[th.randperm(self.n)[:N_IN_TARGET]])
        return (values.mean(dim=0),) if actions.requires_grad else tuple(values)


class EnsemblePolicy(SACPolicy):
    def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return EnsembleCritic(**kwargs).to(self.device)


class Measure(BaseCallback):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def act(self, observation: np.ndarray) -> np.ndarray:
        return self.model.predict(observation, deterministic=True)[0]

    def _on_training_start(self) -> None:
        self.exchange.measure(self.act)

    def _on_step(self) -> bool:
        self.exchange.measure_if_due(self.act)
        return True


def main() -> None:
    exchange = Exchange.from_command_line()
    updates, data = int(exchange.options.get("updates", 4)), exchange.dataset()
    starts = data.pop("episode_starts")
    env = exchange.make_env()
    model = SAC(
        EnsemblePolicy,
        env,
        learning_rate=3e-4,
        learning_starts=min(LEARNING_STARTS, exchange.interactions // 6),
        buffer_size=min(BUFFER_SIZE, exchange.interactions),
        gradient_steps=updates,
        target_entropy=-env.action_space.shape[0] / 2,
        replay_buffer_class=OfflineToOnlineReplayBuffer,
        replay_buffer_kwargs={"offline_fraction": OFFLINE_FRACTION, "seed": exchange.seed},
        policy_kwargs={"net_arch": [256, 256], "n_critics": N_CRITICS, "share_features_extractor": False},
        seed=exchange.seed,
    )
    model.replay_buffer.set_offline_data(OfflineDataset.from_columns(**data, episode_starts=starts))
    model.learn(exchange.interactions, callback=Measure(exchange), log_interval=None)
    exchange.finish(
        algorithm="RLPD on SB3's SAC",
        hyperparams={
            "updates_per_interaction": model.gradient_steps,
            "offline_fraction": model.replay_buffer.offline_fraction,
            "critics": model.critic.n,
            "learning_starts": model.learning_starts,
            "batch_size": model.batch_size,
            "target_entropy": float(model.target_entropy),
        },
        packages=["stable-baselines3", "torch", "mujoco"],
        offline_updates=0,
        online_updates=model._n_updates,
    )


if __name__ == "__main__":
    main()
