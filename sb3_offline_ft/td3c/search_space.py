"""What tuning searches besides what all algorithms have."""

from sb3_offline_ft.common.search_space import choice, real

SEARCH_SPACE = {
    "constraint_reference": choice("best", "pretrained", "target"),
    "epsilon": real(1e-4, 0.1, log=True),
    "epsilon_end_factor": real(0.1, 10.0, log=True),
    "multiplier_learning_rate": real(1e-3, 0.1, log=True),
}
