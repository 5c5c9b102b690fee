"""What came of a run, and what of many: metrics, estimates with their uncertainty, tests."""

from sb3_offline_ft.evaluation.comparisons import (
    PairedComparison,
    RateComparison,
    compare_paired,
    compare_paired_rates,
    compare_rates,
    holm,
)
from sb3_offline_ft.evaluation.finetuning_metrics import (
    DipNoiseFloor,
    FinetuningMetrics,
    collapse_threshold,
    dip_noise_floor,
    finetuning_metrics,
)
from sb3_offline_ft.evaluation.run_summary import RunSummary, summarize_run
from sb3_offline_ft.evaluation.served import (
    ActedEpisodes,
    Losses,
    ServedMetrics,
    acted_episodes,
    served_metrics,
    shortfall,
)
from sb3_offline_ft.evaluation.statistics import (
    Band,
    Estimate,
    aggregate,
    curve_band,
    performance_profile,
    probability_of_improvement,
    rate,
)

__all__ = [
    "ActedEpisodes",
    "Band",
    "DipNoiseFloor",
    "Estimate",
    "FinetuningMetrics",
    "Losses",
    "PairedComparison",
    "RateComparison",
    "RunSummary",
    "ServedMetrics",
    "acted_episodes",
    "aggregate",
    "collapse_threshold",
    "compare_paired",
    "compare_paired_rates",
    "compare_rates",
    "curve_band",
    "dip_noise_floor",
    "finetuning_metrics",
    "holm",
    "performance_profile",
    "probability_of_improvement",
    "rate",
    "served_metrics",
    "shortfall",
    "summarize_run",
]
