"""Writes the files of a new trial."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.strict_yaml import flow, listed
from sb3_offline_ft.trial.checklist import CHECKLIST_FILE, checklist_items, checklist_text
from sb3_offline_ft.trial.plan import PLAN_FILE, RETURN, TrialPlan
from sb3_offline_ft.trial.reading import parse_plan

if TYPE_CHECKING:
    from sb3_offline_ft.datasets.reference_scores import ReferenceScores

EPISODES = 80
FEWEST_EPISODES = 9
WORTHWHILE = 0.05
"""Of the way from a random policy to an expert: the effect that is written where both are known."""

_TEMPLATE = """\
# A trial: from the policy that runs today and a candidate to a go or no-go.
#   sb3-offline-ft trial plan {folder}       is it worth it, how long, at what risk and cost?
#   {go_on}
#   sb3-offline-ft trial decide {folder}     go, no-go or not yet
# Edit this file before the first episode: it is frozen then, and later changes need `sb3-offline-ft trial amend`.
# Paths are relative to the folder in which the commands are typed.

# What the policies act in: an id of Gymnasium; module:id imports the module first. Without one, people or a PLC run the
# episodes: `trial next` says which policy drives, `trial record` takes what came of it.
env: {env}
env_kwargs: {env_kwargs}  # for gymnasium.make

# The policy that runs today, and the one that is tried: a .zip, a folder of a run of rl-zoo3, an .onnx file, module:function,
# zero or random. Without env: any words.
baseline: {baseline}
candidate: {candidate}

seed: {seed}  # of the order of the policies, and of the episodes in env
data: {data}  # spec of a dataset of the baseline: its spread, what it covers, an off-policy estimate; null for none
columns: {columns}  # for `trial record --csv`: a file with the column map of `dataset convert`; null: guessed from the names

# Of logs: the bounds of their actions, one for all or one for each, such as  {{low: 0, high: [1, 2.5]}}. With them the report
# says how far the actuators move and how often they are at a bound. The column map says which columns these are.
action_bounds: {action_bounds}

regime: {regime}  # info.<key> or column.<name> that names the operating regime of an episode; null for none

# What is measured of each episode. `return`, the sum of rewards, is always there. Keys of the others:
#   from: reward, info.<key> (with env) or column.<name> (of logs); left out if it is given to `trial record --metric`
#   aggregate: sum, mean, min, max or last of the values of the steps        better: higher or lower
#   unit: in words         value_per_unit: what an improvement by one unit in one episode is worth, in the currency
# such as  energy: {{from: {example}.energy, aggregate: sum, better: lower, unit: kWh, value_per_unit: 0.12}}
metrics:
{metrics}
currency: {currency}

# What decides: a metric, and the smallest improvement of its mean that is worth having, in its units.
primary: {primary}

# What must not become worse. margin: the candidate's mean may be worse than the baseline's by at most this; or limit: its mean
# may not be worse than this. Such as  energy: {{margin: 2.0}}
guardrails:
{guardrails}

# Probabilities: of a go for a candidate that is not better; of no go for one that is better by the smallest effect; of
# stopping early because of one that is not worse.
error_rates: {error_rates}

budget: {budget}  # the largest number of episodes of both policies, in all stages but shadow

# In the currency: an episode; besides, one that is supervised; minutes that an episode takes; episodes in a year of service;
# putting the candidate into service.
costs: {costs}

# What the candidate may lose. Falling from the baseline's mean return to that of a random policy in one episode is a total
# loss; all episodes of the candidate together may take `budget` times the number of episodes above. One is only begun if its
# worst case, `worst_return`, is within what is left. null: no bound. Such as
#   {{budget: 0.1, random_return: {random_return}, worst_return: {random_return}}}
# `worst_return` is the least that an episode can return; `baseline_return` may be given, and is measured if not.
risk: {risk}

# In this order, each optional, more than one pilot and ramp possible. share: the candidate's part of the episodes.
#   shadow: the baseline acts, the candidate only computes         pilot: few episodes, supervised: true if somebody watches
#   ramp: more and more                                            full: the candidate alone, after a go, watched
stages:
{stages}

# In pilot and ramp the policies alternate in blocks of so many episodes (more if the share asks for it), in an order that is
# drawn. wash_in_steps: first steps of an episode that do not count.
blocks: {blocks}

# Within an episode of the candidate the baseline takes over if a value of a step crosses a limit, such as
#   limits: {{{example}.torque: {{max: 2.0}}}}
# if an action is not finite or lies beyond its bounds by more than `actions_beyond` of its range (null: any distance), or if a
# metric is missing. most: so many aborts are allowed; one more is a no-go.
abort: {abort}

# Before the first episode `trial run` tries both policies in env as it might be: other masses, delays, noise. null: not so.
#   {{seeds: 10, perturb: null}}                               in all ways that this environment has
#   {{seeds: 10, perturb: {{mass: [0.8, 1.2], delay: []}}}}     in these, at these levels; []: at the usual ones
# `sb3-offline-ft robustness --help` says more.
robustness: {robustness}

sign_off: {sign_off}  # who signs: each gets a line in the checklist and in the report
"""


def init_trial(folder: str | Path, sections: Mapping[str, Any], episodes: int = EPISODES) -> Path:
    """
    Write ``trial.yml`` and ``checklist.md`` of a new trial.

    :param folder: Folder of the trial, which is made if it is missing
    :param sections: Values of keys of the plan, ``baseline`` and ``candidate`` at least; the others get defaults
    :param episodes: Budget of the default stages, at least 9
    :return: The file of the plan
    :raises FileExistsError: There is a trial already
    :raises NotADirectoryError: The folder is a file
    :raises ValueError: A value is not possible
    """
    folder = Path(folder).expanduser()
    file = folder / PLAN_FILE
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another folder for the trial.")
    if file.exists():
        raise FileExistsError(
            f"There is a trial already: {file}. Edit it to change the trial, or take another folder for a new one."
        )
    content = {**_defaults(sections.get("env"), episodes), **{key: one for key, one in sections.items() if one is not None}}
    plan = parse_plan(content, file)
    with atomic_write(file) as stream:
        stream.write(plan_text(plan, folder).encode())
    with atomic_write(folder / CHECKLIST_FILE) as stream:
        stream.write(checklist_text(folder, checklist_items(plan, folder)).encode())
    return file


def plan_text(plan: TrialPlan, folder: Path) -> str:
    """The file of a plan, in which every key is explained."""
    shown, content = shlex.quote(str(folder)), plan.as_mapping()
    go_on = {
        True: f"sb3-offline-ft trial run {shown}        goes on where it was, and can be interrupted at any time",
        False: f"sb3-offline-ft trial next {shown}; sb3-offline-ft trial record {shown} --return ...     for each episode",
    }
    lines = {key: listed(content[key]) for key in ("metrics", "guardrails")}
    lines["stages"] = "\n".join(f"  - {flow(stage)}" for stage in content["stages"])
    one_line = {key: flow(value) for key, value in content.items() if key not in lines}
    example, scores = "column" if plan.env is None else "info", _scores(plan.env)
    return _TEMPLATE.format(
        folder=shown,
        go_on=go_on[plan.env is not None],
        example=example,
        random_return=-100.0 if scores is None else scores.random,
        **lines,
        **one_line,
    )


def next_steps(file: Path) -> str:
    """What to do with the file that :func:`init_trial` wrote, for people."""
    shown = shlex.quote(str(file.parent))
    return (
        f"{file}: edit it, above all `primary`, `metrics` and `costs`; {CHECKLIST_FILE} beside it says what else has to be "
        f"ready. Then `sb3-offline-ft trial plan {shown}`"
    )


def default_stages(episodes: int) -> list[dict[str, Any]]:
    """
    Stages for a budget: most of the comparison at equal shares, where an episode tells most.

    :param episodes: Episodes of both policies
    :raises ValueError: They are too few
    """
    if episodes < FEWEST_EPISODES:
        raise ValueError(f"A trial needs at least {FEWEST_EPISODES} episodes, found {episodes}.")
    pilot, full = 4 * max(1, round(0.15 * episodes / 4)), max(1, round(0.1 * episodes))
    ramps = {"ramp 10 %": (10, 0.1), "ramp 25 %": (12, 0.25)} if episodes >= EPISODES else {}
    left = episodes - pilot - full - sum(n for n, _ in ramps.values())
    return [
        {"name": "shadow", "episodes": 3},
        {"name": "pilot", "episodes": pilot, "share": 0.25, "supervised": True},
        *({"name": name, "episodes": n, "share": share} for name, (n, share) in ramps.items()),
        {"name": "ramp 50 %", "episodes": left, "share": 0.5},
        {"name": "full", "episodes": full},
    ]


def _defaults(env: str | None, episodes: int) -> dict[str, Any]:
    scores = _scores(env)
    effect = 1.0 if scores is None else float(f"{WORTHWHILE * (scores.expert - scores.random):.1g}")
    return {
        "primary": {"metric": RETURN, "smallest_effect": effect},
        "budget": {"episodes": episodes},
        "stages": default_stages(episodes),
        "sign_off": ["plant manager", "control engineer"],
    }


def _scores(env: str | None) -> "ReferenceScores | None":
    """What is known of the returns in an environment."""
    # A plant's commands start without it in a fifth of the time
    from sb3_offline_ft.datasets.reference_scores import reference_scores_for

    return None if env is None else reference_scores_for(env.rpartition(":")[2])
