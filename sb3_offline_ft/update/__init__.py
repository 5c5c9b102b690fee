"""How gradient steps are computed: one interface, a path by autograd for any network and a fast one for MLPs."""

from sb3_offline_ft.update.autograd import AutogradKernel
from sb3_offline_ft.update.fast import FastKernel
from sb3_offline_ft.update.kernel import ActorObjective, Attraction, Batch, UpdateKernel
from sb3_offline_ft.update.networks import NotSupportedError

__all__ = ["ActorObjective", "Attraction", "AutogradKernel", "Batch", "FastKernel", "NotSupportedError", "UpdateKernel"]
