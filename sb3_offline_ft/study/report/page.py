"""The report on a study: one HTML page that needs nothing else, its figures and tables as files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.pages.html import Picture, render_page
from sb3_offline_ft.pages.pictures import Drawing
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import counted, listed
from sb3_offline_ft.study.design.protocol import STUDY_FILE
from sb3_offline_ft.study.engine.folder import MANIFEST, RUNS, run_folder
from sb3_offline_ft.study.engine.results import StudyResults, study_results
from sb3_offline_ft.study.report import figures, tables
from sb3_offline_ft.study.report.analysis import DatasetNumbers, StudyNumbers, slugs
from sb3_offline_ft.study.report.definitions import SOURCES, definitions
from sb3_offline_ft.study.report.factors import factor_levels
from sb3_offline_ft.study.report.looks import looks_of, page_colours
from sb3_offline_ft.study.report.provenance import (
    commands,
    data_card,
    data_facts,
    machines_table,
    missing_table,
    provenance,
)
from sb3_offline_ft.study.report.summary import headline, summary_table
from sb3_offline_ft.study.report.verdict import Sections, verdict

FORMATS = ("html", "figures", "csv", "md")
COMBINED = (
    "Factors were combined: each value is averaged over all values of the others, seed by seed, with the seeds that have all. "
    "Whether factors act together is not seen here; the tables of the datasets have all combinations. Intervals of collapse "
    "rates are of the bootstrap over seeds."
)
PAGE, FIGURES, RESULTS, TABLES = "report.html", "figures", "results.csv", "tables.md"


@dataclass
class Part:
    """A part of the page: a text, pictures that are yet to be drawn, tables, and tables that are shown when asked for."""

    id: str
    title: str
    text: str = ""
    drawings: Sequence[Drawing] = ()
    tables: Sequence[TextTable] = ()
    folded: Sequence[TextTable] = ()
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
    first, sections = _summary_part(numbers), verdict(numbers)
    parts = [first, *_parts(numbers)]
    page = Path(output) if output is not None else protocol.folder / PAGE
    contents: dict[Path, bytes] = {}
    colours = {light: f"var({variable})" for variable, light, _ in page_colours()}
    for part in parts if {"html", "figures"} & set(formats) else []:
        for drawing in part.drawings:
            say(f"drawing {drawing.name}")
            if "html" in formats:
                part.pictures.append(drawing.on_page(colours))
            if "figures" in formats:
                for suffix, content in drawing.files().items():
                    contents[page.parent / FIGURES / f"{drawing.name}.{suffix}"] = content
    if "csv" in formats:
        contents[page.parent / RESULTS] = tables.results_csv(numbers)
    if "md" in formats:
        open_tables = [table for part in parts for table in part.tables]
        contents[page.parent / TABLES] = tables.markdown(protocol.name, first.text, sections, open_tables)
    if "html" in formats:
        contents[page] = _page(numbers, first, parts[1:], sections, data_card(numbers, facts))
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
    why = f" {_other_runs(results)}".rstrip()
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
    return (
        f"{counted(n, 'run folder')} in {RUNS} {'is' if n == 1 else 'are'} of other settings, and not in the report: "
        f"{STUDY_FILE}, a preset, the data or the package was changed since."
    )


def _summary_part(numbers: StudyNumbers) -> Part:
    looks = looks_of(method.name for method in numbers.methods)
    drawings = _drawn(figures.draw_served(one, looks) for one in numbers.datasets)
    return Part("summary", "In half a minute", headline(numbers), drawings, [summary_table(numbers)])


def _parts(numbers: StudyNumbers) -> list[Part]:
    return [
        *(_dataset_part(numbers, one) for one in numbers.datasets),
        *_across_part(numbers),
        *_factor_parts(numbers),
        *_guard_part(numbers),
    ]


def _drawn(drawings: Iterable[Drawing | None]) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing is not None]


def _dataset_part(numbers: StudyNumbers, one: DatasetNumbers) -> Part:
    looks = looks_of(method.name for method in numbers.methods)
    draw = (figures.draw_curves, figures.draw_seeds, figures.draw_dips, figures.draw_collapses)
    texts = []
    without_data = [group.label for group in one.groups if not group.method.uses_data]
    if without_data and len(numbers.datasets) > 1:
        texts.append(f"{listed(without_data)}: the same runs are shown with every dataset, as they use none.")
    if left_out := len(one.groups) - len(one.shown):
        texts.append(f"The pictures leave out {counted(left_out, 'variant')}; the tables have all.")
    return Part(
        f"data-{one.slug}", f"On {one.title}", " ".join(texts), _drawn(draw_one(one, looks) for draw_one in draw),
        tables.dataset_tables(one), [tables.runs_table(one)],
    )  # fmt: skip


def _across_part(numbers: StudyNumbers) -> list[Part]:
    looks = looks_of(method.name for method in numbers.methods)
    draw = (figures.draw_aggregates, figures.draw_profiles, figures.draw_improvement)
    drawings = _drawn(draw_one(numbers, looks) for draw_one in draw)
    of_all = [tables.scores_table(numbers), *([tables.comparison_table(numbers)] if numbers.reference is not None else [])]
    filled = [table for table in of_all if table.rows]
    if not drawings and not filled:
        return []
    scored = [row.method for row in numbers.aggregates]
    left_out = [method.label for method in numbers.shown_methods if method not in scored]
    text = ""
    if not scored:
        text = _why_no_scores(numbers)
    elif left_out:
        text = f"Not among the scores, as they have no finished run on some dataset: {listed(left_out)}."
    title = "Across datasets" if len(numbers.datasets) > 1 else "Scores and comparisons"
    return [Part("across", title, text, drawings, filled)]


def _why_no_scores(numbers: StudyNumbers) -> str:
    reasons = [f"On {one.title}, {one.why_no_scale}." for one in numbers.datasets if one.why_no_scale]
    if not reasons and any(one.scale is None for one in numbers.datasets):
        reasons = ["The return of a random policy, or one to compare with, is not known."]
    if not reasons:
        reasons = ["There is no dataset and seed that all methods have."]
    return f"There are no normalised scores. {' '.join(reasons)}"


def _factor_parts(numbers: StudyNumbers) -> list[Part]:
    looks = looks_of(method.name for method in numbers.protocol.methods)
    parts = []
    for factor, name in slugs(numbers.protocol.factors).items():
        on_all = [(one, factor_levels(numbers.protocol, factor, one.groups)) for one in numbers.datasets]
        known = [(one, levels) for one, levels in on_all if levels]
        is_averaged = any(group.is_averaged for _, levels in known for points in levels.values() for _, group in points)
        drawings = [figures.draw_factor(one, factor, levels, looks, f"factor-{name}-{one.slug}") for one, levels in known]
        filled = [tables.factor_table(one, factor, levels) for one, levels in known]
        if known:
            parts.append(Part(f"factor-{name}", f"Factor: {factor}", COMBINED if is_averaged else "", drawings, filled))
    return parts


def _guard_part(numbers: StudyNumbers) -> list[Part]:
    table = tables.guard_table(numbers)
    return [Part("guard", "What the guard did", tables.guard_words(numbers), tables=[table])] if table.rows else []


def _page(numbers: StudyNumbers, first: Part, parts: list[Part], sections: Sections, card: TextTable) -> bytes:
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
        summary=first,
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
    results, parts = numbers.results, []
    if n := len(results.missing):
        damaged = f" ({len(results.damaged)} with damaged files)" if results.damaged else ""
        parts.append(f"{counted(n, 'run')} {'has' if n == 1 else 'have'} not finished{damaged}")
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
