"""From what a user writes to a controller."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from sb3_offline_ft.common.functions import load_function
from sb3_offline_ft.common.suggestions import nearest
from sb3_offline_ft.controllers.controller import Controller, FunctionController, RandomController, ZeroController

WITHOUT_FILE: dict[str, Callable[[spaces.Space[Any]], Controller]] = {"zero": ZeroController, "random": RandomController}


def load_controller(
    spec: str,
    env_id: str | None = None,
    *,
    action_space: spaces.Space[Any] | None = None,
    device: str = "cpu",
    safe_load: bool = False,
) -> Controller:
    """
    :param spec: A zip file of SB3, sb3-contrib or this package; a run's folder of rl-zoo3, of which the best model is taken,
        with its ``VecNormalize``; a file ``*.onnx``; ``module:function``, where the module may lie in the working directory;
        ``zero`` or ``random``. Modules are imported, and settings of saved policies unpickled unless
        ``safe_load`` is set: name only what you trust
    :param env_id: Gymnasium id of the environment
    :param action_space: Actions of ``zero`` and ``random``; those of the environment if omitted
    :param device: Torch device of a policy
    :param safe_load: Whether nothing of a saved policy may be unpickled (see :func:`sb3_offline_ft.safe_load`)
    :return: The controller
    :raises FileNotFoundError: There is no such file
    :raises ValueError: The file is damaged, or it is not known what is meant
    :raises ImportError: onnxruntime is needed and not installed
    """
    if spec in WITHOUT_FILE:
        return WITHOUT_FILE[spec](_action_space(spec, env_id) if action_space is None else action_space)
    path = Path(spec).expanduser()
    if path.suffix == ".onnx":
        from sb3_offline_ft.controllers.onnx_file import OnnxController

        return OnnxController(spec, path)
    from sb3_offline_ft.controllers.saved_policy import PolicyController, policy_file

    if path.is_dir():
        path = policy_file(path)
    elif path.with_name(f"{path.name}.zip").is_file():
        path = path.with_name(f"{path.name}.zip")
    if path.suffix == ".zip":
        return PolicyController(spec, path, device, safe_load)
    if ":" in spec and not path.exists():
        function = load_function(spec, "controller")
        return FunctionController(spec, _constructed(spec, function) if isinstance(function, type) else function)
    meant = "".join(f" Did you mean {name!r}?" for name in nearest(spec, WITHOUT_FILE))
    raise ValueError(
        f"{spec!r} is no controller: expected a .zip that an algorithm saved, a run's folder of rl-zoo3, a .onnx file, "
        f"module:function, 'zero' or 'random'.{meant}"
    )


def _constructed(spec: str, of_class: Callable[[], Any]) -> Any:
    try:
        return of_class()
    except Exception as error:
        raise ValueError(f"The controller {spec!r} cannot be constructed ({type(error).__name__}: {error}).") from error


def _action_space(spec: str, env_id: str | None) -> spaces.Space[Any]:
    if env_id is None:
        raise ValueError(f"The controller {spec!r} needs an environment, whose actions it takes.")
    env = gym.make(env_id)
    env.close()
    return env.action_space
