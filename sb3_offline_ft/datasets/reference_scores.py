"""Reference scores: which mean return counts as 0 (random) and which as 100 (expert) on an environment."""

from dataclasses import dataclass

import numpy as np

_V5_SOURCE = (
    "measured on Gymnasium v5 environments (github.com/Karan-Anchan/rlpd-offline-to-online-rl, 2026-07): "
    "a uniformly random policy, and the mean return of Minari's mujoco/*/expert-v0 data; not official"
)
_PENDULUM_SOURCE = (
    "measured by sb3_offline_ft: 50 episodes of a uniformly random policy, "
    "and the rounded mean return of solved SAC and TQC agents (-143 to -154)"
)
_D4RL_SOURCE = "D4RL's constants (d4rl/infos.py), measured on the v2 environments; they do not fit v5 data"


@dataclass(frozen=True)
class ReferenceScores:
    """
    The two mean episode returns that a normalised score is measured between.

    :param random: Mean undiscounted return of a uniformly random policy: normalised score 0
    :param expert: Mean undiscounted return of an expert: normalised score 100
    :param source: Where the two numbers come from; reports print it beside every normalised score
    :raises ValueError: A score is not finite, the two are equal, or the source is empty
    """

    random: float
    expert: float
    source: str

    def __post_init__(self) -> None:
        if not (np.isfinite(self.random) and np.isfinite(self.expert)):
            raise ValueError(f"Reference scores must be finite numbers, found random={self.random}, expert={self.expert}")
        if self.random == self.expert:
            raise ValueError(f"Reference scores must differ, found {self.random} for both random and expert")
        if not self.source.strip():
            raise ValueError("Reference scores need a source: say in a few words where the two numbers come from")

    def normalized(self, score: float) -> float:
        """
        Place a return on the scale from random (0) to expert (100).

        :param score: A mean undiscounted episode return
        :return: ``100 * (score - random) / (expert - random)``; below 0 and above 100 are possible
        """
        return 100.0 * (score - self.random) / (self.expert - self.random)


_MEASURED: dict[str, ReferenceScores] = {
    "Hopper-v5": ReferenceScores(24.8, 3857.8, _V5_SOURCE),
    "Walker2d-v5": ReferenceScores(2.2, 6847.8, _V5_SOURCE),
    "HalfCheetah-v5": ReferenceScores(-261.6, 16242.9, _V5_SOURCE),
    "Humanoid-v5": ReferenceScores(105.6, 8602.9, _V5_SOURCE),
    "Pendulum-v1": ReferenceScores(-1309.0, -150.0, _PENDULUM_SOURCE),
}

# D4RL has one pair for each body, whatever the version of the environment.
_D4RL: dict[str, ReferenceScores] = {
    "Hopper": ReferenceScores(-20.272305, 3234.3, _D4RL_SOURCE),
    "Walker2d": ReferenceScores(1.629008, 4592.3, _D4RL_SOURCE),
    "HalfCheetah": ReferenceScores(-280.178953, 12135.0, _D4RL_SOURCE),
}

SCALES: tuple[str, ...] = ("v5-measured", "d4rl")


def reference_scores_for(env_id: str, scale: str = "v5-measured") -> ReferenceScores | None:
    """
    Look up the reference scores of an environment.

    :param env_id: A Gymnasium id such as ``Hopper-v5``
    :param scale: ``"v5-measured"``: measured on exactly this version of the environment;
        ``"d4rl"``: D4RL's constants for this body, to compare with papers that use them.
        D4RL's are never a fallback for the measured ones
    :return: The scores, or ``None`` if the scale has none for this environment
    :raises ValueError: The scale is unknown
    """
    if scale == "v5-measured":
        return _MEASURED.get(env_id)
    if scale == "d4rl":
        return _D4RL.get(env_id.rpartition("-v")[0] or env_id)
    raise ValueError(f"Unknown scale of reference scores: expected one of {', '.join(SCALES)}, found {scale!r}")


def choose_reference_scores(
    env_id: str | None, given_random: float | None = None, given_expert: float | None = None
) -> ReferenceScores | None:
    """
    Decide which reference scores a dataset gets that gives some itself, such as Minari's ``ref_min_score``.

    The dataset's own scores come first, then the measured ones of its environment, then none. One exception:
    D4RL's constants in the metadata of a dataset whose environment has measured scores give way to those,
    as they were measured on other dynamics; :attr:`OfflineDataset.provenance` keeps what the dataset said.
    """
    measured = None if env_id is None else reference_scores_for(env_id)
    if given_random is None or given_expert is None or given_random == given_expert:
        return measured
    if measured is not None and np.allclose((given_random, given_expert), (measured.random, measured.expert), rtol=1e-6):
        return measured
    d4rl = None if env_id is None else reference_scores_for(env_id, scale="d4rl")
    if d4rl is None or not np.allclose((given_random, given_expert), (d4rl.random, d4rl.expert), rtol=1e-4):
        return ReferenceScores(given_random, given_expert, "given by the dataset")
    return measured or ReferenceScores(given_random, given_expert, "D4RL constants, given by the dataset")
