"""Which policy acts in which episode: permuted blocks, so that baseline and candidate alternate in random order."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sb3_offline_ft.trial.plan import Blocks, Stage, TrialPlan, kind_of

Arm = Literal["baseline", "candidate"]
BASELINE: Arm = "baseline"
CANDIDATE: Arm = "candidate"


@dataclass(frozen=True)
class Assignment:
    """
    Which policy acts in an episode.

    :param episode: Number of the episode, from 0
    :param stage: Name of its stage
    :param arm: ``baseline`` or ``candidate``
    :param share: Probability that the candidate got the episode, given all that was known before
    :param block: Number of its block in the trial, None where nothing is compared
    :param slot: Its place in the stage; None for an episode besides those of the stage, such as one in which the candidate had
        to wait
    :param why: The reason, in words
    """

    episode: int
    stage: str
    arm: Arm
    share: float
    block: int | None
    slot: int | None
    why: str

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return kind_of(self.stage)

    @property
    def is_drill(self) -> bool:
        """Whether it is a rollback drill."""
        return self.arm == CANDIDATE and self.slot is None

    def as_event(self) -> dict[str, Any]:
        """The fields of an ``assignment`` in the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Slot:
    """
    A place in a stage.

    :param arm: Who is to act
    :param share: Candidates left in the block / episodes left in it
    :param block: Number of the block in the trial, None where nothing is compared
    :param position: Place in the block, from 0
    :param size: Episodes of the block
    """

    arm: Arm
    share: float
    block: int | None = None
    position: int = 0
    size: int = 1


def block_sizes(stage: Stage, blocks: Blocks) -> list[int]:
    """Episodes of each block of a stage; each block has room for both policies, the last takes what is left over."""
    rarer = min(stage.share, 1 - stage.share)
    size = max(blocks.episodes, math.ceil(1 / rarer - 1e-9))
    count = max(1, stage.episodes // size)
    return [size] * (count - 1) + [stage.episodes - size * (count - 1)]


def schedule(plan: TrialPlan, stage: int) -> list[Slot]:
    """
    :param plan: The plan
    :param stage: Index of a stage
    :return: Who is to act in each of its episodes. The candidate gets its share of the stage, rounded, and at least one
        episode of each block; the order within a block is drawn
    """
    chosen = plan.stages[stage]
    if not chosen.compares:
        return [Slot(CANDIDATE if chosen.kind == "full" else BASELINE, chosen.share)] * chosen.episodes
    first = sum(len(block_sizes(one, plan.blocks)) for one in plan.stages[:stage] if one.compares)
    slots, done, given = list[Slot](), 0, 0
    for index, size in enumerate(block_sizes(chosen, plan.blocks)):
        done += size
        left = math.floor(chosen.share * done + 0.5) - given
        given += left
        is_candidate = np.arange(size) < left
        np.random.default_rng([plan.seed, stage, index]).shuffle(is_candidate)
        for position, one in enumerate(is_candidate):
            arm = CANDIDATE if one else BASELINE
            slots.append(Slot(arm, left / (size - position), first + index, position, size))
            left -= int(one)
    return slots
