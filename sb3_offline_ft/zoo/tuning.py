"""``-optimize`` for our algorithms: trials that share data and pretrained learners, are seeded, and report their dip."""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.collapse import CollapseGuard
from sb3_offline_ft.common.callbacks import find_callbacks
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.cache import PretrainedCache
from sb3_offline_ft.pretrained.start import Pretrained, start_from
from sb3_offline_ft.tuning.search_spaces import (
    DIP_PENALTY,
    FINETUNING_PREFIX,
    FIXED,
    N_TIMESTEPS,
    NOISE,
    TUNING_PREFIX,
    Hyperparams,
    SearchSpace,
    split_finetuning,
    split_tuning,
)
from sb3_offline_ft.zoo.pretraining import Pretraining

SEED = "seed"
TRIALS_STREAM, SAMPLERS_STREAM = 2, 3

Objective = Callable[[Any, Any], float]


class StudySeed:
    """
    The seed of a study, which all its processes use: that of the one which came first.

    :param own: The seed this process would use
    :param cache: The folder that they share, None for a study of one process
    """

    def __init__(self, own: int, cache: PretrainedCache | None) -> None:
        self.own = own
        self._cache = cache
        self._seed: int | None = None

    def __call__(self, study: Study) -> int:
        """
        :param study: The study
        :return: Its seed
        """
        if self._seed is None:
            with nullcontext() if self._cache is None else self._cache.lock("study", "another process that begins a study"):
                known = study.user_attrs.get(SEED)
                if known is None:
                    study.set_user_attr(SEED, self.own)
                elif known != self.own:
                    print(f"The study's seed is {known}, which is used in place of {self.own}.", flush=True)
            self._seed = int(self.own if known is None else known)
        return self._seed


class TrialSeededSampler(BaseSampler):
    """
    A sampler whose draws depend on the study's seed, the trial's number and the trials before it only, not on the process:
    processes that share a study draw different parameters, and a study that goes on draws other ones than at its beginning.

    :param create: Makes the sampler for a seed
    :param seed: The study's seed
    """

    def __init__(self, create: Callable[[int], BaseSampler], seed: StudySeed) -> None:
        self._create = create
        self._seed = seed
        self._samplers: dict[int, BaseSampler] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # rl_zoo3 pickles the study with its sampler
        return copy.copy, (self._create(self._seed.own),)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = derive_seed(derive_seed(self._seed(study), SAMPLERS_STREAM), trial.number)
        self._samplers[trial.number] = self._create(seed)
        self._samplers[trial.number].before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._samplers[trial.number].infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._samplers[trial.number].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._samplers[trial.number].sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Iterable[float] | None) -> None:
        self._samplers.pop(trial.number).after_trial(study, trial, state, None if values is None else list(values))


class ObservedTrial:
    """
    A trial as rl_zoo3's objective sees it: what is reported is also told in the trial's user attributes.

    The evaluation before the first interaction has step 0 and is not reported to the pruner, which compares what trials
    have learned.

    :param trial: The trial
    :param frozen_steps: The last evaluation of the pretrained policy
    :param random_return: Mean return of a random policy, if known
    :param dip_penalty: Weight of the dip in the trial's value
    """

    def __init__(self, trial: optuna.Trial, frozen_steps: int, random_return: float | None, dip_penalty: float = 0.0) -> None:
        self._trial = trial
        self._frozen_steps = frozen_steps
        self._random_return = random_return
        self._dip_penalty = dip_penalty
        self._initial: list[float] = []
        self._lowest: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def report(self, value: float, step: int) -> None:
        """
        :param value: Mean return of an evaluation
        :param step: Its number
        """
        value = float(value)
        if step <= self._frozen_steps:
            self._initial.append(value)
        else:
            self._lowest = value if self._lowest is None else min(self._lowest, value)
        if step > 0:
            self._trial.report(self.penalized(value), step)
        self._tell()

    @property
    def _initial_return(self) -> float | None:
        return sum(self._initial) / len(self._initial) if self._initial else None

    def penalized(self, value: float) -> float:
        """
        :param value: Mean return of an evaluation
        :return: The trial's value if it was the last one: the dip so far, times its weight, is taken off
        :raises RuntimeError: There is a weight, and no evaluation that the dip is measured from
        """
        initial = self._initial_return
        if self._dip_penalty > 0 and initial is None:
            # No ValueError, which rl_zoo3 takes for bad luck of a trial
            raise RuntimeError(
                f"`{TUNING_PREFIX}{DIP_PENALTY}` is {self._dip_penalty:g}, and there was no evaluation of the pretrained "
                "policy, before the first interaction or in the warm-up, that the dip could be measured from."
            )
        dip = 0.0 if initial is None or self._lowest is None else max(0.0, initial - self._lowest)
        return value - self._dip_penalty * dip

    def _tell(self) -> None:
        tell = self._trial.set_user_attr
        initial = self._initial_return
        if initial is not None:
            tell("initial_return", initial)
        if self._lowest is not None:
            tell("lowest_return", self._lowest)
        if initial is None or self._lowest is None:
            return
        tell("dip", initial - self._lowest)
        if self._random_return not in (None, initial):
            tell("dip_depth", (initial - self._lowest) / abs(initial - self._random_return))


class TrialStart(BaseCallback):
    """
    Lets a trial's learner start as the pretrained one, with random numbers of its own.

    :param pretrained: The pretrained learner, None without a pretraining
    :param seed: The trial's seed
    :param quiet: Whether the guard says nothing
    """

    def __init__(self, pretrained: Pretrained | None, seed: int, quiet: bool) -> None:
        super().__init__()
        self._pretrained = pretrained
        self._seed = seed
        self._quiet = quiet

    def _init_callback(self) -> None:
        assert isinstance(self.model, OfflineTD3)
        if self._pretrained is not None:
            start_from(self.model, self._pretrained)
        self.model.set_random_seed(self._seed)

    def _on_training_start(self) -> None:
        siblings = self.locals.get("callback")
        if self._pretrained is not None:
            for evaluation in find_callbacks(siblings, TrialEvalCallback):
                # The evaluation before the first interaction is one more than rl_zoo3 counts
                evaluation.eval_idx = -1
        if self._quiet:
            for guard in find_callbacks(siblings, CollapseGuard):
                guard.verbose = 0

    def _on_step(self) -> bool:
        return True


def run_trial(
    objective: Objective, manager: Any, trial: optuna.Trial, pretraining: Pretraining, seed: int, dip_penalty: float = 0.0
) -> float:
    """
    Run rl_zoo3's objective on a learner that is pretrained.

    :param objective: rl_zoo3's objective
    :param manager: rl_zoo3's manager
    :param trial: The trial
    :param pretraining: The manager's pretraining
    :param seed: The study's seed
    :param dip_penalty: Weight of the dip below the pretrained policy's return in the trial's value
    :return: Mean return of the last evaluation; less the dip, times its weight
    :raises ValueError: There is no pretrained policy to dip below, or nothing after its warm-up
    """
    eval_freq = max(int(manager.n_timesteps / manager.n_evaluations) // manager.n_envs, 1) * manager.n_envs
    trial_seed = derive_seed(derive_seed(seed, TRIALS_STREAM), trial.number)
    told = {SEED: trial_seed, N_TIMESTEPS: manager.n_timesteps, "eval_freq": eval_freq, FIXED: _fixed(manager)}
    for name, value in told.items():
        trial.set_user_attr(name, value)
    sampled, sampled_for_whole_run = _sample(manager, trial)
    hyperparams = pretraining.hyperparams | sampled_for_whole_run
    dataset, env = pretraining.dataset(hyperparams), pretraining.env()
    recipe = pretraining.recipe(hyperparams, seed, env)
    pretrained = None if recipe is None else pretraining.pretrained(recipe, env, keep=True)
    if recipe is not None:
        trial.set_user_attr("pretrained", recipe.digest)
    elif dip_penalty > 0:
        raise ValueError(
            f"`{TUNING_PREFIX}{DIP_PENALTY}` is {dip_penalty:g}, and without `dataset` and `offline_steps` there is no "
            "pretrained policy whose return a trial could dip below: leave it out."
        )

    run = copy.copy(manager)
    run.seed = trial_seed
    run.create_envs = _with_common_evaluation(run, seed)
    run._hyperparams = manager._hyperparams | {"dataset": dataset}
    given = manager.specified_callbacks or []
    start = TrialStart(pretrained, trial_seed, quiet=manager.verbose < 2)
    run.specified_callbacks = [start, *(given if isinstance(given, list) else [given])]
    # For the first weights of a learner without a pretraining
    set_random_seed(trial_seed)
    frozen_steps = -1
    if pretrained is not None:
        warmup_steps = pretraining.argument("warmup_steps", run._hyperparams | sampled)
        frozen_steps = warmup_steps // eval_freq
        if dip_penalty > 0 and frozen_steps >= manager.n_timesteps // eval_freq:
            raise ValueError(
                f"`{TUNING_PREFIX}{DIP_PENALTY}` is {dip_penalty:g}, `warmup_steps` are {warmup_steps:,} of "
                f"{manager.n_timesteps:,} interactions, and there is no evaluation after them, every {eval_freq:,}: use fewer."
            )
    scores = None if dataset is None else dataset.reference_scores
    observed = ObservedTrial(trial, frozen_steps, None if scores is None else scores.random, dip_penalty)
    return observed.penalized(objective(run, observed))


def _fixed(manager: Any) -> list[str]:
    given = {name.removeprefix(FINETUNING_PREFIX) for name in split_tuning(manager.custom_hyperparams or {})[0]}
    return sorted(given | {"noise_std"} if given & {"noise_type", "action_noise"} else given)


def _sample(manager: Any, trial: optuna.Trial) -> tuple[Hyperparams, Hyperparams]:
    """Arguments of the constructor that a trial sets, and those among them that act in the pretraining too."""
    sampler = HYPERPARAMS_SAMPLER[manager.algo]
    kwargs = manager._hyperparams.get("replay_buffer_kwargs", {})
    sampled = sampler(trial, manager.n_actions, manager.n_envs, {"using_her_replay_buffer": False, "her_kwargs": kwargs})
    if not isinstance(getattr(sampler, "__self__", None), SearchSpace):
        return sampled, sampled
    whole_run, _ = split_finetuning(HYPERPARAMS_CONVERTER[manager.algo](trial.params))
    return sampled, {name: value for name, value in whole_run.items() if name not in NOISE}


def _with_common_evaluation(run: Any, seed: int) -> Callable[..., VecEnv]:
    evaluator = copy.copy(run)
    evaluator.seed = seed

    def create_envs(n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        # All trials begin with the same evaluation episodes
        maker = evaluator if eval_env else run
        env: VecEnv = type(run).create_envs(maker, n_envs, eval_env=eval_env, no_log=no_log)
        return env

    return create_envs
