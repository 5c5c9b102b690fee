"""One cell of a study: a method on a dataset with a seed."""

import hashlib
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv

import sb3_offline_ft
from sb3_offline_ft.collapse import CollapseGuard
from sb3_offline_ft.common.live import live_arguments, replay_facts
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.cache import PretrainedCache
from sb3_offline_ft.pretrained.recipe import code_digest
from sb3_offline_ft.pretrained.start import Pretrained
from sb3_offline_ft.study.engine.learners import new_learner_from_scratch, pretrained_learner, pretraining_recipe
from sb3_offline_ft.study.engine.run_folder import CellResult

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.protocol import Cell, Protocol

PRETRAINING, FINETUNING = "pretraining", "finetuning"
MEASURED_STREAM = 10
REPORT_STEPS = 200
CPU_MODEL = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
"""What Linux says of a processor, on x86 or on ARM."""
PACKAGES = ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "mujoco", "minari", "numpy")

OnStep = Callable[[str, int, int], None]
OnEvaluation = Callable[[int, Sequence[float]], None]


class Measure(BaseCallback):
    """
    Evaluates the policy now and then, without being noticed by the learner.

    The episodes of two learners with the same seed start alike, evaluation by evaluation, in environments that draw random
    numbers when an episode begins and at no other time, as MuJoCo's do. Where steps are random too, an episode's start depends
    on how many steps there were before it.

    :param env: Environment for nothing else, seeded
    :param every: Interactions between two evaluations; the first one is before the first interaction
    :param episodes: Episodes in an evaluation
    :param on_evaluation: Is told each of them
    :param until: Interactions after which nothing is evaluated, None for no limit
    """

    def __init__(
        self, env: VecEnv, every: int, episodes: int, on_evaluation: OnEvaluation | None = None, until: int | None = None
    ) -> None:
        super().__init__()
        self.env, self.every, self.episodes, self.until = env, every, episodes, until
        self._on_evaluation = on_evaluation
        self.timesteps: list[int] = []
        self.returns: list[list[float]] = []
        self.lengths: list[list[int]] = []

    def measure(self, model: BaseAlgorithm, timestep: int) -> None:
        """
        Evaluate a policy.

        :param model: Who has it
        :param timestep: Interactions so far
        """
        returns, lengths = evaluate_policy(model, self.env, self.episodes, return_episode_rewards=True)
        assert isinstance(returns, list) and isinstance(lengths, list)
        self.timesteps.append(timestep)
        self.returns.append([float(value) for value in returns])
        self.lengths.append([int(length) for length in lengths])
        if self._on_evaluation is not None:
            self._on_evaluation(timestep, self.returns[-1])

    def _on_training_start(self) -> None:
        self.measure(self.model, 0)

    def _on_step(self) -> bool:
        now = self.num_timesteps if self.until is None else min(self.num_timesteps, self.until)
        due = (now // self.every) * self.every
        if due > self.timesteps[-1]:
            self.measure(self.model, due)
        return True


class _ProgressReport(BaseCallback):
    def __init__(self, on_step: OnStep, total: int) -> None:
        super().__init__()
        self._report, self._total = on_step, total

    def _on_step(self) -> bool:
        if self.num_timesteps % REPORT_STEPS == 0:
            self._report(FINETUNING, self.num_timesteps, self._total)
        return True


class _LastInteraction(BaseCallback):
    """Ends the run of an algorithm that would go on to the end of a rollout or an episode."""

    def __init__(self, interactions: int) -> None:
        super().__init__()
        self._interactions = interactions

    def _on_training_start(self) -> None:
        # Who looks at the budget after each step ends by itself, with the updates of the last one
        frequency = self.model.train_freq if isinstance(self.model, OffPolicyAlgorithm) else None
        self._ends_by_itself = isinstance(frequency, TrainFreq) and frequency == TrainFreq(1, TrainFrequencyUnit.STEP)

    def _on_step(self) -> bool:
        return self._ends_by_itself or self.num_timesteps < self._interactions


class _Run:
    """The work on one cell."""

    def __init__(
        self,
        protocol: "Protocol",
        cell: "Cell",
        folder: Path,
        on_step: OnStep | None,
        on_evaluation: OnEvaluation | None,
        device: str,
    ) -> None:
        self.protocol, self.cell, self.device = protocol, cell, device
        self.method = cell.method
        self.on_step = on_step or (lambda phase, done, total: None)
        self.cache = PretrainedCache(
            folder, verbose=False, on_progress=lambda done, total: self.on_step(PRETRAINING, done, total)
        )
        self.envs: list[VecEnv] = []
        # The learner acts and is evaluated in the episodes that `rl_zoo3.train --seed` gives it; what is measured is in others
        self.env = self._make_env(cell.seed)
        plan = protocol.evaluation
        self.measure = Measure(
            self._make_env(derive_seed(cell.seed, MEASURED_STREAM)),
            plan.every,
            plan.episodes,
            on_evaluation,
            protocol.interactions,
        )
        self.guard: CollapseGuard | None = None
        self.learner_evaluation: EvalCallback | None = None
        self.pretrained: Pretrained | None = None

    def _make_env(self, seed: int) -> VecEnv:
        env = make_vec_env(self.protocol.env, n_envs=1, seed=seed)
        self.envs.append(env)
        return env

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def learner(self) -> BaseAlgorithm:
        method, seed = self.method, self.cell.seed
        if not method.pretrained:
            return new_learner_from_scratch(method.algorithm, method.hyperparams, self.env, seed, self.device)
        assert self.cell.dataset is not None
        dataset = self.protocol.dataset(self.cell.dataset)
        pretraining = self.protocol.pretraining.algorithm
        recipe = pretraining_recipe(pretraining, method.pretraining_hyperparams, dataset, self.env, seed, self.device)
        self.pretrained = self.cache.get(recipe, self.env)
        return pretrained_learner(method.algorithm, method.hyperparams, self.pretrained, self.env, seed)

    def _callbacks(self) -> list[BaseCallback]:
        interactions = self.protocol.interactions
        callbacks: list[BaseCallback] = [
            self.measure,
            _ProgressReport(self.on_step, interactions),
            _LastInteraction(interactions),
        ]
        if self.method.learns_from_evaluations:
            plan = self.protocol.learner_evaluation
            self.learner_evaluation = EvalCallback(
                self._make_env(self.cell.seed), eval_freq=plan.every, n_eval_episodes=plan.episodes, verbose=0, warn=False
            )
            callbacks.append(self.learner_evaluation)
        guard = self.protocol.guard_arguments(self.method)
        if guard is not None:
            self.guard = CollapseGuard(**{"verbose": 0, **guard})
            callbacks.append(self.guard)
        return callbacks

    def learn(self, model: BaseAlgorithm) -> None:
        model.learn(self.protocol.interactions, callback=self._callbacks(), log_interval=None)  # type: ignore[arg-type]

    def stay(self, model: BaseAlgorithm) -> None:
        """Measure a policy that does not change, as often as the others."""
        for timestep in range(0, self.protocol.interactions + 1, self.protocol.evaluation.every):
            self.on_step(FINETUNING, timestep, self.protocol.interactions)
            self.measure.measure(model, timestep)

    def training_episodes(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.env.env_method("get_episode_lengths")[0]
        returns = self.env.env_method("get_episode_rewards")[0]
        ends = np.cumsum(lengths, dtype=np.int64)
        within = ends <= self.protocol.interactions
        return ends[within], np.asarray(returns, dtype=np.float64)[within]

    def frozen_until(self, model: BaseAlgorithm) -> int:
        if not self.method.pretrained:
            return -1
        assert isinstance(model, OfflineTD3)
        return self.protocol.interactions if self.method.frozen else model.first_warmup_end


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
    # Before anything is imported late or edited meanwhile
    started, clock, machine = datetime.now(UTC), time.monotonic(), _machine()
    run = _Run(protocol, cell, pretrained_folder, on_step, on_evaluation, device)
    try:
        with warnings.catch_warnings():
            # From scratch on purpose
            warnings.filterwarnings("ignore", ".* has neither a dataset nor pretrained weights")
            model = run.learner()
            weights, arguments, prepared = _digest(model), live_arguments(model), time.monotonic()
            run.stay(model) if cell.method.frozen else run.learn(model)
        finished = time.monotonic()
        training_timesteps, training_returns = run.training_episodes()
        guard, evaluation = run.guard, run.learner_evaluation
        manifest = {
            "name": cell.name,
            "key": protocol.cell_key(cell),
            "cell": protocol.described(cell),
            "label": cell.method.label,
            "frozen_until": run.frozen_until(model),
            "random_return": protocol.random_return,
            "dataset": _dataset_facts(protocol, cell),
            "pretrained": _pretraining_facts(run.pretrained, weights),
            "algorithm": type(model).__name__,
            "hyperparams": arguments,
            "changed_hyperparams": _changed(arguments, live_arguments(model)),
            "frozen": cell.method.frozen,
            "replay_buffer": replay_facts(model),
            "learner_evaluation_steps": 0 if evaluation is None else _steps_in(evaluation.eval_env),
            "guarded": guard is not None,
            "alarms": 0 if guard is None else guard.alarms,
            "rollbacks": 0 if guard is None else guard.rollbacks,
            "promotions": 0 if guard is None else guard.promotions,
            "brake": None if guard is None else guard.brake_facts,
            "interactions": model.num_timesteps,
            "updates": _updates(model, 0 if guard is None else guard.undone_updates),
            "seconds": {
                "preparation": round(prepared - clock, 1),
                "finetuning": round(finished - prepared, 1),
            },
            "started": started.isoformat(timespec="seconds"),
            "device": str(model.device),
            "gpu": th.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
            "threads": th.get_num_threads(),
            **machine,
        }
    finally:
        run.close()
    measure = run.measure
    return CellResult(
        np.array(measure.timesteps, dtype=np.int64),
        np.array(measure.returns, dtype=np.float64),
        np.array(measure.lengths, dtype=np.int64),
        training_timesteps,
        training_returns,
        [] if guard is None else guard.events,
        manifest,
    )


def _updates(model: BaseAlgorithm, undone: int) -> dict[str, int]:
    """Gradient steps before and after the first interaction; the learner's own counter goes back with a rollback."""
    offline = int(getattr(model, "offline_steps_done", 0))
    return {"offline": offline, "online": int(getattr(model, "_n_updates", 0)) - offline + undone, "undone": undone}


def _steps_in(env: VecEnv) -> int:
    return int(env.env_method("get_total_steps")[0])


def _digest(model: BaseAlgorithm) -> str:
    """Of the weights that the learner has now."""
    digest = hashlib.sha256()
    for name, tensor in model.policy.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def _dataset_facts(protocol: "Protocol", cell: "Cell") -> dict[str, Any] | None:
    if cell.dataset is None:
        return None
    dataset = protocol.dataset(cell.dataset)
    return {
        "label": cell.dataset,
        "spec": protocol.specs[cell.dataset],
        "fingerprint": dataset.fingerprint,
        "transitions": len(dataset),
        "episodes": dataset.n_episodes,
        "mean_return": float(np.mean(dataset.episode_returns)),
        "reference_scores": protocol.data_facts(cell.dataset)["reference_scores"],
    }


def _pretraining_facts(pretrained: Pretrained | None, weights: str) -> dict[str, Any] | None:
    if pretrained is None:
        return None
    recipe = pretrained.recipe
    return {
        "recipe": recipe.digest,
        "weights_sha256": weights,
        "algorithm": recipe.algorithm.__name__,
        "hyperparams": pretrained.arguments,
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What the run itself made of its arguments, as remedies do."""
    return {name: value for name, value in after.items() if value != before[name]}


def _machine() -> dict[str, Any]:
    versions = {"sb3-offline-ft": sb3_offline_ft.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            continue
    return {
        "versions": versions,
        "code": code_digest(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **_cpu(),
    }


def _cpu(information: Path = Path("/proc/cpuinfo")) -> dict[str, str | None]:
    pairs = (
        [line.split(":", 1) for line in information.read_text().splitlines() if ":" in line] if information.exists() else []
    )
    facts = {name.strip(): value.strip() for name, value in reversed(pairs)}
    # One name may stand for several models, and ARM's have none
    model = "/".join(facts[name] for name in CPU_MODEL if name in facts)
    return {"cpu": facts.get("model name") or platform.processor() or platform.machine(), "cpu_model": model or None}
