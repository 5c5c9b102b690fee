"""The learner's own opinion of its policy."""

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_offline_ft.common.observations import map_observations, take_rows
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData, Policy, PolicyActions


@th.no_grad()
def initial_value_of_critics(policy: Policy, data: LoggedData, actions: PolicyActions | None = None) -> float | None:
    """
    Mean over the logged initial states of the value that a learner's critics give to its own action, averaged over critics.

    These critics were trained to choose actions: where the policy leaves the data, it does so because they think too highly of
    what is there. SAC's value its entropy as well. Reward scaling by ``VecNormalize`` is not undone.

    :param policy: An SB3 algorithm with critics of state and action, such as TD3, SAC, TQC or this package's
    :param data: The data
    :param actions: What :meth:`LoggedData.actions_of` said, to save time
    :return: The value, discounted by the learner's own ``gamma``; None if it has no such critics
    """
    critic = getattr(policy.policy, "critic", None) if isinstance(policy, BaseAlgorithm) else None
    if not isinstance(critic, th.nn.Module):
        return None
    assert isinstance(policy, BaseAlgorithm)
    starts = data.dataset.episode_starts
    actions = data.actions_of(policy) if actions is None else actions
    observations = map_observations(
        lambda rows: th.as_tensor(rows, device=policy.device), take_rows(data.dataset.observations, starts)
    )
    policy.policy.set_training_mode(False)
    values = critic(observations, th.as_tensor(actions.now[starts], device=policy.device))
    # SB3's critics give a tuple, TQC's a tensor of quantiles
    values = th.cat(values, dim=1) if isinstance(values, tuple) else values.flatten(1)
    return float(np.mean(values.cpu().numpy(), dtype=np.float64))
