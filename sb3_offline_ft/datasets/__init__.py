"""Offline data: what a spec names, the columns it becomes, and whether they fit an environment."""

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.parts import DatasetPart
from sb3_offline_ft.datasets.reference_scores import ReferenceScores, reference_scores_for
from sb3_offline_ft.datasets.sources import check_spec, load_dataset, spec_text, without_trust
from sb3_offline_ft.datasets.spaces import check_spaces_supported
from sb3_offline_ft.datasets.specs import BUNDLED, DatasetSpec
from sb3_offline_ft.datasets.validation import (
    as_flattened_by,
    check_compatible,
    clip_actions,
    fit_to_space,
    scale_actions,
)

__all__ = [
    "BUNDLED",
    "DatasetPart",
    "DatasetSpec",
    "OfflineDataset",
    "ReferenceScores",
    "as_flattened_by",
    "check_compatible",
    "check_spaces_supported",
    "check_spec",
    "clip_actions",
    "fit_to_space",
    "load_dataset",
    "reference_scores_for",
    "scale_actions",
    "spec_text",
    "without_trust",
]
