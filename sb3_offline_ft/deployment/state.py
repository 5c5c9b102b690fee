"""What a saved model holds of a contest."""

import json
from dataclasses import dataclass
from typing import Any, Self

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.common.io import arrays_from_text
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.deployment.acting import PolicyCopy
from sb3_offline_ft.deployment.contest import Contest

STATE, POLICIES = "champion_challenger_state", "champion_challenger_policies"
VERSION = 1


@dataclass
class SavedContest:
    """The contest's state in the form of JSON, and its policies as texts by the names of their contenders."""

    contest: dict[str, Any]
    policies: dict[str, PolicyCopy]
    last_updates: int
    rejections_in_a_row: int

    @classmethod
    def of(cls, contest: Contest, last_updates: int, rejections_in_a_row: int) -> Self:
        challenger = None if contest.challenge is None else contest.challenge.challenger
        contenders = {"champion": contest.champion, "predecessor": contest.predecessor, "challenger": challenger}
        policies = {role: contender.policy for role, contender in contenders.items() if contender is not None}
        return cls(contest.state_dict(), policies, last_updates, rejections_in_a_row)

    def write(self, model: OffPolicyAlgorithm) -> None:
        """Put the state where SB3's ``save`` finds it: text attributes of the model, no pickle."""
        content = {"version": VERSION, "contest": self.contest, "counts": [self.last_updates, self.rejections_in_a_row]}
        setattr(model, STATE, json.dumps(content))
        setattr(model, POLICIES, json.dumps({role: policy.text for role, policy in self.policies.items()}))

    @classmethod
    def read(cls, model: OffPolicyAlgorithm) -> Self | None:
        """The state a loaded learner was saved with; None if there is none or, with a warning, if it cannot be read."""
        if STATE not in vars(model):
            return None
        try:
            content, texts = (json.loads(vars(model)[name]) for name in (STATE, POLICIES))
            if content["version"] != VERSION:
                raise ValueError(f"it has version {content['version']}, expected {VERSION}")
            policies = {role: PolicyCopy.from_arrays(arrays_from_text(text)) for role, text in texts.items()}
            return cls(content["contest"], policies, *content["counts"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            warn(f"ChampionChallenger: its state in the model cannot be taken up ({error}), so that it begins anew.")
            return None

    def take_up(self, contest: Contest) -> tuple[int, int]:
        """Go on from this state; gives the gradient steps at the last challenge, and rejections in a row."""
        contest.load_state_dict(self.contest, self.policies)
        return self.last_updates, self.rejections_in_a_row
