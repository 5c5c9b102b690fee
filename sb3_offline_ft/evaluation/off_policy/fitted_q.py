"""Fitted Q evaluation: critics of a policy that does not change, learned from logged data."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_offline_ft.common.callbacks import progress_bar as make_progress_bar
from sb3_offline_ft.common.checks import number, whole_number
from sb3_offline_ft.common.observations import Observations, map_observations, take_rows
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData, Policy, PolicyActions
from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, OfflinePolicy
from sb3_offline_ft.update import AutogradKernel, FastKernel, NotSupportedError, UpdateKernel

Array = npt.NDArray[np.float64]

BATCHES_AT_ONCE = 16
N_POINTS = 40
"""Of the curve of the estimate during training."""


@dataclass(frozen=True)
class OffPolicyEstimate:
    """
    What a policy returns, as far as logged data says.

    :param estimate: The discounted return from the logged initial states with its interval; see :func:`fitted_q_evaluation`
        for what the interval covers
    :param gamma: The discount factor
    :param replicates: What each replicate of the bootstrap estimates, shape ``(n_bootstraps,)``
    :param steps: Gradient steps at which the estimate was looked at, shape ``(points,)``
    :param curve: What each replicate estimated there, shape ``(points, n_bootstraps)``
    :param data_value: Mean discounted sum of the rewards of the logged episodes themselves, nothing added where they were cut
    :param clipped: Share of the targets in the last part of the training that were far beyond what any policy could return
        with the rewards in the data, by more than a standard deviation of the logged values: more than a few mean that the
        critics diverge
    :param horizons: How often the training went through the steps that a value is made of, ``gradient_steps * tau * (1 -
        gamma)``: of the error at the start about ``exp(-horizons)`` is left
    """

    estimate: Estimate
    gamma: float
    replicates: Array
    steps: npt.NDArray[np.int64]
    curve: Array
    data_value: float
    clipped: float
    horizons: float

    @property
    def moved(self) -> float:
        """By how much the estimate changed over the last fifth of the training."""
        mean = self.curve.mean(axis=1)
        return float(abs(mean[-1] - mean[-1 - max(1, len(mean) // 5)])) if len(mean) > 1 else np.inf

    @property
    def is_settled(self) -> bool:
        """Whether the training was long enough, moved by less than half the interval at its end, and did not diverge."""
        half_width = (self.estimate.high - self.estimate.low) / 2
        return self.horizons >= 2 and self.moved <= half_width and self.clipped <= 0.05


def fitted_q_evaluation(
    policy: Policy,
    dataset: DatasetSpec | LoggedData,
    *,
    gamma: float = 0.99,
    gradient_steps: int = 2_500,
    n_bootstraps: int = 8,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    tau: float = 0.1,
    net_arch: tuple[int, ...] = (64, 64),
    confidence: float = 0.95,
    seed: int = 0,
    device: th.device | str = "cpu",
    progress_bar: bool = False,
    actions: PolicyActions | None = None,
) -> OffPolicyEstimate:
    """
    Estimate what a policy returns from logged data alone, by fitted Q evaluation (Le et al. 2019, "Batch Policy Learning under
    Constraints", algorithm 3) with a bootstrap over episodes (Hao et al. 2021, "Bootstrapping Fitted Q-Evaluation").

    Critics learn ``Q(s, a) = r + gamma Q'(s', pi(s'))`` on the data's transitions, with target networks ``Q'`` that follow
    them; the estimate is the mean of ``Q'(s, pi(s))`` over the first states of the logged episodes. It is the *discounted*
    return of a task without a time limit, since states do not tell the time: compare it with discounted returns. A discount
    factor of 1 is not possible here, and an undiscounted return is not derived from it.

    Each replicate of the bootstrap has a critic of its own, with its own initial weights, whose errors and initial states
    count by weights of whole episodes (Rubin 1981, "The Bayesian Bootstrap"). The interval is ``mean ± t * standard
    deviation`` of the replicates, with Student's t of ``n_bootstraps - 1`` degrees of freedom. It covers which episodes
    happened to be logged, and the chance in initial weights and batches. It does **not** cover what all replicates share:
    errors where the policy leaves the data (see :func:`coverage`), a network that cannot represent the values, training that
    is too short, or a system that is not the one that was logged. So it is too narrow; by how much was measured in
    ``benchmarks/off_policy``.

    :param policy: An SB3 algorithm or policy with continuous actions, or an object with ``act``; its deterministic actions
    :param dataset: The data or its spec; all episodes, since their first rows are taken for initial states
    :param gamma: The discount factor, at least 0 and less than 1
    :param gradient_steps: Gradient steps of the critics; times ``tau``, they should be several times ``1 / (1 - gamma)``,
        the number of steps that a value is made of
    :param n_bootstraps: Number of replicates, at least 2
    :param batch_size: Transitions in a batch
    :param learning_rate: Of Adam
    :param tau: Weight of the new parameters in the target networks at each step; large, since the policy stands still
    :param net_arch: Hidden layers of each critic
    :param confidence: Level of the interval
    :param seed: Of weights, batches and bootstrap: policies that are evaluated with the same seed are comparable in pairs
    :param device: Of the critics
    :param progress_bar: Display a progress bar
    :param actions: What :meth:`LoggedData.actions_of` said, to save time
    :return: The estimate
    :raises ValueError: A number is out of range, or policy and data do not fit
    """
    gamma, gradient_steps = number(gamma, "gamma"), whole_number(gradient_steps, "gradient_steps", least=1)
    n_bootstraps = whole_number(n_bootstraps, "n_bootstraps", least=2)
    if not 0 <= gamma < 1:
        raise ValueError(f"`gamma` must be at least 0 and less than 1, found {gamma}: fitted Q evaluation discounts returns.")
    data = dataset if isinstance(dataset, LoggedData) else LoggedData(dataset, policy, seed)
    actions = data.actions_of(policy) if actions is None else actions
    critics = _Critics(data, actions, gamma, n_bootstraps, learning_rate, net_arch, seed, device)
    steps = np.unique(np.linspace(0, gradient_steps, N_POINTS + 1).astype(np.int64))
    curve, clipped = [critics.estimates()], 0.0
    bar = make_progress_bar(gradient_steps, "Fitted Q evaluation") if progress_bar else None
    try:
        for n_steps in np.diff(steps).tolist():
            clipped = critics.train(n_steps, batch_size, tau)
            curve.append(critics.estimates())
            if bar is not None:
                bar.update(n_steps)
    finally:
        if bar is not None:
            bar.close()
    first_rewards = data.dataset.monte_carlo_returns(gamma)[data.dataset.episode_starts]
    estimate = _interval(curve[-1], data.dataset.n_episodes, confidence)
    value, horizons = float(first_rewards.mean()), gradient_steps * tau * (1 - gamma)
    return OffPolicyEstimate(estimate, gamma, curve[-1], steps, np.stack(curve), value, clipped, horizons)


def _interval(replicates: Array, n_episodes: int, confidence: float) -> Estimate:
    value, n = float(replicates.mean()), len(replicates)
    method = f"fitted Q evaluation, mean of {n} replicates of a bootstrap over {n_episodes} episodes"
    if n_episodes < 2:
        return Estimate(value, np.nan, np.nan, n_episodes, f"{method}, no interval: it takes at least two episodes")
    half_width = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * replicates.std(ddof=1))
    method += f", {100 * confidence:g} % interval by Student's t of their spread"
    return Estimate(value, value - half_width, value + half_width, n_episodes, method)


class _Critics:
    """One critic a replicate, trained side by side on the same batches with weights of their own."""

    def __init__(
        self,
        data: LoggedData,
        actions: PolicyActions,
        gamma: float,
        n_bootstraps: int,
        learning_rate: float,
        net_arch: tuple[int, ...],
        seed: int,
        device: th.device | str,
    ) -> None:
        dataset = data.dataset
        self._data, self._actions, self._gamma, self._device = data, actions, gamma, th.device(device)
        with th.random.fork_rng(devices=[]):
            th.manual_seed(derive_seed(seed, stream=11))
            self._policy = _critic_class(data.observation_space)(
                data.observation_space,
                data.action_space,
                lambda _: learning_rate,
                net_arch={"pi": [], "qf": list(net_arch)},
                n_critics=n_bootstraps,
            ).to(self._device)
        self._policy.fit_normalizers(dataset.observations)
        self._policy.set_training_mode(False)
        self._kernel = _kernel_for(self._policy)
        # Networks learn fastest what begins right on average and varies by 1
        values = dataset.monte_carlo_returns(gamma).astype(np.float64)
        self._scale = float(values.std()) or 1.0
        self._offset = float(values.mean()) / self._scale
        self._rewards = dataset.rewards / np.float32(self._scale)
        least, most = float(self._rewards.min()), float(self._rewards.max())
        if dataset.terminations.any():
            least, most = min(least, 0.0), max(most, 0.0)
        self._least, self._most = least / (1 - gamma) - self._offset, most / (1 - gamma) - self._offset
        self._episode_of_rows = dataset.episode_of_rows()
        generator = np.random.default_rng(derive_seed(seed, stream=12))
        weights = generator.exponential(size=(dataset.n_episodes, n_bootstraps))
        self._of_starts = weights / weights.sum(axis=0)
        of_rows = (weights * dataset.episode_lengths[:, None]).sum(axis=0) / len(dataset)
        self._weights = (weights / of_rows).astype(np.float32)
        self._starts = self._tensors(take_rows(dataset.observations, dataset.episode_starts))
        self._start_actions = self._tensors(actions.now[dataset.episode_starts])

    def _tensors(self, rows: Observations) -> th.Tensor:
        # For Dict observations a dictionary of tensors, which SB3's types do not tell either
        return cast(th.Tensor, map_observations(lambda array: th.as_tensor(array, device=self._device), rows))

    @th.no_grad()
    def estimates(self) -> Array:
        """What each replicate makes of its initial states, shape ``(n_bootstraps,)``."""
        values = th.cat(self._policy.critic_target(self._starts, self._start_actions), dim=1).cpu().numpy()
        return np.asarray(((self._of_starts * values).sum(axis=0) + self._offset) * self._scale, np.float64)

    def train(self, gradient_steps: int, batch_size: int, tau: float) -> float:
        """Do gradient steps; which share of the targets was beyond what rewards allow by more than values spread."""
        dataset, n_beyond, n_targets = self._data.dataset, th.zeros((), device=self._device), 0
        for start in range(0, gradient_steps, BATCHES_AT_ONCE):
            rows = self._data.draw(min(BATCHES_AT_ONCE, gradient_steps - start), batch_size)
            flat = rows.reshape(-1)
            transitions = ReplayBufferSamples(
                self._tensors(take_rows(dataset.observations, flat)),
                self._tensors(self._data.actions[flat]),
                self._tensors(take_rows(dataset.next_observations, flat)),
                self._tensors(dataset.terminations[flat, None].astype(np.float32)),
                self._tensors(self._rewards[flat, None]),
            )
            for own, batch in zip(rows, self._kernel.batches(transitions, batch_size), strict=True):
                next_values = self._kernel.q_values_of_next(self._tensors(self._actions.after[own])) + self._offset
                wanted = batch.rewards + (1 - batch.dones) * self._gamma * next_values - self._offset
                targets = wanted.clamp(self._least, self._most)
                n_beyond, n_targets = n_beyond + ((targets - wanted).abs() > 1).sum(), n_targets + targets.numel()
                self._kernel.update_critics(targets, self._tensors(self._weights[self._episode_of_rows[own]]))
                self._kernel.update_targets(tau, update_actor=False)
        return float(n_beyond / n_targets)


def _critic_class(observation_space: spaces.Space[Any]) -> type[OfflinePolicy]:
    if isinstance(observation_space, spaces.Dict):
        return MultiInputPolicy
    return CnnPolicy if is_image_space(observation_space) else MlpPolicy


def _kernel_for(policy: OfflinePolicy) -> UpdateKernel:
    try:
        kernel = FastKernel(policy)
        kernel.prepare()
    except NotSupportedError:
        return AutogradKernel(policy)
    return kernel
