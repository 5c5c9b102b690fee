"""What a policy would return, estimated from logged data alone, and whether the data can say it."""

from sb3_offline_ft.evaluation.off_policy.coverage import PolicyCoverage, coverage
from sb3_offline_ft.evaluation.off_policy.critics import initial_value_of_critics
from sb3_offline_ft.evaluation.off_policy.fitted_q import OffPolicyEstimate, fitted_q_evaluation
from sb3_offline_ft.evaluation.off_policy.logged import Acts
from sb3_offline_ft.evaluation.off_policy.sufficiency import DataVerdict, data_suffices

__all__ = [
    "Acts",
    "DataVerdict",
    "OffPolicyEstimate",
    "PolicyCoverage",
    "coverage",
    "data_suffices",
    "fitted_q_evaluation",
    "initial_value_of_critics",
]
