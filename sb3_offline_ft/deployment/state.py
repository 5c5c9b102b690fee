"""What a saved model holds of a contest."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Self

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.common.io import arrays_from_text
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.deployment.acting import PolicyCopy
from sb3_offline_ft.deployment.contest import Contest

STATE, POLICIES = "champion_challenger_state", "champion_challenger_policies"
SAVED_ATTRIBUTES = (STATE, POLICIES)
VERSION = 1
MOST_COUNTED = 2**53
"""Larger whole numbers are no floats."""
OF_THE_BUDGET = ("risk_budget", "random_return", "worst_return")
"""Settings that a run keeps, since its promise is about the whole run."""


@dataclass
class SavedContest:
    """The contest's state and settings in the form of JSON, and its policies by the names of their contenders."""

    contest: dict[str, Any]
    settings: dict[str, Any]
    policies: dict[str, PolicyCopy]
    last_updates: int
    rejections_in_a_row: int

    @classmethod
    def of(cls, contest: Contest, settings: dict[str, Any], last_updates: int, rejections_in_a_row: int) -> Self:
        # The rival's only episode will not be finished
        policies = {role: contender.policy for role, contender in contest.contenders.items() if role != "rival"}
        return cls(contest.state_dict(), settings, policies, last_updates, rejections_in_a_row)

    def write(self, model: OffPolicyAlgorithm) -> None:
        """Put the state where SB3's ``save`` finds it: attributes of the model in the form of JSON, no pickle."""
        counts = [self.last_updates, self.rejections_in_a_row]
        content = {"version": VERSION, "contest": self.contest, "settings": self.settings, "counts": counts}
        setattr(model, STATE, json.dumps(content))
        setattr(model, POLICIES, {role: policy.text for role, policy in self.policies.items()})

    @classmethod
    def read(cls, model: OffPolicyAlgorithm) -> Self | None:
        """The state a loaded learner was saved with; None if there is none or, with a warning, if it cannot be read."""
        if STATE not in vars(model):
            return None
        try:
            content, texts = json.loads(vars(model)[STATE]), vars(model)[POLICIES]
            if content["version"] != VERSION:
                raise ValueError(f"it has version {content['version']}, expected {VERSION}")
            policies = {role: PolicyCopy.from_arrays(arrays_from_text(text)).in_learner(model) for role, text in texts.items()}
            settings = content["settings"]
            if lacking := {*OF_THE_BUDGET, "segment_steps"} - settings.keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            _check_numbers(content["contest"], content["counts"])
            _check_agreement(content["contest"], settings)
            return cls(content["contest"], settings, policies, *content["counts"])
        # Whoever reads half a state raises anything
        except Exception as error:
            _warn(error)
            return None

    def taken_up(self, contest: Contest) -> tuple[int, int] | None:
        """As :meth:`take_up`; None, with a warning, if it is damaged: the contest is useless then."""
        try:
            return self.take_up(contest)
        except Exception as error:
            _warn(error)
            return None

    def take_up(self, contest: Contest) -> tuple[int, int]:
        """Go on from this state; gives the gradient steps at the last challenge, and rejections in a row."""
        contest.load_state_dict(self.contest, self.policies)
        contest.rules = replace(contest.rules, **{name: self.settings[name] for name in OF_THE_BUDGET})
        return self.last_updates, self.rejections_in_a_row

    def differences(self, settings: dict[str, Any]) -> str:
        """
        How settings differ from those of the saved run, in words; empty if they do not.

        :raises ValueError: What is compared would be something else
        """
        saved = self.settings
        if saved["segment_steps"] != settings["segment_steps"]:
            raise ValueError(
                f"`segment_steps` is {settings['segment_steps']}, and the saved run had {saved['segment_steps']}: returns of "
                "other lengths cannot be compared. Give the same, or begin a run with `reset_num_timesteps=True`."
            )
        names = [name for name, value in settings.items() if name in saved and saved[name] != value]
        kept = (*OF_THE_BUDGET, "seed")
        words = [
            f"`{name}` stays {saved[name]}, not {settings[name]}"
            if name in kept
            else f"`{name}` is {settings[name]} from now on, before {saved[name]}"
            for name in names
        ]
        return "; ".join(words)


def _check_numbers(contest: dict[str, Any], counts: list[Any]) -> None:
    """``ValueError`` if anything that is counted with is no number that can be."""
    contenders = [facts for facts in contest["contenders"].values() if facts is not None]
    whole = [contest["n_tests"], contest["n_baseline"], *counts, *(facts["name"] for facts in contenders)]
    if (challenge := contest.get("challenge")) is not None:
        whole.append(challenge["n_rival"])
    lists = [contest["exploration_losses"], *(contest["baseline"] or []), *(facts["returns"] for facts in contenders)]
    if (budget := contest["budget"]) is not None:
        account = {**budget, **budget["baseline"]}
        whole.append(account.pop("n_episodes"))
        lists.append([value for name, value in account.items() if name != "baseline"])
    if not all(type(number) is int and 0 <= number < MOST_COUNTED for number in whole):
        raise ValueError("its counts must be whole numbers")
    if not all(
        type(values) is list and all(type(one) in (int, float) and math.isfinite(one) for one in values) for values in lists
    ):
        raise ValueError("its returns and losses must be lists of finite numbers")


def _check_agreement(contest: dict[str, Any], settings: dict[str, Any]) -> None:
    """``ValueError`` if parts that say the same do not, or what follows from others is missing."""
    length, budget = settings["segment_steps"], contest["budget"]
    if length is not None and not (type(length) is int and length >= 1):
        raise ValueError("`segment_steps` must be a whole number of at least 1, or null")
    if budget is not None:
        returns = contest["contenders"]["champion"]["returns"]
        if budget["share"] != settings["risk_budget"] or budget["lost_to_champion"] < 0:
            raise ValueError("its account is not that of its settings")
        if not returns or not math.isfinite(sum(returns)):
            raise ValueError("its champion has no mean return")


def _warn(error: Exception) -> None:
    warn(
        f"ChampionChallenger: its state in the model cannot be taken up ({type(error).__name__}: {error}), so that it begins "
        "anew."
    )
