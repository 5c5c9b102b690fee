"""What tuning searches besides what all algorithms have."""

from sb3_offline_ft.common.search_space import choice, real

SEARCH_SPACE = {
    "online_actor_bc": real(0.05, 2.0, log=True),
    "online_actor_bc_schedule": choice("constant", "linear", "geometric"),
    "online_critic_bc": real(0.0, 1.0),
}
