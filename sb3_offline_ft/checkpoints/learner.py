"""What a learner in the middle of a run has beyond a :class:`LearnerSnapshot`: where it is, and what it saw last."""

from collections import deque
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.checkpoints.environments import attributes_state, load_attributes, value_state
from sb3_offline_ft.checkpoints.ring import columns_of
from sb3_offline_ft.collapse.snapshot import LearnerSnapshot

State = dict[str, Any]

COUNTERS = (
    "num_timesteps _episode_num _total_timesteps _current_progress_remaining _n_updates learning_starts _last_obs "
    "_last_original_obs _last_episode_starts"
).split()
EPISODES = ("ep_info_buffer", "ep_success_buffer")
NOT_OF_A_BUFFER = frozenset("buffer_size n_envs pos full device obs_shape action_dim n_steps gamma".split())


def model_state(model: OffPolicyAlgorithm) -> State:
    """The state of a learner, without the rows of its replay buffer and without what it acts in."""
    return {
        "snapshot": LearnerSnapshot.take(model).state_dict(),
        "counters": {name: value_state(getattr(model, name)) for name in COUNTERS},
        "episodes": {name: value_state(getattr(model, name)) for name in EPISODES},
        "exploration": _exploration(model),
        "buffer": _buffer_state(model.replay_buffer),
        "own": model.run_state() if hasattr(model, "run_state") else {},
    }


def _exploration(model: Any) -> State:
    """The noise of gSDE, which SB3 draws before a rollout."""
    distribution = getattr(getattr(model.policy, "actor", None), "action_dist", None) if model.use_sde else None
    names = ("exploration_mat", "exploration_matrices")
    return {name: getattr(distribution, name).detach().clone() for name in names if hasattr(distribution, name)}


def _buffer_state(buffer: Any) -> State:
    if hasattr(buffer, "run_state"):
        return dict(buffer.run_state())
    rows = {name.partition("/")[0] for name in columns_of(buffer)}
    state, _ = attributes_state(buffer, {*rows, *NOT_OF_A_BUFFER, "observation_space", "action_space"})
    return {name: value for name, value in state.items() if not isinstance(value, str)}


def load_settings(model: OffPolicyAlgorithm, state: State) -> None:
    """Take up what decides about the way through ``learn``, before it begins."""
    for name, value in state["counters"].items():
        setattr(model, name, value_state(value))
    for name, saved in state["episodes"].items():
        kept = None if saved is None else deque(saved["values"], saved["maxlen"])
        setattr(model, name, kept)
    if hasattr(model, "load_run_state"):
        model.load_run_state(state["own"])


def load_model(model: OffPolicyAlgorithm, state: State) -> None:
    """Take up the whole state of :func:`model_state`, the random generators last."""
    buffer: Any = model.replay_buffer
    if hasattr(buffer, "load_run_state"):
        buffer.load_run_state(state["buffer"])
    else:
        load_attributes(buffer, state["buffer"])
    if state["exploration"]:
        distribution = model.policy.actor.action_dist  # type: ignore[union-attr]
        for name, value in state["exploration"].items():
            setattr(distribution, name, value.to(model.device))
    LearnerSnapshot.from_state_dict(state["snapshot"], model.device).restore(model)
    # What a snapshot's restoring understands as the past of another policy is this one's present
    load_settings(model, state)
