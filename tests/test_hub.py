"""rl_zoo3's ``push_to_hub`` and ``load_from_hub`` with our algorithms, and the model card."""

import argparse
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch as th
import yaml

from sb3_offline_ft import TD3C
from sb3_offline_ft.zoo.model_card import model_card, without_folders
from tests.conftest import REPOSITORY, RunPython
from tests.hub_server import serving
from tests.zoo_runs import SMALL, make_manager

ENV, NAME = "Pendulum-v1", "td3c-Pendulum-v1"
CHAMPION = [{"sb3_offline_ft.ChampionChallenger": {"random_return": -1309, "worst_return": -1900, "verbose": 0}}]
RESULTS = {"mean_reward": -1000.0, "std_reward": 1.5, "n_eval_episodes": 10, "is_deterministic": True}


def finished(folder: Path, **settings: Any) -> Path:
    """The folder of a run with a champion, whose data is in a folder of this machine."""
    data = shutil.copytree(REPOSITORY / "sb3_offline_ft/datasets/bundled/pendulum-medium", folder / "secret" / "mine")
    hyperparams = SMALL | {"dataset": str(data), "callback": CHAMPION, "warmup_steps": 210}
    manager = make_manager(folder, hyperparams=hyperparams, n_timesteps=420, **settings)
    manager.args = argparse.Namespace(env_kwargs=None)
    model, _ = manager.setup_experiment()
    manager.learn(model)
    manager.save_trained_model(model)
    return Path(manager.save_path)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("evaluated"), eval_freq=210)


@pytest.mark.parametrize("commands", ["rl_zoo3", "sb3_offline_ft.zoo"])
def test_a_champion_is_pushed_with_a_card_and_loaded_again(
    evaluated: Path, tmp_path: Path, run_python: RunPython, commands: str
) -> None:
    options = ["--algo", "td3c", "--env", ENV, "-orga", "me"]
    with serving() as hub:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
        }
        push = [*options, "-f", str(evaluated.parents[1]), "--load-best", "--no-render"]
        pushed = run_python("-m", f"{commands}.push_to_hub", *push, **variables)
        assert pushed.returncode == 0, pushed.stderr
        files = hub.files[f"me/{NAME}"]
        loaded = run_python("-m", f"{commands}.load_from_hub", *options, "-f", "got", TRUST_REMOTE_CODE="True", **variables)
        assert loaded.returncode == 0, loaded.stderr

    _, metadata, card = files["README.md"].decode().split("---\n", 2)
    facts = yaml.safe_load(metadata)
    assert {"sb3_offline_ft", "stable-baselines3", ENV} <= set(facts["tags"])
    assert facts["model-index"][0]["results"][0]["metrics"][0]["type"] == "mean_reward"
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and " | " in line[2:])
    assert rows["model"] == "the champion at the end of the run" and "(10 episodes" in rows["return"]
    assert rows["data"].startswith("`mine`: 20,000 transitions in 100 episodes, mean return -888.4")
    assert {"served", "at risk", "outcome", "served return", "J after pretraining", "lowest J while finetuning"} <= rows.keys()
    assert "dip depth" in rows
    assert "-orga me -f logs/\npython -m rl_zoo3.enjoy --algo td3c" in card and "TRUST_REMOTE_CODE" in card
    assert str(evaluated) not in card and "secret" not in card
    # The policy, and no transitions
    assert not [name for name in files if "buffer" in name or name.endswith(".pkl")]
    saved = json.loads(zipfile.ZipFile(io.BytesIO(files[f"{NAME}.zip"])).read("data"))
    assert "replay_buffer" not in saved

    got = TD3C.load(tmp_path / "work" / "got" / "td3c" / f"{ENV}_1" / f"{ENV}.zip", device="cpu")
    champion = TD3C.load(evaluated / "best_model.zip", device="cpu").policy.state_dict()
    assert all(th.equal(value, champion[name]) for name, value in got.policy.state_dict().items())


def test_the_card_of_a_run_without_evaluations_has_the_baseline_of_its_warm_up(tmp_path: Path) -> None:
    run = finished(tmp_path)
    card = model_card(run, run / f"{ENV}.zip", "td3c", ENV, "me/other-name", RESULTS)
    assert "| model | the learner at the end of the run |" in card
    assert "| J0 | -" in card and "(1 episode), in the warm-up |" in card
    assert "| return of training episodes | mean -" in card
    assert "| batch_size | `16` | command line (-params) |" in card and "| tau |" not in card
    assert "-orga me -f logs/ -name other-name" in card and "secret" not in card
    # A run that was killed, whose names would be HTML and more cells
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["timesteps"], manifest["updates"]
    manifest["dataset"]["spec"] = "x|`<b>`\n# y"
    manifest["hyperparameters"]["gamma"] = {"value": "```\n|<i>", "source": "trial 0 of the study <img>|"}
    manifest["working_folder"] = str(run.parent)
    manifest |= {"module": "rl_zoo3.train", "arguments": ["--conf=own/c.yml", "-flogs", "--track", "-conf", "a\n```\n<b>"]}
    path.write_text(json.dumps(manifest))
    card = model_card(run, run / f"{ENV}.zip", "td3c", ENV, "me/x", RESULTS)
    assert r"| data | `` x\|`<b>` # y ``: 20,000" in card
    assert r'| gamma | ```` "```\n\|<i>" ```` | trial 0 of the study \<img\>\| |' in card
    assert "````bash\npython -m rl_zoo3.train --conf=c.yml --track -conf 'a\n```\n<b>' --seed 1\n````" in card
    assert "Seed 1, 420 interactions, 450 updates." in card
    # A run that an earlier version made
    (run / "manifest.json").unlink()
    assert "| return | -1000.0 ± 1.5 " in model_card(run, run / f"{ENV}.zip", "td3c", ENV, "me/x", RESULTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-i /home/me/logs/a.zip", "-i a.zip"),
        ("dataset:'/data/x y/b.npz'", "dataset:'b.npz'"),
        (r"C:\Users\me\c.npz", "c.npz"),
        ("~/logs/d.zip", "d.zip"),
        ("https://github.com/DLR-RM/a/b", "https://github.com/DLR-RM/a/b"),
        ("mujoco/hopper/medium-v0", "mujoco/hopper/medium-v0"),
        ("/data/my files/b.npz?episodes=3 + /c d/e.npz", "b.npz?episodes=3 + e.npz"),
        ("dataset:'own/b.npz'", "dataset:'b.npz'"),
        ("dataset:'../x/minari'", "dataset:'minari'"),
        ("~me/logs/d.zip", "d.zip"),
        ("file:///home/me/d.zip", "file:d.zip"),
        (r"\\host\me\c.npz", "c.npz"),
    ],
)
def test_folders_of_this_machine_are_left_out(text: str, expected: str) -> None:
    assert without_folders(text) == expected
