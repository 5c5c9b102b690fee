"""What came of a run."""

from sb3_offline_ft.evaluation.run_summary import RunSummary, summarize_run

__all__ = ["RunSummary", "summarize_run"]
