"""From a checkpoint to a learner whose next call of ``learn`` or ``pretrain`` goes on where that was."""

import inspect
from pathlib import Path
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from sb3_offline_ft.checkpoints.arguments import class_named, made_again
from sb3_offline_ft.checkpoints.callbacks import all_callbacks, load_callbacks
from sb3_offline_ft.checkpoints.checkpoint_run import CheckpointRun
from sb3_offline_ft.checkpoints.environments import load_vec_env
from sb3_offline_ft.checkpoints.folder import Checkpoint, CheckpointFolder
from sb3_offline_ft.checkpoints.learner import load_model
from sb3_offline_ft.checkpoints.outputs import load_values, open_logger
from sb3_offline_ft.common.callbacks import as_list
from sb3_offline_ft.common.warning import warn


def resume(
    folder: str | Path, env: GymEnv, algorithm: type[OffPolicyAlgorithm] | None = None, **arguments: Any
) -> OffPolicyAlgorithm:
    """
    Make the learner of a run that has died, from the newest checkpoint of :class:`CheckpointRun` that is intact.

    Its next call of ``learn`` (or ``pretrain``) goes on where the checkpoint was, and does what the call that died would have
    done, to the bit on one machine. Give it the same arguments and callbacks: a script stays as it is but for the line that
    makes the learner. A ``pretrain`` that was complete returns at once.

    :param folder: The run's folder, in which ``checkpoints`` is
    :param env: The environment, made as it was made for the run. A ``Monitor`` that keeps a file needs
        ``override_existing=False``
    :param algorithm: The learner's class, if it is neither of SB3, sb3-contrib nor this package
    :param arguments: Arguments of its constructor that a checkpoint cannot hold, such as a function for ``learning_rate``
    :return: The learner
    :raises ValueError: There is no intact checkpoint, or it is another version's, or the environment is another one, or
        arguments are missing
    """
    checkpoints = CheckpointFolder(Path(folder))
    checkpoint = checkpoints.newest()
    saved = class_named(*checkpoint.facts["algorithm"]) if algorithm is None else algorithm
    if [saved.__module__, saved.__qualname__] != checkpoint.facts["algorithm"]:
        raise ValueError(
            f"{checkpoint.path} is of {checkpoint.facts['algorithm'][1]}, expected {saved.__name__}: resume it with its own "
            "class."
        )
    missing = [name for name in checkpoint.facts["not_held"] if name not in arguments]
    if missing:
        words = ", ".join(f"{name}=..." for name in missing)
        raise ValueError(
            f"{checkpoint.path} cannot hold what the run had as {', '.join(missing)}: give it again, `resume(..., {words})`."
        )
    kept = {name: made_again(value) for name, value in checkpoint.state["arguments"].items()}
    model: OffPolicyAlgorithm = saved(env=env, **kept | arguments)
    go_on_with(model, checkpoints, checkpoint)
    return model


def go_on_with(model: OffPolicyAlgorithm, checkpoints: CheckpointFolder, checkpoint: Checkpoint) -> None:
    """Let the next call of ``learn`` or ``pretrain`` of a learner that was made as the run's was go on with a checkpoint."""
    found = [type(model).__module__, type(model).__qualname__]
    if found != checkpoint.facts["algorithm"]:
        raise ValueError(f"{checkpoint.path} is of {checkpoint.facts['algorithm'][1]}, and the learner is a {found[1]}.")
    own = type(model)
    entry = _Entry(checkpoints, checkpoint)

    def learn(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__class__ = own
        return entry.learn(self, inspect.signature(own.learn).bind(self, *args, **kwargs))

    def pretrain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if checkpoint.facts["call"]["method"] == "learn":
            # It was complete
            return self
        self.__class__ = own
        return entry.pretrain(self, inspect.signature(own.pretrain).bind(self, *args, **kwargs))  # type: ignore[attr-defined]

    methods: dict[str, Any] = {"learn": learn, "__module__": own.__module__, "__qualname__": own.__qualname__}
    if hasattr(own, "pretrain"):
        methods["pretrain"] = pretrain
    # The class of this learner alone: attributes would be saved with it
    model.__class__ = type(own.__name__, (own,), methods)


class _Entry:
    """The way from a checkpoint into a call that goes on with it."""

    def __init__(self, checkpoints: CheckpointFolder, checkpoint: Checkpoint) -> None:
        self._checkpoints, self._checkpoint = checkpoints, checkpoint
        self._call: dict[str, Any] = checkpoint.facts["call"]
        self._is_offline: bool = checkpoint.facts["is_pretraining"]

    def learn(self, model: OffPolicyAlgorithm, given: inspect.BoundArguments) -> Any:
        given.apply_defaults()
        arguments = given.arguments
        if self._call["method"] != "learn":
            raise ValueError(f"{self._checkpoint.path} was written in `pretrain`: call that first, as the run did.")
        begun_at = 0 if arguments["reset_num_timesteps"] else self._call["begun_at"]
        if arguments["total_timesteps"] + begun_at != self._call["total_timesteps"]:
            raise ValueError(
                f"The run was to have {self._call['total_timesteps'] - begun_at} steps, and `total_timesteps` is "
                f"{arguments['total_timesteps']}: give the same, since schedules depend on it. For more, go on when it is "
                "done."
            )
        self._prepare(model, arguments)
        if not self._is_offline:
            arguments["total_timesteps"] = self._call["total_timesteps"] - model.num_timesteps
            arguments["reset_num_timesteps"] = False
        return type(model).learn(*given.args, **given.kwargs)

    def pretrain(self, model: Any, given: inspect.BoundArguments) -> Any:
        given.apply_defaults()
        self._prepare(model, given.arguments)
        given.arguments["gradient_steps"] = self._call["total_timesteps"] - model.offline_steps_done
        return type(model).pretrain(*given.args, **given.kwargs)

    def _prepare(self, model: Any, arguments: dict[str, Any]) -> None:
        """Bring learner, callbacks and files so far that the call comes to the place of the checkpoint."""
        state = self._checkpoint.state
        if hasattr(model, "load_offline_data"):
            model.load_offline_data()
            self._check_data(model)
        callbacks = as_list(arguments["callback"])
        run = next((each for each in all_callbacks(callbacks) if isinstance(each, CheckpointRun)), None)
        if run is None:
            run = CheckpointRun(**self._checkpoint.facts["settings"])
            callbacks.append(run)
        arguments["callback"] = callbacks
        self._checkpoints.ring.read(self._checkpoint.facts["buffer"], model.replay_buffer)
        load_model(model, state["model"])
        if self._is_offline:
            # While pretraining it counts gradient steps
            model.num_timesteps = state["model"]["own"]["environment_steps"]
        load_callbacks(callbacks, state["callbacks"])
        had_logger = model._custom_logger
        model.set_logger(open_logger(state["logger"]))

        def restore() -> None:
            model._custom_logger = had_logger
            load_values(model.logger, state["logger"])
            goes_on = load_vec_env(model.env, state["environments"])
            load_model(model, state["model"])
            if not goes_on:
                self._begin_episodes(model, callbacks)

        run.go_on(self._checkpoints, dict(self._call), restore)

    def _check_data(self, model: Any) -> None:
        expected = self._checkpoint.facts["dataset_fingerprint"]
        if model.dataset_fingerprint != expected:
            raise ValueError(
                f"The dataset is not the one that the run had: its fingerprint is {str(model.dataset_fingerprint)[:12]}, "
                f"expected {str(expected)[:12]}. Give the same data as `dataset=...`, or start the run again."
            )

    @staticmethod
    def _begin_episodes(model: Any, callbacks: list[Any]) -> None:
        """The environments have no state: begin episodes in place of those that ran."""
        if model._last_obs is None:
            return
        warn("The state of the environment could not be saved: the run goes on at the start of an episode, not to the bit.")
        model._last_obs = model.env.reset()
        model._last_episode_starts[:] = True
        if model._vec_normalize_env is not None:
            model._last_original_obs = model._vec_normalize_env.get_original_obs()
        if model.action_noise is not None:
            model.action_noise.reset()
        for each in (model, model.replay_buffer, *all_callbacks(callbacks)):
            if hasattr(each, "episodes_are_cut"):
                each.episodes_are_cut()
