"""Whether the data at hand can say, before a trial, that a candidate fails grossly."""

from dataclasses import dataclass

import numpy as np

from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.evaluation.off_policy.coverage import PolicyCoverage, coverage
from sb3_offline_ft.evaluation.off_policy.fitted_q import OffPolicyEstimate, fitted_q_evaluation
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData, Policy

WHO = ("candidate", "baseline")


@dataclass(frozen=True)
class DataVerdict:
    """
    What data says of a candidate and a baseline.

    :param text: In a few sentences
    :param estimates: Of ``"candidate"`` and ``"baseline"``, by fitted Q evaluation with the same seed
    :param coverage: Of both
    """

    text: str
    estimates: dict[str, OffPolicyEstimate]
    coverage: dict[str, PolicyCoverage]

    @property
    def suffices(self) -> bool:
        """Whether the data covers what both do, and the estimates have settled."""
        return _suffices(self.estimates, self.coverage)

    @property
    def gross_failure(self) -> bool:
        """Whether the candidate's whole interval lies below the baseline's: never a proof, but a reason not to begin."""
        return _is_gross_failure(self.estimates)


def _suffices(estimates: dict[str, OffPolicyEstimate], found: dict[str, PolicyCoverage]) -> bool:
    return all(estimates[who].is_settled and not found[who].leaves_data for who in WHO)


def _is_gross_failure(estimates: dict[str, OffPolicyEstimate]) -> bool:
    return estimates["candidate"].estimate.high < estimates["baseline"].estimate.low


def data_suffices(
    candidate: Policy,
    baseline: Policy,
    spec: DatasetSpec,
    *,
    gamma: float = 0.99,
    gradient_steps: int = 2_500,
    n_bootstraps: int = 8,
    net_arch: tuple[int, ...] = (64, 64),
    seed: int = 0,
    progress_bar: bool = False,
) -> DataVerdict:
    """
    Ask data whether a candidate fails grossly against a baseline, and whether it can tell at all.

    It is a filter before a trial, not a decision: that the candidate does not fail by this estimate is no evidence that it is
    good. Takes minutes; see :func:`fitted_q_evaluation`.

    :param candidate: The policy that may take over
    :param baseline: The policy that runs today
    :param spec: The data, or its spec, of at least two episodes
    :param gamma: The discount factor of the estimates
    :param gradient_steps: Gradient steps for each
    :param n_bootstraps: Replicates of the bootstrap for each
    :param net_arch: Hidden layers of the critics
    :param seed: The same for both, so that the bootstrap draws the same episodes
    :param progress_bar: Display progress bars
    :return: The verdict
    :raises ValueError: A policy does not fit the data, or the data has a single episode
    """
    estimates, found = {}, {}
    for who, policy in zip(WHO, (candidate, baseline), strict=True):
        data = LoggedData(spec, policy, seed)
        actions = data.actions_of(policy)
        found[who] = coverage(policy, data, seed=seed, actions=actions)
        estimates[who] = fitted_q_evaluation(
            policy,
            data,
            gamma=gamma,
            gradient_steps=gradient_steps,
            n_bootstraps=n_bootstraps,
            net_arch=net_arch,
            seed=seed,
            progress_bar=progress_bar,
            actions=actions,
        )
    return DataVerdict(_text(estimates, found), estimates, found)


def _text(estimates: dict[str, OffPolicyEstimate], found: dict[str, PolicyCoverage]) -> str:
    shown = {
        who: f"{one.estimate.value:.1f} ({one.estimate.low:.1f} to {one.estimate.high:.1f})" for who, one in estimates.items()
    }
    gamma = estimates["candidate"].gamma
    sentences = [
        f"By the data alone the candidate returns {shown['candidate']} and the baseline {shown['baseline']}, discounted by "
        f"{gamma:g} a step."
    ]
    difference = estimates["candidate"].replicates - estimates["baseline"].replicates
    if _is_gross_failure(estimates):
        sentences.append("The candidate looks like a gross failure: find out why before it acts anywhere.")
    else:
        share = float(np.mean(difference > 0))
        sentences.append(
            f"No gross failure is seen ({100 * share:.0f} % of the replicates put the candidate first). That is no evidence "
            "that the candidate is good, or that it does not fail: only episodes are."
        )
    for who in WHO:
        if found[who].leaves_data:
            sentences.append(f"The data does not cover the {who}: {found[who].text} Its estimate is a guess.")
        if not estimates[who].is_settled:
            sentences.append(f"The estimate of the {who} has not settled: take more gradient steps, or do not rely on it.")
    if _suffices(estimates, found):
        sentences.append("The data covers what both do at logged states; which states they would reach, it cannot say.")
    return " ".join(sentences)
