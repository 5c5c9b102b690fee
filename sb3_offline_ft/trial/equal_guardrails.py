"""The effect at equal guardrails: what would be left of it if the candidate were as good as the baseline in them."""

import math

import numpy as np
from scipy.stats import t

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.trial.assignment import CANDIDATE
from sb3_offline_ft.trial.evidence import Evidence
from sb3_offline_ft.trial.plan import TrialPlan


def effect_at_equal_guardrails(plan: TrialPlan, evidence: Evidence, confidence: float) -> Estimate | None:
    """
    A candidate may buy the primary metric with a guardrail, within its margin, and a fair comparison is at equal ones. The
    primary metric is regressed on who acted and on the guardrails, all within blocks (analysis of covariance): the coefficient
    of the candidate is its improvement where the guardrails are equal, as far as one is traded for the other linearly.

    :param plan: The plan
    :param evidence: The episodes
    :param confidence: Of the interval
    :return: The improvement of the primary metric; None without guardrails on other metrics, or with too few episodes
    """
    names = [rail.metric for rail in plan.guardrails if rail.metric != plan.primary.metric]
    measured = [
        (record, [evidence.value(record, name) for name in (plan.primary.metric, *names)]) for record in evidence.compared
    ]
    rows = [(record, values) for record, values in measured if None not in values]
    blocks = np.array([record.block for record, _ in rows])
    n_blocks = len(np.unique(blocks))
    freedom = len(rows) - n_blocks - 1 - len(names)
    if not names or freedom < 2:
        return None
    table = np.array([[*values, float(record.arm == CANDIDATE)] for record, values in rows], dtype=np.float64)
    for block in np.unique(blocks):
        table[blocks == block] -= table[blocks == block].mean(axis=0)
    target, predictors = table[:, 0], table[:, 1:]
    if np.linalg.matrix_rank(predictors) < predictors.shape[1]:
        return None
    inverse = np.linalg.inv(predictors.T @ predictors)
    coefficients = inverse @ predictors.T @ target
    residuals = target - predictors @ coefficients
    value, error = float(coefficients[-1]), math.sqrt(float(residuals @ residuals) / freedom * float(inverse[-1, -1]))
    half = float(t.isf((1 - confidence) / 2, freedom)) * error
    name = f"analysis of covariance within blocks; {100 * confidence:g} % interval: Student's t"
    return Estimate(value, value - half, value + half, len(rows), name)
