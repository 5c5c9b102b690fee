"""What every algorithm of the family promises, checked clause by clause."""

from collections.abc import Collection
from typing import Any

from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.testing import monitoring, saving, spaces, training
from sb3_offline_ft.testing.clause import Clause, require_algorithm

__all__ = ["CLAUSES", "check_algorithm"]

CLAUSES: dict[str, Clause] = {
    name.removeprefix("check_"): check
    for module in (spaces, training, saving, monitoring)
    for name, check in vars(module).items()
    if name.startswith("check_")
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
