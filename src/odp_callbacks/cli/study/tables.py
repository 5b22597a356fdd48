"""The tables of a study's page, in markdown."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.questions_needed import growth_to_decide
from odp_callbacks.analysis.study.figures import (
    ALL_TEACHERS,
    GAP,
    CellSummary,
    FigureKey,
    StudyFigure,
    study_estimate,
)
from odp_callbacks.analysis.study.findings import OURS, Finding, difference
from odp_callbacks.analysis.study.report_summary import STUDENT
from odp_callbacks.analysis.study.verdicts import CANNOT_TELL, DOES_NOT_HOLD, HOLDS, Verdict

MEASURED_BY = {"paper": "protocol", "update": "update gain", "nodes": "nodes", "accuracy": "responses"}
SIGNS = {HOLDS: "✓", DOES_NOT_HOLD: "✗", CANNOT_TELL: "?"}
TARGET_HALF_WIDTH = 0.02
"""Of the interval of the mean cosine, in the table of costs."""
COMPARED = ("Self-1C", "Self-1C1W")
"""The contexts that the table of costs compares."""


def findings_table(verdicts: Sequence[Verdict]) -> str:
    """Each finding with the paper's figures, the contrast of all cells with its interval, and the verdict."""
    rows, named = [], set[str]()
    for verdict in _measured(verdicts):
        finding = verdict.finding
        first = finding.id not in named
        named.add(finding.id)
        estimate = verdict.estimate
        rows.append(
            [
                _sentence(finding) if first else "",
                finding.published if first else "",
                MEASURED_BY[verdict.measurement],
                _interval(estimate),
                f"**{verdict.verdict}**" if verdict.verdict != CANNOT_TELL else CANNOT_TELL,
            ]
        )
    return _table(("the paper's finding", "its figures", "measured by", "all cells", "verdict"), rows)


def _sentence(finding: Finding) -> str:
    return finding.sentence if finding.source == OURS else f"{finding.sentence} *{finding.source}*"


def _measured(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with an estimate, and one of each finding that has none."""
    measured = {verdict.finding.id for verdict in verdicts if not np.isnan(verdict.estimate.value)}
    kept, named = [], set[str]()
    for verdict in verdicts:
        finding = verdict.finding.id
        if not np.isnan(verdict.estimate.value) or finding not in measured | named:
            kept.append(verdict)
        named.add(finding)
    return kept


def cells_table(verdicts: Sequence[Verdict]) -> str:
    """The contrast of each finding in each cell, in the paper's protocol or, for accuracies, in responses."""
    chosen = [verdict for verdict in verdicts if verdict.measurement in ("paper", "accuracy") and verdict.of_cells]
    places = list(dict.fromkeys(place for verdict in chosen for place in verdict.of_cells))
    rows = []
    for verdict in chosen:
        of_cells = [verdict.of_cells.get(place) for place in places]
        cells = [f"{_plus_minus(one[0])}{SIGNS[one[1]]}" if one else "-" for one in of_cells]
        rows.append([verdict.finding.id, *cells])
    return _table(("finding", *(_name(place) for place in places)), rows)


def classes_table(cells: Sequence[CellSummary], confidence: float) -> str:
    """Correct and incorrect paths of each cell, mean of the teachers, as in the paper's table."""
    figures = {
        "mean cosine": "cosine",
        "fraction positive": "positive",
        "SR-weighted": "weighted_cosine",
        "teacher advantage": "advantage",
    }
    rows = []
    for cell in _of(cells, "paper"):
        columns = []
        for figure in figures.values():
            correct, incorrect = (_figure(cell, figure, ALL_TEACHERS, paths) for paths in ("correct", "incorrect"))
            gap = study_estimate(_figure(cell, figure, ALL_TEACHERS, GAP), confidence)
            columns.append(f"{_number(correct.value)}→{_number(incorrect.value)} ({_plus_minus(gap)})")
        rows.append([_name((cell.student, cell.task)), str(cell.questions), *columns])
    return _table(("", "questions", *figures), rows)


def teachers_table(cells: Sequence[CellSummary], measurement: str, figure: str, confidence: float) -> str:
    """A figure of each teacher in each cell."""
    chosen = _of(cells, measurement)
    teachers = list(dict.fromkeys(teacher for cell in chosen for teacher in cell.teachers))
    if measurement == "accuracy":
        teachers = [STUDENT, *teachers]
    rows = [
        [teacher, *(_plus_minus(study_estimate(_figure(cell, figure, teacher), confidence)) for cell in chosen)]
        for teacher in teachers
    ]
    return _table(("", *(_name((cell.student, cell.task)) for cell in chosen)), rows)


def filter_table(cells: Sequence[CellSummary], confidence: float) -> str:
    """The oracle filter: tokens that are kept, and SR range times cosine before and after."""
    rows = []
    for cell in _of(cells, "paper"):
        parts = [study_estimate(_figure(cell, f"filter {name}"), confidence) for name in ("kept", "before", "after")]
        rows.append([_name((cell.student, cell.task)), *(_plus_minus(part) for part in parts)])
    return _table(("", "kept", "range x cosine", "after the filter"), rows)


def cost_table(cells: Sequence[CellSummary], confidence: float) -> str:
    """What a fixed precision and a decision cost: rollouts, by the width of the present intervals."""
    rows = []
    compare: dict[str, Callable[[CellSummary], StudyFigure | None]] = {
        "paper": difference("cosine", *COMPARED),
        "update": difference("update_gain", *COMPARED),
    }
    for cell in (one for one in cells if one.measurement in compare):
        rollouts = int(cell.facts["rollouts"]) + int(cell.facts.get("targeted_rollouts", 0))
        contrast = compare[cell.measurement](cell)
        growth = float("nan") if contrast is None else growth_to_decide(study_estimate(contrast, confidence))
        precise = float("nan")
        if cell.measurement == "paper":
            precise = (study_estimate(_figure(cell, "cosine"), confidence).half_width / TARGET_HALF_WIDTH) ** 2
        rows.append(
            [
                f"{_name((cell.student, cell.task))}, {MEASURED_BY[cell.measurement]}",
                _count(rollouts / max(1, cell.questions)),
                _count(cell.facts["tokens"]),
                _count(rollouts * precise),
                _count(rollouts * growth),
            ]
        )
    headings = ("", "rollouts a question", "tokens", f"rollouts for ±{TARGET_HALF_WIDTH}", "rollouts to decide")
    return _table(headings, rows)


def has(cells: Sequence[CellSummary], measurement: str) -> bool:
    """Whether there are cells of a measurement."""
    return bool(_of(cells, measurement))


def verdict_counts(verdicts: Iterable[Verdict], measurement: str) -> dict[str, int]:
    """How many findings of the paper have each verdict in a measurement."""
    of_paper = [verdict for verdict in verdicts if verdict.finding.source != OURS]
    given = [verdict.verdict for verdict in of_paper if verdict.measurement == measurement]
    return {verdict: given.count(verdict) for verdict in (HOLDS, DOES_NOT_HOLD, CANNOT_TELL)}


def _of(cells: Sequence[CellSummary], measurement: str) -> list[CellSummary]:
    return [cell for cell in cells if cell.measurement == measurement]


def _figure(cell: CellSummary, name: str, teacher: str = ALL_TEACHERS, paths: str = "all") -> StudyFigure:
    return cell.figures.get(FigureKey(name, teacher, paths), StudyFigure(float("nan"), {}))


def _name(place: tuple[str, str]) -> str:
    return " ".join(place)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; without spaces around the bars, which a reader of the page does not see."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"|{'|'.join(cell.replace('|', '∥') or ' ' for cell in line)}|" for line in lines)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.3f}"


def _plus_minus(estimate: Estimate) -> str:
    """The estimate with half the width of its interval, which lies symmetrically around it."""
    width = "" if np.isnan(estimate.half_width) else f"±{estimate.half_width:.3f}"
    return f"{_number(estimate.value)}{width}"


def _interval(estimate: Estimate) -> str:
    if np.isnan(estimate.value):
        return "not measured"
    if np.isnan(estimate.low):
        return f"{_number(estimate.value)} (no interval)"
    return f"{_number(estimate.value)} ({_number(estimate.low)}…{_number(estimate.high)})"


def _count(number: float) -> str:
    """A number with two or three digits, as far as it is known."""
    if not np.isfinite(number):
        return "-"
    digits = max(0, len(str(int(number))) - 2)
    return f"{round(number, -digits):,.0f}"
