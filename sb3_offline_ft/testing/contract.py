"""What every algorithm of the family promises, checked clause by clause."""

from collections.abc import Collection
from typing import Any

from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.testing import monitoring, saving, spaces, training
from sb3_offline_ft.testing.clause import Clause, require_algorithm

__all__ = ["CLAUSES", "check_algorithm"]

CLAUSES: dict[str, Clause] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        spaces.check_observation_spaces,
        spaces.check_observation_spaces_with_data,
        spaces.check_observations_that_data_cannot_hold,
        spaces.check_wrong_data,
        spaces.check_action_spaces,
        spaces.check_unsupported_action_spaces,
        spaces.check_predict,
        training.check_same_seed_same_result,
        training.check_set_random_seed,
        training.check_phases,
        training.check_without_data,
        training.check_offline_fraction,
        training.check_targets,
        training.check_n_step_returns,
        training.check_several_environments,
        training.check_vec_normalize,
        training.check_combinations,
        training.check_rollouts,
        training.check_action_noise,
        training.check_learning_rate_schedules,
        training.check_kernels_agree,
        training.check_make_vec_env,
        saving.check_save_load,
        saving.check_resumed_pretraining,
        saving.check_resumed_finetuning,
        saving.check_files_hold_no_data,
        saving.check_dataset_is_found_again,
        saving.check_exchange,
        saving.check_parameters,
        saving.check_copies,
        saving.check_snapshot,
        monitoring.check_callbacks,
        monitoring.check_stopping,
        monitoring.check_collapse_guard,
        monitoring.check_logs,
        monitoring.check_progress_bars,
    )
}
"""The clauses by name, in the order in which they are checked."""


def check_algorithm(algorithm: type[OfflineTD3], *, skip: Collection[str] = (), **settings: Any) -> None:
    """
    Check all clauses of the contract: that an algorithm takes the spaces, saves, resumes, repeats itself, logs and is called
    back as :class:`~sb3_offline_ft.OfflineTD3` and SB3's ``TD3`` are.

    It trains many small networks for a few steps each, on the CPU. The global random generators are seeded by it.

    :param algorithm: The class, ``OfflineTD3`` or a subclass
    :param skip: Names of clauses (see ``CLAUSES``) that are not meant for it
    :param settings: Arguments of its constructor for all clauses; where a clause needs another value, the clause prevails
    :raises TypeError: It is no subclass of ``OfflineTD3``
    :raises ValueError: ``skip`` has a name that is no clause
    :raises ExceptionGroup: Clauses are broken: one error for each, with a note that names the clause
    """
    require_algorithm(algorithm)
    if unknown := sorted(set(skip) - CLAUSES.keys()):
        raise ValueError(f"`skip` has {', '.join(unknown)}: the clauses are {', '.join(CLAUSES)}.")
    broken: dict[str, Exception] = {}
    for name, check in CLAUSES.items():
        if name in skip:
            continue
        try:
            check(algorithm, **settings)
        except Exception as error:
            error.add_note(f"This is about the clause {name!r} of the contract.")
            broken[name] = error
    if broken:
        summary = f"{algorithm.__name__} breaks {len(broken)} of {len(CLAUSES) - len(set(skip))} clauses: {', '.join(broken)}"
        raise ExceptionGroup(summary, list(broken.values()))
