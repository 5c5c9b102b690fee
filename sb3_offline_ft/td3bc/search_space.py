"""What tuning searches besides what all algorithms have."""

from sb3_offline_ft.common.search_space import choice, real

SEARCH_SPACE = {
    "online_bc": real(0.01, 3.0, log=True),
    "online_bc_schedule": choice("constant", "linear", "geometric"),
}
