"""What rl_zoo3's ``push_to_hub`` and ``load_from_hub`` need to work, and to tell of our algorithms' runs."""

import json
import runpy
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import sb3_offline_ft.zoo

PUSH, LOAD = "rl_zoo3.push_to_hub", "rl_zoo3.load_from_hub"
TAGS = ("sb3_offline_ft", "offline-reinforcement-learning", "offline-to-online")

_OURS = "replaced_by_sb3_offline_ft"

MetadataSave = Callable[[str | Path, dict[str, Any]], None]


def prepare(command: str) -> None:
    """
    Mend what a command of rl_zoo3 needs; to be called before its module is run, and any number of times.

    :param command: Full name of the command's module
    """
    if command == PUSH:
        integration = import_module("huggingface_sb3.push_to_hub")
        if not hasattr(integration, "generate_metadata"):
            # rl_zoo3 2.9 imports a name that sb3-team-hf-integration 3.2 has not
            setattr(integration, "generate_metadata", lambda *facts: integration._generate_metadata(*facts).to_dict())  # noqa: B010
        repocard = import_module("huggingface_hub.repocard")
        _replace(repocard, "metadata_save", _with_own_card)
    elif command == LOAD:
        _replace(import_module("huggingface_sb3"), "load_from_hub", _naming_missing_files_as_before)


def run(command: str) -> None:
    """Run a command of rl_zoo3, prepared, with this process's command line."""
    sb3_offline_ft.zoo.register()
    prepare(command)
    runpy.run_module(command, run_name="__main__", alter_sys=True)


def _replace(module: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    function = getattr(module, name)
    if not hasattr(function, _OURS):
        replaced = wraps(function)(wrapper(function))
        setattr(replaced, _OURS, True)
        setattr(module, name, replaced)


def _naming_missing_files_as_before(load: Callable[[str, str], str]) -> Callable[[str, str], str]:
    def load_from_hub(repo_id: str, filename: str) -> str:
        from huggingface_hub.errors import EntryNotFoundError
        from requests.exceptions import HTTPError

        try:
            return load(repo_id, filename)
        except EntryNotFoundError as error:
            # By which rl_zoo3 knows that there are no statistics of VecNormalize; huggingface_hub 1 raises another one
            raise HTTPError(str(error)) from error

    return load_from_hub


def _with_own_card(save: MetadataSave) -> MetadataSave:
    def metadata_save(local_path: str | Path, data: dict[str, Any]) -> None:
        pushed = _pushed()
        if pushed is not None:
            # After the run's command has been read
            from sb3_offline_ft.zoo.model_card import model_card

            results = json.loads(Path(local_path).with_name("results.json").read_text())
            Path(local_path).write_text(model_card(results=results, **pushed), encoding="utf-8")
            data = {**data, "tags": list(dict.fromkeys([*data.get("tags", ()), *TAGS]))}
        save(local_path, data)

    return metadata_save


def _pushed() -> dict[str, Any] | None:
    """What the command that is running pushes, if it is a run of ours."""
    from rl_zoo3.utils import ALGOS

    from sb3_offline_ft.offline_td3 import OfflineTD3

    # rl_zoo3 runs its command in the module itself, not in a function
    known = vars(sys.modules["__main__"])
    if not issubclass(ALGOS.get(known.get("algo", ""), object), OfflineTD3):
        return None
    return {
        "folder": Path(known["log_path"]),
        "model_file": Path(known["model_path"]),
        "algo": known["algo"],
        "environment": known["env_name"].gym_id,
        "repository": str(known["repo_id"]),
    }
