"""
d3rlpy 2.8's algorithms as methods of a study: pretrained and finetuned its own way.

    external: {command: [../../peers/venv-d3rlpy/bin/python, ../../peers/d3rlpy_peer.py], options: {algorithm: td3_plus_bc}}

Settings are those of d3rlpy's scripts in `reproductions/` for MuJoCo tasks, where there is one: `offline/td3_plus_bc.py`,
`offline/rebrac.py`, `offline/iql.py`, and `finetuning/awac_finetune.py` and `finetuning/cal_ql_finetune.py` without what they
have for the sparse rewards of AntMaze. Finetuning goes on with the same object in a FIFO buffer that is filled with the data,
as `finetuning/iql_finetune.py` and the finetuning tutorial do; Cal-QL mixes both in halves, as its script does, and updates
1,000 times after each 1,000 interactions.

It deviates in this: as many gradient steps offline as the study's methods have (`offline_steps`) in place of 500,000 to
1,000,000, and no cosine decay of IQL's learning rate, whose period is that of a whole run. TD3+BC and ReBRAC explore with
normal noise of 0.1 (d3rlpy has no script that finetunes them); the others draw from their stochastic policies.
"""

import os

os.environ.setdefault("MUJOCO_GL", "disable")

from typing import Any

import d3rlpy
import numpy as np
from d3rlpy.algos import AWACConfig, CalQLConfig, IQLConfig, ReBRACConfig, TD3PlusBCConfig
from d3rlpy.dataset import MDPDataset, MixedReplayBuffer, create_fifo_replay_buffer
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.optimizers import AdamFactory
from d3rlpy.preprocessing import ReturnBasedRewardScaler, StandardObservationScaler
from exchange import Exchange

REBRAC_BETAS = {
    "HalfCheetah-v5": (0.001, 0.01), "Hopper-v5": (0.01, 0.001), "Walker2d-v5": (0.05, 0.1),
}  # fmt: skip
"""Of ReBRAC's table for the medium data: weights of behavior cloning in the actor and in the critic."""
OTHER_BETAS = (0.01, 0.01)
DETERMINISTIC = ("td3_plus_bc", "rebrac")
STEPS_BETWEEN_UPDATES = 1000
BUFFER_SIZE = 1_000_000


def config(algorithm: str, env: str) -> Any:
    if algorithm == "td3_plus_bc":
        return TD3PlusBCConfig(observation_scaler=StandardObservationScaler())
    if algorithm == "rebrac":
        actor_beta, critic_beta = REBRAC_BETAS.get(env, OTHER_BETAS)
        return ReBRACConfig(
            actor_encoder_factory=VectorEncoderFactory([256, 256, 256]),
            critic_encoder_factory=VectorEncoderFactory([256, 256, 256], use_layer_norm=True),
            actor_beta=actor_beta,
            critic_beta=critic_beta,
            observation_scaler=StandardObservationScaler(),
        )
    if algorithm == "iql":
        return IQLConfig(reward_scaler=ReturnBasedRewardScaler(multiplier=1000.0))
    if algorithm == "awac":
        return AWACConfig(
            actor_encoder_factory=VectorEncoderFactory([256, 256, 256, 256]),
            actor_optim_factory=AdamFactory(weight_decay=1e-4),
        )
    if algorithm == "cal_ql":
        return CalQLConfig(critic_encoder_factory=VectorEncoderFactory([256, 256, 256, 256]))
    raise SystemExit(f"`options.algorithm` must be td3_plus_bc, rebrac, iql, awac or cal_ql, found {algorithm!r}.")


def main() -> None:
    exchange = Exchange.from_command_line()
    algorithm, offline_steps = exchange.options["algorithm"], int(exchange.options.get("offline_steps", 50_000))
    d3rlpy.seed(exchange.seed)
    rows = exchange.dataset()
    ends = np.zeros(len(rows["rewards"]), np.float32)
    ends[rows["episode_starts"][1:] - 1] = ends[-1] = 1
    terminals = rows["terminations"].astype(np.float32)
    data = MDPDataset(rows["observations"], rows["actions"], rows["rewards"], terminals, timeouts=ends * (1 - terminals))
    learner = config(algorithm, exchange.request["env"]).create()
    options = {"logger_adapter": NoopAdapterFactory(), "show_progress": False}

    def act(observation: np.ndarray) -> np.ndarray:
        return learner.predict(observation[np.newaxis].astype(np.float32))[0]

    # What is left of the last epoch is not done
    learner.fit(
        data,
        offline_steps,
        n_steps_per_epoch=offline_steps,
        callback=lambda _, epoch, step: exchange.progress("pretraining", step, offline_steps),
        **options,
    )
    offline_updates = learner.grad_step
    env = exchange.make_env()
    exchange.measure(act)
    fifo = create_fifo_replay_buffer(BUFFER_SIZE, env=env)
    if algorithm == "cal_ql":
        buffer: Any = MixedReplayBuffer(fifo, data, secondary_mix_ratio=0.5)
        # It cannot draw before the first episode has ended
        options |= {"update_interval": STEPS_BETWEEN_UPDATES, "n_updates": STEPS_BETWEEN_UPDATES}
    else:
        buffer = fifo
        for episode in data.episodes:
            buffer.append_episode(episode)
    explorer = d3rlpy.algos.NormalNoise(std=0.1) if algorithm in DETERMINISTIC else None
    learner.fit_online(
        env, buffer, explorer, n_steps=exchange.interactions, callback=lambda *_: exchange.measure_if_due(act), **options
    )
    exchange.finish(
        algorithm=f"d3rlpy {type(learner).__name__}",
        hyperparams=learner.config.serialize_to_dict() | {"offline_steps": offline_steps},
        packages=["d3rlpy", "torch", "mujoco"],
        offline_updates=offline_updates,
        online_updates=learner.grad_step - offline_updates,
    )


if __name__ == "__main__":
    main()
