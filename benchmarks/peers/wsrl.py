"""
WSRL (Zhou et al. 2025, arXiv 2412.07762) on SB3's SAC, as a method of a study: pretrained offline, 5,000 interactions in which
the pretrained policy acts and nothing is learned, then SAC with several updates an interaction; no offline data is kept.

    external: {command: [python, ../../peers/wsrl.py], options: {offline_steps: 50000, updates: 4}}

As its authors' code has it: ten LayerNorm critics of which two drawn by chance make the target, networks 256 x 256, learning
rates 3e-4 (critics) and 1e-4 (actor), 4 updates an interaction. It deviates in this: the policy is pretrained by SAC with
behavior cloning weighted as in TD3+BC, in place of Cal-QL, which evaluates twenty actions of each row and critic; the actor
has no LayerNorm, is updated as often as the critics, and the target has SAC's entropy term online.

It shows how the buffer of this package serves another algorithm: offline batches first, online ones later.
"""

import numpy as np
import torch as th
from exchange import Exchange
from rlpd import BUFFER_SIZE, N_CRITICS, EnsemblePolicy, Measure
from stable_baselines3 import SAC
from stable_baselines3.common.utils import configure_logger, polyak_update
from torch.nn import functional as F

from sb3_offline_ft import OfflineDataset, OfflineToOnlineReplayBuffer

WARMUP, ACTOR_LEARNING_RATE, ALPHA = 5000, 1e-4, 2.5


class WarmStartedSAC(SAC):
    """Learns nothing in the warm-up, in which its policy acts."""

    warmup = WARMUP

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        if self.num_timesteps > self.warmup:
            super().train(gradient_steps, batch_size)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        for group in self.actor.optimizer.param_groups:
            group["lr"] = ACTOR_LEARNING_RATE


def step(optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def pretrain(model: WarmStartedSAC, steps: int, exchange: Exchange) -> int:
    """SAC with behavior cloning, on offline batches; gives the updates of the critics."""
    buffer, actor, critic, target = model.replay_buffer, model.actor, model.critic, model.critic_target
    done = 0
    for done in range(1, steps + 1):
        model._update_learning_rate([actor.optimizer, critic.optimizer])
        batch = buffer.sample(model.batch_size, offline_fraction=1.0)
        with th.no_grad():
            next_actions, _ = actor.action_log_prob(batch.next_observations)
            next_values = th.cat(target(batch.next_observations, next_actions), dim=1).min(dim=1, keepdim=True).values
            returns = batch.rewards + (1 - batch.dones) * model.gamma * next_values
        values = critic(batch.observations, batch.actions)
        step(critic.optimizer, 0.5 * sum(F.mse_loss(value, returns) for value in values))
        actions, log_prob = actor.action_log_prob(batch.observations)
        (value,) = critic(batch.observations, actions)
        entropy = model.log_ent_coef.exp().detach() * log_prob.mean()
        cloning = F.mse_loss(actions, batch.actions)
        step(actor.optimizer, entropy - ALPHA * value.mean() / value.detach().abs().mean() + cloning)
        step(model.ent_coef_optimizer, -(model.log_ent_coef * (log_prob + model.target_entropy).detach()).mean())
        polyak_update(critic.parameters(), target.parameters(), model.tau)
        exchange.progress("pretraining", done, steps)
    return done


def main() -> None:
    exchange = Exchange.from_command_line()
    options, data = exchange.options, exchange.dataset()
    starts = data.pop("episode_starts")
    env = exchange.make_env()
    model = WarmStartedSAC(
        EnsemblePolicy,
        env,
        learning_rate=3e-4,
        learning_starts=0,
        buffer_size=min(BUFFER_SIZE, exchange.interactions),
        gradient_steps=int(options.get("updates", 4)),
        target_entropy=-env.action_space.shape[0] / 2,
        replay_buffer_class=OfflineToOnlineReplayBuffer,
        replay_buffer_kwargs={"offline_fraction": 0.0, "seed": exchange.seed},
        policy_kwargs={"net_arch": [256, 256], "n_critics": N_CRITICS, "share_features_extractor": False},
        seed=exchange.seed,
    )
    model.warmup = min(WARMUP, exchange.interactions // 6)
    model.set_logger(configure_logger(verbose=0))
    model.replay_buffer.set_offline_data(OfflineDataset.from_columns(**data, episode_starts=starts))
    offline_updates = pretrain(model, int(options.get("offline_steps", 50_000)), exchange)
    model.learn(exchange.interactions, callback=Measure(exchange), log_interval=None)
    exchange.finish(
        algorithm="WSRL on SB3's SAC",
        hyperparams={
            "updates_per_interaction": model.gradient_steps,
            "offline_fraction": model.replay_buffer.offline_fraction,
            "critics": model.critic.n,
            "warmup": model.warmup,
            "batch_size": model.batch_size,
            "target_entropy": float(np.asarray(model.target_entropy)),
            "learning_rates": [model.critic.optimizer.param_groups[0]["lr"], model.actor.optimizer.param_groups[0]["lr"]],
        },
        packages=["stable-baselines3", "torch", "mujoco"],
        offline_updates=offline_updates,
        online_updates=model._n_updates,
        frozen_until=model.warmup,
    )


if __name__ == "__main__":
    main()
