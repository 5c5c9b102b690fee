"""The reference of TD3C follows the champion of a ChampionChallenger."""

import itertools
import warnings

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_offline_ft import TD3C, CollapseGuard
from sb3_offline_ft.deployment import ChampionChallenger
from tests.guarded_runs import Hold

EAGER = {"random_return": 0.0, "risk_budget": 0.9, "baseline_episodes": 5, "min_updates": 1, "verbose": 0}


def set_bias(model: TD3C, value: float) -> None:
    """Actions near 1 for a large value, which earn nothing in ``Hold``, and near 0 for 0, which earn all."""
    last = model.actor.mu[-2]
    with th.no_grad():
        last.weight.mul_(0.01)
        last.bias.fill_(value)


class Improvement(BaseCallback):
    """What a learner would learn at once, if it could."""

    def _on_step(self) -> bool:
        set_bias(self.model, 0.0)
        return True


def pretrained(reference: str) -> TD3C:
    """A learner whose pretrained policy is a bad one, and that changes by itself as good as not at all."""
    settings = {"policy_averaging": 0.0, "trust_region": None, "learning_rate": 1e-6, "train_freq": (1, "episode")}
    settings |= {
        "warmup_steps": 0,
        "batch_size": 8,
        "learning_starts": 0,
        "gradient_steps": 1,
        "constraint_reference": reference,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TD3C(
            "MlpPolicy", make_vec_env(Hold, seed=0), policy_kwargs={"net_arch": [8]}, seed=0, device="cpu", **settings
        )
        model.learn(20)
    set_bias(model, 3.0)
    return model


def actor_of(model: TD3C) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.actor.state_dict().items()}


def is_reference(model: TD3C, actor: dict[str, th.Tensor]) -> bool:
    assert model.reference_actor is not None
    return all(th.equal(value, actor[name]) for name, value in model.reference_actor.state_dict().items())


@pytest.mark.parametrize("reference", ["champion", "best"])
def test_the_reference_is_the_pretrained_policy_until_another_leads_and_then_the_leader(reference: str) -> None:
    model = pretrained(reference)
    start, contest = actor_of(model), ChampionChallenger(**EAGER)
    followed = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            one = contest.contest.leader
            leader = {name.removeprefix("actor."): value for name, value in one.policy.state.items()}
            followed.append((one.name, is_reference(model, start), is_reference(model, leader)))
            return True

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(600, callback=[Improvement(), contest, Watch()])
    assert "promotion" in [event["event"] for event in contest.events]
    assert all(is_start == (name == 0) and is_leader for name, is_start, is_leader in followed)
    assert followed[0][1] and not followed[-1][1]
    promotion = next(event for event in contest.events if event["event"] == "promotion")
    # It led before it was promoted, and the champion leads when nobody challenges
    assert followed[promotion["timestep"] - 2][0] == promotion["contender"]


@pytest.mark.parametrize("reference", ["champion", "best"])
def test_an_evaluation_of_the_champion_moves_no_reference(reference: str) -> None:
    model = pretrained(reference)
    start = actor_of(model)
    evaluation = EvalCallback(make_vec_env(Hold, seed=1), eval_freq=10, n_eval_episodes=1, verbose=0)
    contest, best = ChampionChallenger(**EAGER | {"risk_budget": 0.0}), []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            best.append(evaluation.best_mean_reward)
            return True

    model.learn(200, callback=[Improvement(), evaluation, contest, Watch()])
    model.learn(100, callback=[Improvement(), evaluation, contest, Watch()], reset_num_timesteps=False)
    # Returns are noisy: the same champion is found better than before several times, and never as good as the learner
    assert sum(later > earlier for earlier, later in itertools.pairwise(best)) >= 2 and best[-1] < 5.0
    assert is_reference(model, start)
    # Evaluations of the learner count again where no champion is
    model.learn(20, callback=[Improvement(), evaluation], reset_num_timesteps=False)
    assert evaluation.best_mean_reward > 9.0
    assert is_reference(model, start) == (reference == "champion")


WITHOUT_CHAMPION = "`constraint_reference='champion'` learns who that is from a ChampionChallenger, and there is none"


@pytest.mark.parametrize("callback", [None, CollapseGuard(verbose=0), EvalCallback(make_vec_env(Hold), verbose=0)])
def test_a_champion_that_nobody_names_is_said(callback: BaseCallback | None) -> None:
    model = pretrained("champion")
    with pytest.warns(UserWarning, match=WITHOUT_CHAMPION):
        model.learn(10, callback=callback)


@pytest.mark.parametrize("reference", ["champion", "best"])
@pytest.mark.parametrize("callback", [CollapseGuard(update_reference=True, verbose=0), ChampionChallenger(verbose=0)])
def test_whoever_moves_the_reference_is_enough(callback: BaseCallback, reference: str) -> None:
    model = pretrained(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(10, callback=[callback])
    # The next call of `learn` has callbacks of its own
    with pytest.warns(UserWarning, match=f"`constraint_reference='{reference}'` learns"):
        model.learn(10)
