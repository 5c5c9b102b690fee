"""How gradient steps are computed: one interface, a path by autograd for any network and a fast one for MLPs."""

from sb3_offline_ft.common.update.autograd import AutogradKernel
from sb3_offline_ft.common.update.fast import FastKernel
from sb3_offline_ft.common.update.kernel import ActorObjective, Attraction, Batch, UpdateKernel
from sb3_offline_ft.common.update.networks import NotSupportedError

__all__ = ["ActorObjective", "Attraction", "AutogradKernel", "Batch", "FastKernel", "NotSupportedError", "UpdateKernel"]
