"""
What each technique gives: offline updates of TD3BC on Hopper's shapes, float32, one thread.

    python benchmarks/speed/ablation.py              # about five minutes; writes results/<cpu>-ablation.json
    python benchmarks/speed/ablation.py --compile    # with torch.compile too, which needs a C++ compiler

Each variant adds one technique to the one before. They take turns in one process, in random order in each round; a time is the
processor time of the process per update, a ratio the median over rounds against the reference in the same round.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from candidates import BATCH_SIZE, HIDDEN, POLICY_DELAY
from machine import manifest, slug
from report import RESULTS, fill_readme
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import TD3
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F
from worker import columns, fill_vectors, silence, use_cores, vector_env

from sb3_offline_ft import TD3BC, OfflineDataset
from sb3_offline_ft.offline_td3 import updates
from sb3_offline_ft.policies.policies import MlpPolicy
from sb3_offline_ft.update import FastKernel

SHAPE = "hopper"
BATCHES_AT_ONCE = updates.BATCHES_AT_ONCE


class OwnOptimizerKernel(FastKernel):
    """Written-out gradients alone: torch's optimizers and SB3's Polyak averaging, one parameter after the other."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        for adam in (self.actor_adam, self.critic_adam):
            adam.step = adam.optimizer.step  # type: ignore[method-assign]

    def update_targets(self, tau: float, update_actor: bool) -> None:
        """See the base class."""
        policy = self.policy
        polyak_update(policy.critic.parameters(), policy.critic_target.parameters(), tau)
        if update_actor:
            polyak_update(policy.actor.parameters(), policy.actor_target.parameters(), tau)


class OwnPolyakKernel(OwnOptimizerKernel):
    """The same with Adam in one operation."""

    def __init__(self, policy: Any) -> None:
        FastKernel.__init__(self, policy)


@dataclass
class Variant:
    """
    Something to measure.

    :param label: What it adds
    :param run: Do a number of updates
    """

    label: str
    run: Callable[[int], object]


def model(
    layer_norm: bool = False, batches: int = BATCHES_AT_ONCE, kernel_class: type | None = None, **settings: Any
) -> Callable[[int], object]:
    """
    :param layer_norm: Whether the critics have LayerNorm
    :param batches: Batches drawn at once
    :param kernel_class: Class of the kernel, None for the one that the model chooses
    :param settings: Arguments of TD3BC
    :return: A function that does a number of updates
    """
    observations, actions, rewards, next_observations, terminations = columns(SHAPE)
    environment = vector_env(SHAPE)
    timeouts = np.arange(1, len(rewards) + 1) % 1000 == 0
    data = OfflineDataset.from_columns(
        observations, actions, rewards, next_observations, terminations, timeouts, action_space=environment.action_space
    )
    policy_kwargs = {"net_arch": [HIDDEN, HIDDEN], "layer_norm": layer_norm}
    made = TD3BC(
        "MlpPolicy", environment, buffer_size=1000, policy_kwargs=policy_kwargs, seed=0, device="cpu", dataset=data, **settings
    )
    made.load_offline_data()
    if kernel_class is not None:
        made.updater.kernel = kernel_class(made.policy)

    def run(steps: int) -> None:
        updates.BATCHES_AT_ONCE = batches
        made.pretrain(steps, log_interval=10**9)
        assert kernel_class is None or type(made.updater.kernel) is kernel_class

    return run


def compiled(layer_norm: bool) -> Callable[[int], object]:
    """
    The same updates by autograd, with losses and gradients compiled by Inductor and torch's fused Adam.

    :param layer_norm: Whether the critics have LayerNorm
    :return: A function that does a number of updates
    """
    generator = th.Generator().manual_seed(0)
    environment = vector_env(SHAPE)
    policy = MlpPolicy(environment.observation_space, environment.action_space, lambda _: 3e-4, layer_norm=layer_norm)
    s, a, r, s2, d = (th.from_numpy(column).float().view(len(column), -1) for column in columns(SHAPE))
    actor, actor_target = list(policy.actor.parameters()), list(policy.actor_target.parameters())
    critics, critics_target = list(policy.critic.parameters()), list(policy.critic_target.parameters())
    critic_adam, actor_adam = (th.optim.Adam(parameters, lr=3e-4, fused=True) for parameters in (critics, actor))

    def network(parameters: list[th.Tensor], x: th.Tensor, normalized: bool) -> th.Tensor:
        *hidden, weight, bias = parameters
        size = 4 if normalized else 2
        for start in range(0, len(hidden), size):
            x = F.linear(x, hidden[start], hidden[start + 1])
            x = F.relu(F.layer_norm(x, (HIDDEN,), hidden[start + 2], hidden[start + 3]) if normalized else x)
        return F.linear(x, weight, bias)

    def q_values(parameters: list[th.Tensor], s: th.Tensor, a: th.Tensor) -> list[th.Tensor]:
        middle, x = len(parameters) // 2, th.cat([s, a], dim=1)
        return [network(own, x, layer_norm) for own in (parameters[:middle], parameters[middle:])]

    def critic_loss(critics: list[th.Tensor], targets: th.Tensor, s: th.Tensor, a: th.Tensor) -> th.Tensor:
        first, second = q_values(critics, s, a)
        return F.mse_loss(first, targets) + F.mse_loss(second, targets)

    def critic_gradients(
        s: th.Tensor, a: th.Tensor, r: th.Tensor, s2: th.Tensor, d: th.Tensor, noise: th.Tensor
    ) -> list[th.Tensor]:
        with th.no_grad():
            a2 = (th.tanh(network(actor_target, s2, False)) + noise).clamp(-1, 1)
            targets = r + (1 - d) * 0.99 * th.minimum(*q_values(critics_target, s2, a2))
        return th.func.grad(critic_loss)(critics, targets, s, a)

    def actor_loss(actor: list[th.Tensor], s: th.Tensor, a: th.Tensor) -> th.Tensor:
        pi = th.tanh(network(actor, s, False))
        q = network(critics[: len(critics) // 2], th.cat([s, pi], dim=1), layer_norm)
        return -2.5 / q.detach().abs().mean() * q.mean() + F.mse_loss(pi, a)

    critic_step, actor_step = th.compile(critic_gradients), th.compile(th.func.grad(actor_loss))

    def apply(adam: th.optim.Adam, parameters: list[th.Tensor], gradients: list[th.Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()

    @th.no_grad()
    def run(steps: int) -> None:
        for step in range(steps):
            rows = th.randint(len(r), (BATCH_SIZE,), generator=generator)
            noise = th.randn(BATCH_SIZE, a.shape[1], generator=generator).mul_(0.2).clamp_(-0.5, 0.5)
            apply(critic_adam, critics, critic_step(s[rows], a[rows], r[rows], s2[rows], d[rows], noise))
            if step % POLICY_DELAY == 1:
                apply(actor_adam, actor, actor_step(actor, s[rows], a[rows]))
                th._foreach_lerp_(critics_target, critics, 0.005)
                th._foreach_lerp_(actor_target, actor, 0.005)

    return run


def sb3() -> Callable[[int], object]:
    """
    :return: SB3's own updates
    """
    made = TD3(
        "MlpPolicy", vector_env(SHAPE), buffer_size=100_000, policy_kwargs={"net_arch": [HIDDEN, HIDDEN]}, seed=0, device="cpu"
    )
    silence(made)
    fill_vectors(made.replay_buffer, SHAPE)
    return lambda steps: made.train(steps, BATCH_SIZE)


def variants(with_compile: bool) -> list[Variant]:
    """
    :param with_compile: Whether torch.compile is among them
    :return: All variants, the reference first
    """
    inductor = [("torch.compile of autograd", False), ("torch.compile of autograd, LayerNorm critics", True)]
    return [
        Variant("SB3's TD3.train", sb3()),
        Variant("our loop by autograd, one batch at a time", model(batches=1, kernel="autograd")),
        Variant("+ all batches of a call drawn at once", model(kernel="autograd")),
        Variant("+ gradients written out on memory that is kept", model(kernel_class=OwnOptimizerKernel)),
        Variant("+ Adam in one operation", model(kernel_class=OwnPolyakKernel)),
        Variant("+ Polyak averaging in one operation: the default kernel", model()),
        Variant("the default kernel, one batch at a time", model(batches=1)),
        Variant("with bfloat16 products", model(update_precision="bfloat16")),
        Variant("by autograd, LayerNorm critics", model(layer_norm=True, kernel="autograd")),
        Variant("the default kernel, LayerNorm critics", model(layer_norm=True)),
        Variant("LayerNorm critics with bfloat16 products", model(layer_norm=True, update_precision="bfloat16")),
        *([Variant(label, compiled(layer_norm)) for label, layer_norm in inductor] if with_compile else []),
    ]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=100, help="updates in a turn")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    arguments = parser.parse_args()
    use_cores(1)
    th.set_num_threads(1)
    started = manifest()
    chosen, order = variants(arguments.compile), np.random.default_rng(0)
    first_calls = []
    for variant in chosen:
        start = time.perf_counter()
        variant.run(20)
        first_calls.append(time.perf_counter() - start)
    seconds = np.zeros((arguments.rounds, len(chosen)))
    for turn in track(range(arguments.rounds), "rounds"):
        for index in order.permutation(len(chosen)):
            start = time.process_time()
            chosen[index].run(arguments.steps)
            seconds[turn, index] = time.process_time() - start
    table = Table("variant", "ms per update", "times SB3's speed")
    rows = []
    for index, variant in enumerate(chosen):
        per_update = 1e3 * seconds[:, index] / arguments.steps
        ratios = seconds[:, 0] / seconds[:, index]
        low, middle, high = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
        rows.append(
            {
                "label": variant.label,
                "ms": float(np.median(per_update)),
                "ratio": middle,
                "quartiles": [low, high],
                "first_call": first_calls[index],
            }
        )
        table.add_row(variant.label, f"{np.median(per_update):.2f}", f"{middle:.2f} ({low:.2f}-{high:.2f})")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug()}-ablation.json"
    temporary = path.with_suffix(".tmp")
    facts = {"rounds": arguments.rounds, "steps": arguments.steps, "policy_delay": POLICY_DELAY}
    temporary.write_text(json.dumps({"manifest": started, **facts, "variants": rows}, indent=1) + "\n")
    temporary.replace(path)
    fill_readme()


if __name__ == "__main__":
    main()
