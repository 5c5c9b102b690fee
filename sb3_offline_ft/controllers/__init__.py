"""Whatever decides actions, as one kind of object: saved policies, runs of rl-zoo3, ONNX files and functions."""

from sb3_offline_ft.controllers.controller import Controller, check_fits
from sb3_offline_ft.controllers.loading import load_controller

__all__ = ["Controller", "check_fits", "load_controller"]
