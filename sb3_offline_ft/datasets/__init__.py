"""Offline data: what a spec names, the columns it becomes, and whether they fit an environment."""

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.reference_scores import ReferenceScores, reference_scores_for
from sb3_offline_ft.datasets.sources import BUNDLED, check_spec, load_dataset
from sb3_offline_ft.datasets.validation import check_compatible, scale_actions

__all__ = [
    "BUNDLED",
    "OfflineDataset",
    "ReferenceScores",
    "check_compatible",
    "check_spec",
    "load_dataset",
    "reference_scores_for",
    "scale_actions",
]
