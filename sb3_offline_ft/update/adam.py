"""Adam on parameters in one piece of memory, with the state where torch's optimizer keeps it."""

import functools
from collections.abc import Sequence
from typing import Any

import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_offline_ft.update.networks import FlatParameters, NotSupportedError


@functools.cache
def _has_fused_adam(device: str) -> bool:
    parameter, gradient, first, second = (th.zeros(1, device=device) for _ in range(4))
    count = th.ones((), device=device)
    settings: dict[str, Any] = {"lr": 0.0, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    try:
        th._fused_adam_([parameter], [gradient], [first], [second], [], [count], amsgrad=False, maximize=False, **settings)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True


_hardshrink = th.ops.aten.hardshrink.out
CLEAR_EVERY = 64
TINY_FIRST, TINY_SECOND = 1e-30, 1e-36
"""Such a first moment moves a parameter by 1e-30 / eps learning rates at most; the root of such a second moment is nothing
beside eps, if that is at least ``LEAST_EPS``."""
LEAST_EPS = 1e-10
STATE_NAMES = {"step", "exp_avg", "exp_avg_sq"}


class FlatAdam:
    """
    The steps of a ``torch.optim.Adam`` (Kingma & Ba 2015) in one operation on all its parameters.

    The moments and step counts are the tensors in ``optimizer.state``, so that saving, loading and torch's own ``step`` go on
    from them. Bias corrections are computed in double precision. While there are hooks on the optimizer, torch's
    own ``step`` is taken.

    :param optimizer: The optimizer
    :param parameters: Its parameters
    :raises NotSupportedError: It is not plain Adam, or has other parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: FlatParameters) -> None:
        problem = self.problem(optimizer)
        if problem is not None:
            raise NotSupportedError(problem)
        if {id(p) for p in optimizer.param_groups[0]["params"]} != {id(p) for p in parameters.parameters}:
            raise NotSupportedError("an optimizer has other parameters than its network")
        self.optimizer = optimizer
        self._parameters = parameters
        self.gradients = parameters.zeros()
        self._gradient_views = parameters.views(self.gradients)
        self._left = False
        self._allocate()

    def _allocate(self) -> None:
        """New memory for the state: somebody may have kept the tensors of the last one."""
        parameters = self._parameters
        self._first, self._second = parameters.zeros(), parameters.zeros()
        # One count for each parameter, since a shared one is counted up for each by torch's own step
        self._steps = th.zeros(len(parameters.parameters), dtype=th.float32, device="cpu")
        parts = zip(self._steps.unbind(), parameters.views(self._first), parameters.views(self._second), strict=True)
        self._views = [dict(zip(("step", "exp_avg", "exp_avg_sq"), part, strict=True)) for part in parts]
        device = parameters.values.device
        self._count = self._steps[0] if device.type == "cpu" else th.zeros((), dtype=th.float32, device=device)
        self._installed = False

    @staticmethod
    def problem(optimizer: th.optim.Optimizer) -> str | None:
        """Why the optimizer's steps cannot be done here, None if they can."""
        if type(optimizer) is not th.optim.Adam:
            return f"the optimizer is {type(optimizer).__name__}, not Adam"
        if "step" in optimizer.__dict__:
            return "the optimizer's `step` has been replaced, for example by a learning rate scheduler"
        if len(optimizer.param_groups) != 1:
            return "the optimizer has several groups of parameters"
        group = optimizer.param_groups[0]
        for name in ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
            if group.get(name):
                return f"the optimizer has `{name}`"
        if group.get("fused") and group["params"][0].device.type != "cpu":
            # It keeps its counts on the device, where the state of torch's other implementations is not
            return "the optimizer has `fused`"
        if isinstance(group["lr"], th.Tensor):
            return "the learning rate is a tensor"
        if not _has_fused_adam(group["params"][0].device.type):
            return f"torch {th.__version__} has no fused Adam for {group['params'][0].device.type}"
        return None

    @staticmethod
    def problem_of_state(optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> str | None:
        """Why the state of an optimizer with these parameters cannot be gone on from here, None if it can."""
        if not optimizer.state:
            return None
        entries = [optimizer.state.get(parameter) for parameter in parameters]
        if any(entry is None or entry.keys() != STATE_NAMES for entry in entries):
            return "the optimizer's state is not that of Adam for all parameters"
        if len({float(entry["step"]) for entry in entries if entry is not None}) != 1:
            return "the optimizer has done different numbers of steps for different parameters"
        return None

    def attach(self) -> None:
        """
        Take up the optimizer's state, which may have been loaded, restored or forgotten since the last step.

        :raises NotSupportedError: It is not a state of plain Adam
        """
        self._show_gradients()
        self._left = False
        state = self.optimizer.state
        if not state:
            if self._installed:
                self._allocate()
            return
        entries = [state.get(parameter) for parameter in self._parameters.parameters]
        if self._installed and all(
            entry is not None
            and entry.get("exp_avg") is view["exp_avg"]
            and entry.get("exp_avg_sq") is view["exp_avg_sq"]
            and entry.get("step") is view["step"]
            for entry, view in zip(entries, self._views, strict=True)
        ):
            if self._count.device.type != "cpu":
                self._count.copy_(self._steps[0])
            return
        problem = self.problem_of_state(self.optimizer, self._parameters.parameters)
        if problem is not None:
            raise NotSupportedError(problem)
        self._allocate()
        for entry, view in zip(entries, self._views, strict=True):
            assert entry is not None
            for name in STATE_NAMES:
                view[name].copy_(th.as_tensor(entry[name]))
        self._count.copy_(self._steps[0])
        self._install()

    def _install(self) -> None:
        for parameter, view in zip(self._parameters.parameters, self._views, strict=True):
            self.optimizer.state[parameter] = dict(view)
        self._installed = True

    def _show_gradients(self) -> None:
        """Let the parameters' ``grad`` be what :meth:`step` uses."""
        for parameter, gradient in zip(self._parameters.parameters, self._gradient_views, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient

    @property
    def _has_hooks(self) -> bool:
        optimizer: Any = self.optimizer
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    def _comes_back(self) -> bool:
        """Whether the state is here again, after a step that was not taken here."""
        try:
            self.attach()
        except NotSupportedError:
            self._left = True
        return not self._left

    @th.no_grad()
    def step(self) -> None:
        """One step with the present gradients."""
        if self._has_hooks or (self._left and not self._comes_back()):
            # Hooks may do anything to parameters, gradients and state: torch's own step, and then a look at what they did
            self.optimizer.step()
            self._parameters.gather()
            self._show_gradients()
            self._left = True
            return
        if not self._installed:
            self._install()
        group = self.optimizer.param_groups[0]
        self._steps += 1
        if self._count.device.type != "cpu":
            self._count += 1
        th._fused_adam_(
            [self._parameters.values],
            [self.gradients],
            [self._first],
            [self._second],
            [],
            [self._count],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if self._count.device.type == "cpu" and self._count.item() % CLEAR_EVERY == 0:
            self._clear_tiny(group["eps"])

    def _clear_tiny(self, eps: float) -> None:
        """
        Set moments to 0 that are too small to have an effect, before they become subnormal numbers.

        Units that are never active have gradients of 0, so their moments fade; and CPUs take many times as long for subnormal
        numbers.
        """
        _hardshrink(self._first, TINY_FIRST, out=self._first)
        if eps >= LEAST_EPS:
            _hardshrink(self._second, TINY_SECOND, out=self._second)
