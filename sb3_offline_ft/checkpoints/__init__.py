"""Runs that go on where they were when they died."""

from sb3_offline_ft.checkpoints.checkpoint_run import CheckpointRun
from sb3_offline_ft.checkpoints.folder import has_checkpoint
from sb3_offline_ft.checkpoints.resuming import resume

__all__ = ["CheckpointRun", "has_checkpoint", "resume"]
