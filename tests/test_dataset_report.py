"""The report: one page that needs nothing else, and says what the data says."""

import html
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from gymnasium import spaces

from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.datasets.tools import report_figures as figures
from sb3_offline_ft.datasets.tools.diversity import measure_diversity
from sb3_offline_ft.datasets.tools.report import in_words, is_narrow, write_report
from sb3_offline_ft.datasets.tools.show import describe_dataset, number_text

VOID = {"meta", "link", "img", "br", "hr", "input"}
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


class Page(HTMLParser):
    """Collects what a page needs from elsewhere, its ids, and its text; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value is not None:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and value is not None:
                self.links.append(value)
        assert tag not in ("script", "iframe", "object", "link")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def noisy(std: float, n_episodes: int = 30, seed: int = 0, **facts: Any) -> OfflineDataset:
    """Data of a policy on two independent states, with noise of a known strength on one action."""
    generator = np.random.default_rng(seed)
    states = generator.uniform(-1, 1, (n_episodes, 101, 2))
    actions = np.clip(0.5 * states[:, :-1, :1] + generator.normal(0, std, (n_episodes, 100, 1)), -1, 1)
    truncations = np.zeros((n_episodes, 100), np.bool_)
    truncations[:, -1] = True
    return OfflineDataset.from_columns(
        states[:, :-1].reshape(-1, 2),
        actions.reshape(-1, 1),
        (generator.normal(size=(n_episodes, 1)) + np.zeros((1, 100))).reshape(-1),
        states[:, 1:].reshape(-1, 2),
        np.zeros(n_episodes * 100, np.bool_),
        truncations.reshape(-1),
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        **facts,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report on bundled data, with another part of it beside it."""
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_report(["bundled:hopper-medium?episodes=60", "bundled:hopper-medium?top_fraction=0.1"], path)
    return path.read_text(encoding="utf-8")


class TestPage:
    def test_it_needs_nothing_else(self, page: str) -> None:
        parsed = Page(page)
        for link in parsed.links:
            assert link.startswith(("#", "data:image/png;base64,")), link
        assert "http" not in "".join(re.findall(r"url\([^)]*\)", page))
        assert "@import" not in page and page.isprintable() is False  # lines end somewhere
        assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "@media print" in page

    def test_ids_are_there_once_and_references_lead_to_them(self, page: str) -> None:
        parsed = Page(page)
        assert len(parsed.ids) == len(set(parsed.ids)) > 0
        references = {link[1:] for link in parsed.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page))
        assert references and references <= set(parsed.ids)

    def test_pictures_are_svg_in_the_colours_of_the_page(self, page: str) -> None:
        pictures = SVG.findall(page)
        assert len(pictures) == 6
        for picture in pictures:
            root = ElementTree.fromstring(picture)
            assert root.get("viewBox") and root.get("width") is None and root.get("height") is None
            assert "currentColor" in picture and "fill: #ffffff" not in picture
            # Texts, not outlines: they can be read, found and scaled
            assert root.findall(".//{http://www.w3.org/2000/svg}text")

    def test_numbers_are_those_of_the_data(self, page: str) -> None:
        data = load_dataset("bundled:hopper-medium?episodes=60")
        diversity = measure_diversity(data)
        assert diversity.action_noise is not None and diversity.vendi_score is not None and diversity.coverage is not None
        text = Page(page).text
        for expected in (
            f"{len(data):,} transitions in 60 episodes of Hopper-v5, recorded with SAC",
            f"The mean return is {number_text(data.episode_returns.mean())}",
            f"{diversity.trajectory_quality:.3f}",
            f"{diversity.state_entropy:.2f} nats",
            f"{diversity.vendi_score:.1f} effectively different",
            f"standard deviation {diversity.action_noise.mean_std:.3f}",
            f"100 bins: {diversity.coverage.per_row:.3f} per row",
            data.fingerprint,
            "Luo et al. (2023)",
            "arXiv 2303.17396",
        ):
            assert expected in text
        assert " nan" not in text and "None" not in text

    def test_datasets_are_set_side_by_side(self, page: str) -> None:
        best = load_dataset("bundled:hopper-medium?top_fraction=0.1")
        text = Page(page).text
        assert "Side by side" in text and html.unescape(best.name) in text
        assert f"{number_text(best.episode_returns.mean())}" in text

    def test_the_same_data_gives_the_same_page(self, tmp_path: Path) -> None:
        for name in ("one.html", "two.html"):
            write_report(["bundled:pendulum-medium?episodes=10"], tmp_path / name)
        assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()

    def test_names_are_text_not_markup(self, tmp_path: Path) -> None:
        data = noisy(0.1, name="<b>&co</b>", provenance={"algorithm": "<script>alert(1)</script>"})
        write_report([data], tmp_path / "report.html")
        parsed = Page((tmp_path / "report.html").read_text())
        assert "<b>&co</b>" in parsed.text and "<script>alert(1)</script>" in parsed.text

    def test_nothing_is_written_if_a_dataset_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write_report(["bundled:pendulum-medium?episodes=5", tmp_path / "missing.npz"], tmp_path / "report.html")
        assert list(tmp_path.iterdir()) == []


class TestWords:
    @pytest.mark.parametrize(("std", "narrow", "words"), [(0.02, True, "nearly determined"), (0.3, False, "neither nearly")])
    def test_narrow_data_is_called_so(self, std: float, narrow: bool, words: str) -> None:
        data = noisy(std)
        diversity = measure_diversity(data)
        assert diversity.action_noise is not None
        assert diversity.action_noise.mean_std == pytest.approx(std, rel=0.15)
        assert is_narrow(diversity) is narrow
        sections = dict(in_words(describe_dataset(data), diversity))
        assert words in sections["How diverse it is"][0]
        meaning = " ".join(sections["What that may mean for finetuning"])
        assert ("a reason for care" in meaning) is narrow
        assert "predicts nothing" in meaning

    def test_random_actions_are_called_independent_of_the_state(self) -> None:
        generator = np.random.default_rng(0)
        data = noisy(0.1)
        actions = generator.uniform(-1, 1, data.actions.shape).astype(np.float32)
        uniform = OfflineDataset.from_columns(
            data.observations, actions, data.rewards, data.next_observations, data.terminations, data.truncations
        )
        sections = dict(in_words(describe_dataset(uniform), measure_diversity(uniform)))
        assert "hardly depend on the state" in sections["How diverse it is"][0]
        assert "cannot be placed between them" in sections["How good it is"][0]

    def test_remarks_are_made_where_there_is_a_reason(self) -> None:
        data = noisy(3.0, n_episodes=5)
        assert isinstance(data.observations, np.ndarray) and isinstance(data.next_observations, np.ndarray)
        rows = np.r_[0:500, 0:100]
        constant = np.zeros((len(rows), 1), np.float32)
        repeated = OfflineDataset.from_columns(
            np.concatenate([data.observations[rows], constant], axis=1),
            data.actions[rows],
            np.zeros(len(rows)),
            np.concatenate([data.next_observations[rows], constant], axis=1),
            data.terminations[rows],
            data.truncations[rows],
            action_space=data.action_space,
        )
        (remarks,) = (texts for heading, texts in in_words(describe_dataset(repeated), measure_diversity(repeated))
                      if heading == "To mind")  # fmt: skip
        text = " ".join(remarks)
        for words in ("only 6 episodes", "at a bound, in dimension 0 (7", "100 transitions (16.7%) equal an earlier one",
                      "sparse: 100.0%", "Constant over all rows: dimension 2 of observations"):  # fmt: skip
            assert words in text
        sections = dict(in_words(describe_dataset(noisy(0.1)), measure_diversity(noisy(0.1))))
        assert "To mind" not in sections

    def test_unknown_bounds_are_said(self) -> None:
        data = noisy(0.1)
        free = OfflineDataset.from_columns(
            data.observations, data.actions, data.rewards, data.next_observations, data.terminations, data.truncations
        )
        assert "bounds of the actions are not known" in " ".join(
            dict(in_words(describe_dataset(free), measure_diversity(free)))["To mind"]
        )


class TestPictures:
    """Pictures of data at the edges of what can be drawn."""

    def test_one_short_episode(self, tmp_path: Path) -> None:
        data = noisy(0.1, n_episodes=1)
        write_report([data.select_episodes([0])], tmp_path / "report.html")
        assert len(SVG.findall((tmp_path / "report.html").read_text())) == 6

    def test_one_dimension_has_no_projection(self) -> None:
        data = noisy(0.1)
        assert isinstance(data.observations, np.ndarray) and isinstance(data.next_observations, np.ndarray)
        line = OfflineDataset.from_columns(
            data.observations[:, :1], data.actions, data.rewards, data.next_observations[:, :1], data.terminations,
            data.truncations,
        )  # fmt: skip
        assert figures.draw_states(line) is None
        assert figures.draw_states(data) is not None

    def test_images_parts_and_many_actions(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        frames = generator.integers(0, 256, (61, 4, 4, 1), dtype=np.uint8)
        ends = np.zeros(60, np.bool_)
        ends[[19, 39, 59]] = True
        images = OfflineDataset.from_columns(
            {"camera": frames[:-1]}, generator.uniform(-1, 1, (60, 20)), np.ones(60), {"camera": frames[1:]}, ends, name="part"
        )
        both = OfflineDataset.concatenate([images, images], weights=[3, 1])
        write_report([both], tmp_path / "report.html")
        text = Page((tmp_path / "report.html").read_text()).text
        assert "not measured" in text and "The first 12 of 20 dimensions" in text
        assert "75.0%" in text and "25.0%" in text and "Dotted lines" in text
        assert "Batches take the parts by their shares" in text
        assert "Images, 4 x 4 x 1; over all pixels of 120 rows" in text
        assert "no observations but images" in text

    def test_drawing_warns_of_nothing(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_report([noisy(0.1, n_episodes=3), noisy(0.0, n_episodes=2)], tmp_path / "report.html")
