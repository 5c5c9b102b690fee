"""rl_zoo3's ``ExperimentManager`` for any algorithm, with a manifest and a trace in the run's folder."""

from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.datasets import without_trust
from sb3_offline_ft.zoo.manifest import RunRecord, config_source

PARAMETERS = "command line (-params)"


class RecordingManager(ExperimentManager):
    """As rl_zoo3's, and its runs can be reproduced."""

    configured: dict[str, Any]
    """The hyperparameters of the configuration, before rl_zoo3 makes anything of them."""
    sources: dict[str, str]
    """What set each of them."""
    record: RunRecord | None = None
    _of_trial: frozenset[str] = frozenset()

    def load_trial(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As rl_zoo3's."""
        found: dict[str, Any] = super().load_trial(*args, **kwargs)
        self._of_trial = frozenset(found)
        return found

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As rl_zoo3's; what set them is remembered."""
        overridden = {"env_kwargs": "command line (--env-kwargs)"} if self.env_kwargs else {}
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        # A copy: rl_zoo3 goes on to change what is in it
        self.configured = json_form(saved_hyperparams)
        if "dataset" in self.configured:
            self.configured["dataset"] = without_trust(self.configured["dataset"])
        config = config_source(self.algo, self.config)
        trial = dict.fromkeys(self._of_trial, f"trial {self.trial_id} of the study {self.study_name}")
        given = dict.fromkeys(self.custom_hyperparams or {}, PARAMETERS)
        known = dict.fromkeys(self.configured, config) | trial | given
        self.sources = {name: overridden.get(name, source) for name, source in known.items()}
        return hyperparams, saved_hyperparams

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """As rl_zoo3's; the manifest is begun."""
        experiment: tuple[BaseAlgorithm, dict[str, Any]] | None = super().setup_experiment()
        if experiment is not None:
            self.record = RunRecord(self, experiment[0], self.sources)
        return experiment

    def learn(self, model: BaseAlgorithm) -> None:
        """As rl_zoo3's; the trace is written."""
        if self.record is None:
            super().learn(model)
            return
        with self.record.training(model, self.callbacks, self.n_timesteps):
            super().learn(model)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """As rl_zoo3's; the manifest says which file it is."""
        super().save_trained_model(model)
        if self.record is not None:
            self.record.saved(Path(self.save_path, f"{self.env_name}.zip"))
