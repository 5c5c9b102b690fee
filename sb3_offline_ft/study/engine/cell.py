"""One cell of a study: a method on a dataset with a seed."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.collapse import CollapseGuard
from sb3_offline_ft.collapse.events import Event
from sb3_offline_ft.common.live import live_arguments, replay_facts, weights_digest
from sb3_offline_ft.common.machine import machine_facts
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.deployment import ChampionChallenger
from sb3_offline_ft.evaluation.served import EXPLORE, TRIAL
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.cache import PretrainedCache
from sb3_offline_ft.study.design.learners import learner_from_scratch, pretrained_learner, pretraining_recipe
from sb3_offline_ft.study.engine.external import run_external
from sb3_offline_ft.study.engine.folder import KINDS, CellResult
from sb3_offline_ft.study.engine.measure import (
    FINETUNING,
    PRETRAINING,
    EvaluationTimes,
    LastInteraction,
    Measure,
    OnEvaluation,
    OnStep,
    Progress,
)

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.protocol import Cell, Protocol

MEASURED_STREAM = 10


def run_cell(
    protocol: "Protocol",
    cell: "Cell",
    *,
    pretrained_folder: Path,
    on_step: OnStep | None = None,
    on_evaluation: OnEvaluation | None = None,
    device: str = "cpu",
) -> CellResult:
    """
    Do what a cell of a study asks for. The same cell gives the same result, to the bit, on the same kind of machine.

    :param protocol: The study's protocol
    :param cell: The cell
    :param pretrained_folder: Where pretrained learners are kept
    :param on_step: Is told the phase, how many steps of it are done, and of how many, from time to time
    :param on_evaluation: Is told the interactions and the returns of each measured evaluation
    :param device: Where to compute
    :return: The result
    """
    if cell.method.external is not None:
        return _run_command(protocol, cell, on_step, on_evaluation)
    # Before anything is imported late or edited meanwhile
    started, clock, machine = datetime.now(UTC), time.monotonic(), machine_facts()
    plan, tell = protocol.evaluation, on_step or (lambda phase, done, total: None)
    with _environments(protocol.env) as make_env, warnings.catch_warnings():
        # From scratch on purpose
        warnings.filterwarnings("ignore", ".* has neither a dataset nor pretrained weights")
        # The learner acts and is evaluated in the episodes that `rl_zoo3.train --seed` gives it; what is measured is in others
        env, measured = make_env(cell.seed), make_env(derive_seed(cell.seed, MEASURED_STREAM))
        measure = Measure(measured, plan.every, plan.episodes, on_evaluation, protocol.interactions)
        model, pretrained = _start(protocol, cell, env, pretrained_folder, tell, device)
        arguments, prepared = live_arguments(model), time.monotonic()
        guard, champion, evaluation = _run(protocol, cell, model, measure, make_env, tell)
        finished = time.monotonic()
        manifest = {
            **_asked_for(protocol, cell),
            "pretrained": pretrained,
            **_become(model, arguments, guard, champion, evaluation),
            "frozen_until": protocol.interactions if cell.method.frozen else _warmed_up_until(model),
            "seconds": {"preparation": round(prepared - clock, 1), "finetuning": round(finished - prepared, 1)},
            "started": started.isoformat(timespec="seconds"),
            **machine,
        }
        ends, returns = _training_episodes(env, protocol.interactions)
        return CellResult(
            np.array(measure.timesteps, dtype=np.int64),
            np.array(measure.returns, dtype=np.float64),
            np.array(measure.lengths, dtype=np.int64),
            ends,
            returns,
            [] if guard is None else guard.events,
            manifest,
            **_own_evaluations(evaluation),
            **({} if champion is None else deployment(champion.events, ends)),
        )


def _run_command(protocol: "Protocol", cell: "Cell", on_step: OnStep | None, on_evaluation: OnEvaluation | None) -> CellResult:
    """As :func:`run_cell`, of a method that is a command."""
    started, clock, machine = datetime.now(UTC), time.monotonic(), machine_facts()
    assert cell.dataset is not None
    request = {
        "env": protocol.env,
        "seed": cell.seed,
        "interactions": protocol.interactions,
        "evaluation": {**asdict(protocol.evaluation), "seed": derive_seed(cell.seed, MEASURED_STREAM)},
    }
    tell = on_step or (lambda phase, done, total: None)
    arrays, facts = run_external(cell.method, request, protocol.dataset(cell.dataset), protocol.folder, tell, on_evaluation)
    manifest = {
        **_asked_for(protocol, cell),
        "pretrained": None,
        "guarded": False,
        "champion": None,
        "learner_evaluation_steps": 0,
        **{name: value for name, value in facts.items() if name != "versions"},
        # What it returned before its first interaction is the level that it can fall from
        "frozen_until": max(0, facts["frozen_until"]) if cell.method.pretrained else -1,
        "external": {**(cell.method.external or {}), "versions": facts["versions"]},
        "seconds": {name: float(facts["seconds"].get(name, 0.0)) for name in ("preparation", "finetuning")},
        "wall_seconds": round(time.monotonic() - clock, 1),
        "started": started.isoformat(timespec="seconds"),
        **machine,
    }
    return CellResult(**arrays, manifest=manifest)


@contextmanager
def _environments(env_id: str) -> Iterator[Callable[[int], VecEnv]]:
    """Makes environments by their seeds, which are closed at the end, whatever happens."""
    envs: list[VecEnv] = []

    def make(seed: int) -> VecEnv:
        envs.append(make_vec_env(env_id, n_envs=1, seed=seed))
        return envs[-1]

    try:
        yield make
    finally:
        for env in envs:
            env.close()


def _start(
    protocol: "Protocol", cell: "Cell", env: VecEnv, folder: Path, tell: OnStep, device: str
) -> tuple[BaseAlgorithm, dict[str, Any] | None]:
    """The learner before its first interaction, and what it starts from: made now, or kept from before."""
    method = cell.method
    if cell.dataset is None:
        return learner_from_scratch(method.algorithm, method.hyperparams, env, cell.seed, device), None
    algorithm, dataset = protocol.pretraining.algorithm, protocol.dataset(cell.dataset)
    recipe = pretraining_recipe(algorithm, method.pretraining_hyperparams, dataset, env, cell.seed, device)
    cache = PretrainedCache(folder, verbose=False, on_progress=lambda done, total: tell(PRETRAINING, done, total))
    pretrained = cache.get(recipe, env)
    model = pretrained_learner(method.algorithm, method.hyperparams, pretrained, env, cell.seed)
    return model, {
        "recipe": recipe.digest,
        "weights_sha256": weights_digest(model),
        "algorithm": recipe.algorithm.__name__,
        "hyperparams": pretrained.arguments,
    }


def _run(
    protocol: "Protocol",
    cell: "Cell",
    model: BaseAlgorithm,
    measure: Measure,
    make_env: Callable[[int], VecEnv],
    tell: OnStep,
) -> tuple[CollapseGuard | None, ChampionChallenger | None, EvalCallback | None]:
    """Let the learner finetune, or measure a policy that does not change as often as the others; gives who else took part."""
    interactions, plan, guard, champion, evaluation = protocol.interactions, protocol.learner_evaluation, None, None, None
    if cell.method.frozen:
        for timestep in range(0, interactions + 1, measure.every):
            tell(FINETUNING, timestep, interactions)
            measure.measure(model, timestep)
        return None, None, None
    method = protocol.with_random_return(cell.method)
    callbacks: list[BaseCallback] = [measure, Progress(tell, interactions), LastInteraction(interactions)]
    if cell.method.learns_from_evaluations:
        env = make_env(cell.seed)
        evaluation = EvalCallback(
            env,
            callback_after_eval=EvaluationTimes(),
            eval_freq=plan.every,
            n_eval_episodes=plan.episodes,
            verbose=0,
            warn=False,
        )
        callbacks.append(evaluation)
    if method.guard is not None:
        guard = CollapseGuard(**{"verbose": 0, **method.guard})
        callbacks.append(guard)
    if method.champion is not None:
        measure.policy = champion = ChampionChallenger(**{"verbose": 0, **method.champion})
        # Before it is measured
        callbacks.insert(0, champion)
    model.learn(interactions, callback=callbacks, log_interval=None)  # type: ignore[arg-type]
    return guard, champion, evaluation


def _asked_for(protocol: "Protocol", cell: "Cell") -> dict[str, Any]:
    """What the study says of the cell, and of its data."""
    facts: dict[str, Any] = {
        "name": cell.name,
        "key": protocol.cell_key(cell),
        "cell": protocol.described(cell),
        "label": cell.method.label,
        "frozen": cell.method.frozen,
        "random_return": protocol.random_return,
        "dataset": None,
    }
    if cell.dataset is not None:
        dataset = protocol.dataset(cell.dataset)
        facts["dataset"] = {
            "label": cell.dataset,
            "spec": protocol.specs[cell.dataset],
            "fingerprint": dataset.fingerprint,
            "transitions": len(dataset),
            "episodes": dataset.n_episodes,
            "mean_return": float(np.mean(dataset.episode_returns)),
            "reference_scores": protocol.data_facts(cell.dataset)["reference_scores"],
        }
    return facts


def _become(
    model: BaseAlgorithm,
    arguments: dict[str, Any],
    guard: CollapseGuard | None,
    champion: ChampionChallenger | None,
    evaluation: EvalCallback | None,
) -> dict[str, Any]:
    """What the learner that was constructed with these arguments is and has done, read off the learner itself."""
    now, undone = live_arguments(model), 0 if guard is None else guard.undone_updates
    offline = int(getattr(model, "offline_steps_done", 0))
    return {
        "algorithm": type(model).__name__,
        "hyperparams": arguments,
        # What the run itself made of its arguments, as remedies do
        "changed_hyperparams": {name: value for name, value in now.items() if value != arguments[name]},
        "replay_buffer": replay_facts(model),
        "learner_evaluation_steps": 0 if evaluation is None else evaluation.eval_env.env_method("get_total_steps")[0],
        "guarded": guard is not None,
        "alarms": 0 if guard is None else guard.alarms,
        "rollbacks": 0 if guard is None else guard.rollbacks,
        "promotions": 0 if guard is None else guard.promotions,
        "brake": None if guard is None else guard.brake_facts,
        "champion": None if champion is None else _became_champion(champion),
        "interactions": model.num_timesteps,
        # Gradient steps before and after the first interaction; the learner's own counter goes back with a rollback
        "updates": {
            "offline": offline,
            "online": int(getattr(model, "_n_updates", 0)) - offline + undone,
            "undone": undone,
        },
        "device": str(model.device),
        "gpu": th.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "threads": th.get_num_threads(),
    }


def _became_champion(champion: ChampionChallenger) -> dict[str, Any]:
    """Who is deployed at the end, what was decided and tried before, and what it cost."""
    names = [event["event"] for event in champion.events]
    kinds = [event["kind"] for event in champion.events if event["event"] == "episode"]
    budget = champion.contest.budget
    return {
        "step": champion.champion.name,
        "promotions": names.count("promotion"),
        "rejections": names.count("rejection"),
        "demotions": names.count("demotion"),
        "trials": kinds.count(TRIAL),
        "explorations": kinds.count(EXPLORE),
        # Negative if those earned more than the champion; None if nothing was put aside
        "budget_used": None if budget is None or budget.allowance == 0 else 1 - budget.balance / budget.allowance,
    }


def deployment(events: list[Event], ends: np.ndarray) -> dict[str, Any]:
    """
    What a result holds of the episodes of champion and challengers.

    :param events: Events of the run in one environment
    :param ends: Interactions at the end of each training episode
    :return: The events, and the kind of each training episode: the riskiest of its segments, if it has several
    """
    kinds = np.zeros(len(ends), dtype=np.int64)
    for event in events:
        if event["event"] == "episode" and (place := np.searchsorted(ends, event["timestep"])) < len(ends):
            kinds[place] = max(kinds[place], KINDS.index(event["kind"]))
    return {"training_kinds": kinds, "deployment_events": events}


def _warmed_up_until(model: BaseAlgorithm) -> int:
    """Interactions with the pretrained policy; -1 if there was none."""
    return model.first_warmup_end if isinstance(model, OfflineTD3) and model.offline_steps_done > 0 else -1


def _training_episodes(env: VecEnv, interactions: int) -> tuple[np.ndarray, np.ndarray]:
    """Interactions at the end of each training episode, and its return."""
    ends = np.cumsum(env.env_method("get_episode_lengths")[0], dtype=np.int64)
    returns = np.asarray(env.env_method("get_episode_rewards")[0], dtype=np.float64)
    within = ends <= interactions
    return ends[within], returns[within]


def _own_evaluations(evaluation: EvalCallback | None) -> dict[str, Any]:
    """Interactions before each evaluation that the learner learned from, and the returns and lengths of its episodes."""
    if evaluation is None:
        return {}
    assert isinstance(evaluation.callback, EvaluationTimes)
    times, env = evaluation.callback.timesteps, evaluation.eval_env
    shape = len(times), evaluation.n_eval_episodes
    return {
        "own_timesteps": np.array(times, dtype=np.int64),
        "own_returns": np.reshape(np.array(env.env_method("get_episode_rewards")[0], dtype=np.float64), shape),
        "own_lengths": np.reshape(np.array(env.env_method("get_episode_lengths")[0], dtype=np.int64), shape),
    }
