"""The report on a study: one HTML page that needs nothing else, its figures and tables as files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.pages.html import Picture, render_page
from sb3_offline_ft.study.design.protocol import STUDY_FILE
from sb3_offline_ft.study.engine.folder import MANIFEST, RUNS, run_folder
from sb3_offline_ft.study.engine.results import StudyResults, study_results
from sb3_offline_ft.study.report.analysis import AveragedGroup, DatasetNumbers, StudyNumbers, slugs
from sb3_offline_ft.study.report.definitions import SOURCES, definitions
from sb3_offline_ft.study.report.looks import looks_of, page_colours
from sb3_offline_ft.study.report.provenance import (
    commands,
    data_card,
    data_facts,
    machines_table,
    missing_table,
    provenance,
)
from sb3_offline_ft.study.report.tables import (
    TextTable,
    comparison_table,
    dataset_tables,
    factor_table,
    guard_table,
    guard_words,
    markdown,
    results_csv,
    runs_table,
    scores_table,
)
from sb3_offline_ft.study.report.verdict import Sections, verdict
from sb3_offline_ft.study.report.words import counted, listed

if TYPE_CHECKING:
    from sb3_offline_ft.study.report.figures import Drawing

FORMATS = ("html", "figures", "csv", "md")
COMBINED = (
    "Factors were combined: each value is averaged over all values of the others, seed by seed, with the seeds that have all. "
    "Whether factors act together is not seen here; the tables of the datasets have all combinations. Intervals of collapse "
    "rates are of the bootstrap over seeds."
)
PAGE, FIGURES, RESULTS, TABLES = "report.html", "figures", "results.csv", "tables.md"


@dataclass
class Part:
    """
    A part of the page.

    :param id: Its name on the page
    :param title: Its heading
    :param text: What stands first
    :param drawings: Its pictures, yet to be drawn
    :param tables: Its tables
    :param folded: Tables that are shown when asked for
    :param pictures: Its pictures on the page
    """

    id: str
    title: str
    text: str = ""
    drawings: list["Drawing"] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)
    folded: list[TextTable] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    storage: str | None = None,
    formats: Sequence[str] = FORMATS,
    on_progress: Callable[[str], None] | None = None,
    trust_pickle: bool = False,
) -> list[Path]:
    """
    Write the report on a study. What has not finished is named, and the rest reported. The same results and versions give the
    same files.

    :param folder: The study's folder
    :param output: The HTML page, by default ``report.html`` in the study's folder; all else is written beside it
    :param storage: The study's storage, None for the journal in its folder
    :param formats: What is written: ``"html"``, ``"figures"`` (``figures/*.svg`` and ``.png``), ``"csv"`` (``results.csv``, a
        row for each run), ``"md"`` (``tables.md``)
    :param on_progress: Is told what is done next
    :param trust_pickle: As for :func:`study_results`
    :return: The files, each of which was written whole
    :raises OSError: There is no study, its storage cannot be read, or a file cannot be written
    :raises ValueError: The study's protocol is wrong, a format is unknown, or no run has finished
    """
    unknown = [one for one in formats if one not in FORMATS]
    if unknown or not formats:
        found = listed(map(repr, unknown)) if unknown else "none"
        raise ValueError(f"Formats of a report are {listed(FORMATS)}, found {found}.")
    say = on_progress or (lambda what: None)
    say("reading results")
    results = study_results(folder, storage, trust_pickle)
    protocol = results.protocol
    _check_finished(results)
    say("reading data")
    facts = data_facts(protocol, results.runs)
    say("computing statistics")
    numbers = StudyNumbers(results, {label: one.mean_return for label, one in facts.items()})
    if not numbers.runs:
        name, why = next(iter(numbers.unusable.items()))
        raise ValueError(f"No finished run of {protocol.name} can be measured; {name}: {why}")
    parts = _parts(numbers)
    sections = verdict(numbers)
    page = Path(output) if output is not None else protocol.folder / PAGE
    contents: dict[Path, bytes] = {}
    for part in parts if {"html", "figures"} & set(formats) else []:
        for drawing in part.drawings:
            say(f"drawing {drawing.name}")
            if "html" in formats:
                part.pictures.append(drawing.on_page())
            if "figures" in formats:
                for suffix, content in drawing.files().items():
                    contents[page.parent / FIGURES / f"{drawing.name}.{suffix}"] = content
    if "csv" in formats:
        contents[page.parent / RESULTS] = results_csv(numbers)
    if "md" in formats:
        contents[page.parent / TABLES] = markdown(protocol.name, sections, [table for part in parts for table in part.tables])
    if "html" in formats:
        contents[page] = _page(numbers, parts, sections, data_card(numbers, facts))
    say("writing")
    for path, content in contents.items():
        with atomic_write(path) as file:
            file.write(content)
    return list(contents)


def _check_finished(results: StudyResults) -> None:
    if results.runs:
        return
    protocol = results.protocol
    damaged = f", {len(results.damaged)} of them with damaged files" if results.damaged else ""
    counts = f"{counted(len(results.missing), 'run')} not finished{damaged}, {len(results.failed)} failed"
    why = ""
    if others := _other_runs(results):
        why = f" {others}"
    if results.failed:
        cell, error = next(iter(results.failed.items()))
        lines = error.strip().splitlines()
        why += f" {cell.name} failed with: {lines[-1] if lines else 'no error was recorded'}."
    raise ValueError(
        f"There is nothing to report on {protocol.name} yet ({counts}): make runs with `sb3-offline-ft study run "
        f"{protocol.folder}`.{why}"
    )


def _other_runs(results: StudyResults) -> str:
    """Say how many run folders hold results of something else than what the protocol describes now."""
    protocol = results.protocol
    # By the end of the name, as methods and datasets may have been called otherwise
    known = {
        run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, protocol.cell_key(cell)).name
        for cell in protocol.cells()
    }
    n = sum(file.parent.name not in known for file in (protocol.folder / RUNS).glob(f"*/*/*/{MANIFEST}"))
    if not n:
        return ""
    verb = "is" if n == 1 else "are"
    return (
        f"{counted(n, 'run folder')} in {RUNS} {verb} of other settings, and not in the report: {STUDY_FILE}, a preset, the "
        "data or the package was changed since."
    )


def _parts(numbers: StudyNumbers) -> list[Part]:
    parts = [_dataset_part(numbers, one) for one in numbers.datasets]
    parts += [part for part in (_across_part(numbers), *_factor_parts(numbers), _guard_part(numbers)) if part is not None]
    return parts


def _dataset_part(numbers: StudyNumbers, one: DatasetNumbers) -> Part:
    from sb3_offline_ft.study.report import figures

    looks = looks_of(method.name for method in numbers.methods)
    groups = numbers.shown(one)
    drawings = [
        figures.draw_curves(one, groups, looks, f"curves-{one.slug}"),
        figures.draw_seeds(one, groups, looks, f"seeds-{one.slug}"),
        figures.draw_dips(one, groups, looks, f"dips-{one.slug}"),
        figures.draw_collapses(groups, looks, f"collapses-{one.slug}"),
    ]
    without_data = [group.label for group in one.groups if not group.method.pretrained]
    text = ""
    if without_data and len(numbers.datasets) > 1:
        text = f"{listed(without_data)}: the same runs are shown with every dataset, as they use none."
    if len(groups) < len(one.groups):
        text += f" The pictures leave out {counted(len(one.groups) - len(groups), 'variant')}; the tables have all."
    present = [drawing for drawing in drawings if drawing is not None]
    return Part(f"data-{one.slug}", f"On {one.title}", text.strip(), present, dataset_tables(one), [runs_table(one)])


def _across_part(numbers: StudyNumbers) -> Part | None:
    from sb3_offline_ft.study.report import figures

    looks = looks_of(method.name for method in numbers.methods)
    drawings = [
        figures.draw_aggregates(numbers, looks, "scores"),
        figures.draw_profiles(numbers, looks, "profiles"),
        figures.draw_improvement(numbers, looks, "improvement"),
    ]
    tables = [scores_table(numbers), *([comparison_table(numbers)] if numbers.reference is not None else [])]
    tables = [table for table in tables if table.rows]
    present = [drawing for drawing in drawings if drawing is not None]
    if not present and not tables:
        return None
    title = "Across datasets" if len(numbers.datasets) > 1 else "Scores and comparisons"
    left_out = [method.label for method in numbers.shown_methods if method not in [row.method for row in numbers.aggregates]]
    text = ""
    if left_out and numbers.aggregates:
        text = f"Not among the scores, as they have no finished run on some dataset: {listed(left_out)}."
    elif not numbers.aggregates:
        text = _why_no_scores(numbers)
    return Part("across", title, text, present, tables)


def _why_no_scores(numbers: StudyNumbers) -> str:
    reasons = [f"On {one.title}, {one.why_no_scale}." for one in numbers.datasets if one.why_no_scale]
    if not reasons and any(one.scale is None for one in numbers.datasets):
        reasons = ["The return of a random policy, or one to compare with, is not known."]
    if not reasons:
        reasons = ["There is no dataset and seed that all methods have."]
    return f"There are no normalised scores. {' '.join(reasons)}"


def _factor_parts(numbers: StudyNumbers) -> list[Part]:
    from sb3_offline_ft.study.report import figures

    looks = looks_of(method.name for method in numbers.protocol.methods)
    parts = []
    names = slugs(numbers.protocol.factors)
    for factor, name in names.items():
        part = Part(f"factor-{name}", f"Factor: {factor}")
        for one in numbers.datasets:
            levels = numbers.factor_levels(factor, one)
            if any(isinstance(group, AveragedGroup) for points in levels.values() for _, group in points):
                part.text = COMBINED
            if levels:
                part.drawings.append(figures.draw_factor(one, factor, levels, looks, f"factor-{name}-{one.slug}"))
                part.tables.append(factor_table(one, factor, levels))
        if part.tables:
            parts.append(part)
    return parts


def _guard_part(numbers: StudyNumbers) -> Part | None:
    table = guard_table(numbers)
    if not table.rows:
        return None
    return Part("guard", "What the guard did", guard_words(numbers), tables=[table])


def _page(numbers: StudyNumbers, parts: list[Part], sections: Sections, card: TextTable) -> bytes:
    protocol, missing = numbers.protocol, missing_table(numbers)
    appendix = [
        ("measured", "How it was measured"), ("data", "Data"), ("protocol", "Protocol"),
        ("manifest", "Versions, machines, weights"), ("reproduce", "How to reproduce it"),
    ]  # fmt: skip
    if missing.rows:
        appendix.append(("missing", "What is missing"))
    return render_page(
        __package__,
        "report.html.jinja",
        name=protocol.name,
        subtitle=_subtitle(numbers),
        notices=_notices(numbers),
        verdict=sections,
        parts=parts,
        appendix=appendix,
        colours=page_colours(),
        definitions=definitions(numbers),
        data_card=card,
        protocol=protocol.text,
        study_file=STUDY_FILE,
        provenance=provenance(numbers.results.runs),
        machines=machines_table(numbers.results.runs),
        commands=commands(numbers),
        missing=missing,
        sources=SOURCES,
    )


def _subtitle(numbers: StudyNumbers) -> str:
    protocol = numbers.protocol
    return (
        f"A study of finetuning on {protocol.env}: {counted(len(protocol.methods), 'method')}, "
        f"{counted(len(protocol.datasets), 'dataset')}, {counted(len(protocol.seeds), 'seed')}, "
        f"{counted(protocol.interactions, 'interaction')} each."
    )


def _notices(numbers: StudyNumbers) -> list[str]:
    results = numbers.results
    parts = []
    if results.missing:
        parts.append(f"{counted(len(results.missing), 'run')} have not finished" if len(results.missing) > 1 else
                     "1 run has not finished")  # fmt: skip
        if results.damaged:
            parts[-1] += f" ({len(results.damaged)} with damaged files)"
    if results.failed:
        parts.append(f"{len(results.failed)} failed")
    if numbers.unusable:
        parts.append(f"{len(numbers.unusable)} cannot be measured")
    texts = []
    if parts:
        texts.append(
            f"This study is not complete: of {numbers.n_cells} runs {listed(parts)}. All that is said is of the others."
        )
    if others := _other_runs(results):
        texts.append(others)
    return texts
