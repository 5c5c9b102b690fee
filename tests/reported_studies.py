"""Small studies that tests of the report share, and what their verdicts say."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from sb3_offline_ft.study import Protocol, study_results
from sb3_offline_ft.study.report.analysis import StudyNumbers
from sb3_offline_ft.study.report.verdict import verdict
from tests.made_up_study import STUDY, write_study
from tests.test_dataset_report import Page

ONE_DATASET = {"datasets": {"medium": "bundled:hopper-medium?episodes=20"}}
SMALL = ONE_DATASET | {"interactions": 12_000, "seeds": 3}
METHODS: dict[str, Any] = STUDY["methods"]


def methods(*names: str) -> dict[str, Any]:
    return {"methods": {name: METHODS[name] for name in names}, "reference_method": names[-1]}


def numbers_of(protocol: Protocol) -> StudyNumbers:
    return StudyNumbers(study_results(protocol.folder), {})


def report_page(protocol: Protocol) -> Page:
    return Page((protocol.folder / "report.html").read_text(encoding="utf-8"))


def results_rows(protocol: Protocol) -> list[dict[str, str]]:
    with (protocol.folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def words(of: Protocol | StudyNumbers, heading: str = "") -> str:
    """Sentences of the verdict, with plain spaces and minus signs, below headings that begin so."""
    numbers = of if isinstance(of, StudyNumbers) else numbers_of(of)
    found = [" ".join(texts) for title, texts in verdict(numbers) if title.startswith(heading)]
    return " ".join(" ".join(found).split()).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


def study_without_scores(folder: Path, **changes: Any) -> Protocol:
    """An environment and data of which no scores of a random policy and an expert are known."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 21, 10))
    columns = {"observations": states[:, :-1].reshape(-1, 10), "next_observations": states[:, 1:].reshape(-1, 10)}
    ends = np.arange(60) % 20 == 19
    facts = {"actions": rng.uniform(-1, 1, (60, 2)), "rewards": np.ones(60), "terminations": np.zeros(60, bool)}
    np.savez(folder / "data.npz", **columns, **facts, truncations=ends)  # type: ignore[arg-type]
    study = {"env": "Reacher-v5", "datasets": {"own": str(folder / "data.npz")}, "random_return": None}
    return write_study(folder / "study", SMALL | methods("td3", "td3c") | study | changes)
