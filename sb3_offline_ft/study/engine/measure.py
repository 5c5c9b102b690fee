"""Callbacks of a cell's run that the learner does not notice."""

from collections.abc import Callable, Sequence

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import PolicyPredictor, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv

PRETRAINING, FINETUNING = "pretraining", "finetuning"
REPORT_STEPS = 200

OnStep = Callable[[str, int, int], None]
"""Is told the phase of a run, how many steps of it are done, and of how many."""
OnEvaluation = Callable[[int, Sequence[float]], None]
"""Is told the interactions and the returns of an evaluation."""


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
    :param policy: What is evaluated in a learner's place, None for the learner itself
    """

    def __init__(
        self,
        env: VecEnv,
        every: int,
        episodes: int,
        on_evaluation: OnEvaluation | None = None,
        until: int | None = None,
        policy: PolicyPredictor | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.env, self.every, self.episodes, self.until = env, every, episodes, until
        self._on_evaluation = on_evaluation
        self.timesteps: list[int] = []
        self.returns: list[list[float]] = []
        self.lengths: list[list[int]] = []

    def measure(self, policy: PolicyPredictor, timestep: int) -> None:
        """Evaluate a policy after so many interactions."""
        returns, lengths = evaluate_policy(policy, self.env, self.episodes, return_episode_rewards=True)
        assert isinstance(returns, list) and isinstance(lengths, list)
        self.timesteps.append(timestep)
        self.returns.append([float(value) for value in returns])
        self.lengths.append([int(length) for length in lengths])
        if self._on_evaluation is not None:
            self._on_evaluation(timestep, self.returns[-1])

    def _on_training_start(self) -> None:
        self.measure(self.policy or self.model, 0)

    def _on_step(self) -> bool:
        now = self.num_timesteps if self.until is None else min(self.num_timesteps, self.until)
        due = (now // self.every) * self.every
        if due > self.timesteps[-1]:
            self.measure(self.policy or self.model, due)
        return True


class EvaluationTimes(BaseCallback):
    """Notes after how many interactions an ``EvalCallback`` evaluated, as its callback after evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []

    def _on_step(self) -> bool:
        self.timesteps.append(self.num_timesteps)
        return True


class Progress(BaseCallback):
    """Tells how far a run of so many interactions is."""

    def __init__(self, on_step: OnStep, total: int) -> None:
        super().__init__()
        self._report, self._total = on_step, total

    def _on_step(self) -> bool:
        if self.num_timesteps % REPORT_STEPS == 0:
            self._report(FINETUNING, self.num_timesteps, self._total)
        return True


class LastInteraction(BaseCallback):
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
