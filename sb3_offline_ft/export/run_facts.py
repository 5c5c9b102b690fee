"""What lies beside a model: the settings and events of the run that it is of."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sb3_offline_ft.collapse.events import EVENTS_FILE, read_events
from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.controllers.saved_policy import CHAMPION, settings_folder
from sb3_offline_ft.datasets import without_trust
from sb3_offline_ft.datasets.files.zoo import ARGUMENTS, read_zoo_yaml, saved_hyperparams
from sb3_offline_ft.deployment.champion_challenger import BEST_MODEL
from sb3_offline_ft.deployment.history import History

MANIFEST = "manifest.json"
GUARD_SETTINGS = ("detector", "false_alarm_rate", "horizon_episodes", "tolerance", "random_return", "secondary_alarms")
GUARD_BASELINE = ("mean", "sd", "n", "threshold")
CHAMPION_BASELINE = ("mean", "standard_error", "low", "high", "n", "random_return", "worst_return")


@dataclass(frozen=True)
class RunFacts:
    """
    What a run tells of its model.

    :param env_id: Gymnasium id of the environment, if known
    :param env_kwargs: Arguments of the environment
    :param manifest_sha256: Of the run's ``manifest.json``, if there is one
    :param guard: Limits of a ``CollapseGuard``, if the run had one
    :param champion: Baseline and champion of a ``ChampionChallenger``, if the model is the champion
    """

    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    manifest_sha256: str | None = None
    guard: dict[str, Any] | None = None
    champion: dict[str, Any] | None = None

    @classmethod
    def beside(cls, model: Path) -> "RunFacts":
        """
        :param model: A model's zip file
        :raises ValueError: A file of the run is damaged
        """
        folder, settings = model.parent, settings_folder(model)
        env_id, env_kwargs = (None, {}) if settings is None else _environment(settings)
        manifest = folder / MANIFEST
        sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
        # The learner's last policy is another one
        champion = _champion(folder) if model.name in (BEST_MODEL, CHAMPION) else None
        return cls(env_id, env_kwargs, sha256, _guard(folder), champion)


def dataset_of(model: Path) -> str | None:
    """The spec of the dataset that a model was trained on, if its file names one."""
    with naming_damage(f"The model {str(model)!r}", "a zip file saved by a Stable-Baselines3 algorithm"):
        with zipfile.ZipFile(model) as archive:
            # SB3 writes texts as they are
            spec = json.loads(archive.read("data")).get("dataset")
    # A file cannot consent to unpickling
    return without_trust(spec) if isinstance(spec, str) else None


def _environment(settings: Path) -> tuple[str, dict[str, Any]]:
    hyperparams, _ = saved_hyperparams(settings)
    kwargs, env_id = hyperparams.get("env_kwargs") or {}, settings.name
    if (settings / ARGUMENTS).is_file():
        arguments = read_zoo_yaml(settings / ARGUMENTS, needed=("env", "env_kwargs"))
        env_id = str(arguments.get("env") or env_id)
        kwargs = arguments.get("env_kwargs") or kwargs
    with naming_damage(settings, "the settings of a run of rl-zoo3"):
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"its env_kwargs are {kwargs!r}, expected a mapping")
        return env_id, dict(kwargs)


def _guard(folder: Path) -> dict[str, Any] | None:
    path = folder / EVENTS_FILE
    events = read_events(path) if path.is_file() else []
    starts, baselines = ([event for event in events if event["event"] == kind] for kind in ("start", "baseline"))
    if not starts:
        return None
    with naming_damage(path, "the events of a CollapseGuard"):
        settings = {**starts[-1], **starts[-1].get("settings", {})}
        facts: dict[str, Any] = {name: settings.get(name) for name in GUARD_SETTINGS}
        if not baselines:
            return facts | {"baseline": None, "least_mean_return": None}
        baseline = {name: baselines[-1].get(name) for name in GUARD_BASELINE}
        # The tolerance is a share of the distance to a random policy
        tolerated = facts["tolerance"] * (baseline["mean"] - facts["random_return"])
    return facts | {"baseline": baseline, "least_mean_return": baseline["mean"] - tolerated}


def _champion(folder: Path) -> dict[str, Any] | None:
    history = History.read(folder)
    if history is None or not history.reigns:
        return None
    since, champion = history.reigns[-1]
    baseline = history.baseline
    return {
        "baseline": None if baseline is None else {name: baseline.get(name) for name in CHAMPION_BASELINE},
        "learned_until_step": champion.name,
        "champion_since_step": since,
        "mean_return": sum(champion.returns) / len(champion.returns) if champion.returns else None,
        "episodes": len(champion.returns),
        "risk_budget": history.settings.get("risk_budget"),
    }
