"""What runs lacked of what their methods' names promise, as their manifests say."""

from collections.abc import Mapping
from typing import Any

from sb3_offline_ft.pages.words import counted, some

FEW = 0.75
"""Batches with less than this share of distinct rows repeat a few transitions."""
NEEDED = ("interactions", "updates", "replay_buffer", "learner_evaluation_steps")
NOT_OF_COMMANDS = ("replay_buffer",)


def shortcomings(runs: Mapping[str, Mapping[str, Any]], interactions: int) -> list[str]:
    """
    Say what runs lacked, by their names and manifests; those of policies that do not change say ``frozen``, and are left out.
    """
    learning = {name: facts for name, facts in runs.items() if not facts.get("frozen")}
    found: dict[str, list[str]] = {}

    def note(what: str, name: str, numbers: str = "") -> None:
        found.setdefault(what, []).append(f"{name} ({numbers})" if numbers else name)

    for name, facts in learning.items():
        unknown = NOT_OF_COMMANDS if facts.get("external") else ()
        if missing := [fact for fact in NEEDED if fact not in facts and fact not in unknown]:
            note("did not record all that they were", name, some(missing))
        done, updates = facts.get("interactions", interactions), facts.get("updates")
        if done < interactions:
            note(
                f"ended before {counted(interactions, 'interaction')}, so that the curves of their methods end there, and "
                "their last evaluations are compared with later ones of others",
                name,
                f"{done:,}",
            )
        if updates is not None and updates["online"] <= 0:
            note("had no update after the first interaction", name)
        memory = facts.get("replay_buffer")
        if memory is None:
            continue
        if memory["capacity"] < done:
            note("had a replay buffer that is smaller than the run", name, f"{memory['capacity']:,} of {done:,}")
        batch = memory.get("batch") or {"rows": 0, "distinct_rows": 0}
        if batch["distinct_rows"] <= FEW * batch["rows"]:
            note("drew batches of few distinct rows", name, f"{batch['distinct_rows']} of {batch['rows']}")
    n = counted(len(learning), "learning run")
    return [f"{len(names)} of {n} {what}: {some(names)}." for what, names in found.items()]
