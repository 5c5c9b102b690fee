"""The states of a run's callbacks: what they say themselves, what is known of SB3's, and plain attributes of others."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)

from sb3_offline_ft.checkpoints.environments import attributes_state, load_attributes, load_vec_env, value_state, vec_env_state
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.warning import warn

State = dict[str, Any]

EVALUATIONS = "evaluations_timesteps evaluations_results evaluations_length evaluations_successes".split()
KNOWN: dict[type[BaseCallback], tuple[str, ...]] = {
    EvalCallback: ("best_mean_reward", "last_mean_reward", "_is_success_buffer", *EVALUATIONS),
    EveryNTimesteps: ("last_time_trigger",),
    StopTrainingOnMaxEpisodes: ("n_episodes",),
    StopTrainingOnNoModelImprovement: ("last_best_mean_reward", "no_improvement_evals"),
}
"""What SB3's callbacks keep beside their settings."""
OF_ALL = ("n_calls", "num_timesteps")
WITHOUT_STATE = (CallbackList, ConvertCallback, ProgressBarCallback)
OF_A_RUN = frozenset("model locals globals parent callback callbacks verbose".split())
OURS = ("sb3_offline_ft.", "stable_baselines3.", "rl_zoo3.", "sb3_contrib.")


def all_callbacks(callback: Any) -> Iterator[BaseCallback]:
    """A callback and all that are called by it, outer ones first."""
    if isinstance(callback, list):
        for each in callback:
            yield from all_callbacks(each)
    elif isinstance(callback, BaseCallback):
        yield callback
        yield from all_callbacks(getattr(callback, "callbacks", []))
        if isinstance(callback, EventCallback):
            yield from all_callbacks(callback.callback)
        yield from all_callbacks(getattr(callback, "callback_on_new_best", None))


def _named(callback: Any) -> Iterator[tuple[str, BaseCallback]]:
    """Those that have a state, by a name that they have in the next process too."""
    seen: Counter[str] = Counter()
    for each in all_callbacks(callback):
        name = type(each).__name__
        if not isinstance(each, WITHOUT_STATE) and not getattr(each, "keeps_no_state", False):
            yield f"{name} {seen[name]}", each
            seen[name] += 1


def callbacks_state(callback: Any) -> tuple[State, list[str]]:
    """
    :param callback: Callbacks, as ``learn`` has them
    :return: Their states by name, and what could not be kept, in words
    """
    states, missing = {}, list[str]()
    for name, each in _named(callback):
        states[name], unknown = _state_of(each)
        missing += unknown
    return states, missing


def _state_of(callback: BaseCallback) -> tuple[State, list[str]]:
    state: State = {name: getattr(callback, name) for name in OF_ALL}
    if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
        return state | {"own": callback.state_dict()}, []
    known = [names for kind, names in KNOWN.items() if isinstance(callback, kind)]
    if isinstance(callback, EvalCallback):
        state["environments"] = vec_env_state(callback.eval_env)
    if known or type(callback).__module__.startswith(OURS):
        state["attributes"] = {name: value_state(getattr(callback, name)) for names in known for name in names}
        return state, []
    attributes, missing = attributes_state(callback, {*OF_A_RUN, *OF_ALL})
    # Texts are settings, such as paths, which may be others now
    state["attributes"] = {name: value for name, value in attributes.items() if not isinstance(value, str)}
    return state, missing


def load_callbacks(callback: Any, states: State) -> None:
    """
    Take up states, before the callbacks start; a warning names callbacks that there were not, and those that there are not.

    :param callback: Callbacks, as they are given to ``learn``
    :param states: What :func:`callbacks_state` returned
    """
    found = dict(_named(callback))
    for name, each in found.items():
        if name in states:
            _load(each, states[name])
    new, gone = (sorted(each.rpartition(" ")[0] for each in names) for names in (found.keys() - states, states.keys() - found))
    if new or gone:
        what = f"without {', '.join(gone)}" if gone else f"with {', '.join(new)} from the beginning"
        warn(f"The run goes on {what}: it had other callbacks when the checkpoint was written. Give the same ones.")


def _load(callback: Any, state: State) -> None:
    for name in OF_ALL:
        setattr(callback, name, state[name])
    if "own" in state:
        callback.load_state_dict(state["own"])
        return
    load_attributes(callback, state["attributes"])
    if isinstance(callback, EvalCallback):
        load_vec_env(callback.eval_env, state["environments"])
        _cut_evaluations(callback)


def _cut_evaluations(callback: EvalCallback) -> None:
    """Let the file of evaluations hold those that there were, of which later ones may have been written."""
    if callback.log_path is None or not callback.evaluations_timesteps:
        return
    successes = {"successes": callback.evaluations_successes} if callback.evaluations_successes else {}
    with atomic_write(f"{callback.log_path}.npz") as file:
        np.savez(
            file,
            timesteps=callback.evaluations_timesteps,
            results=callback.evaluations_results,
            ep_lengths=callback.evaluations_length,
            **successes,  # type: ignore[arg-type]  # the stubs take names for savez's own keyword
        )
