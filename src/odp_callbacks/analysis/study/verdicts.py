"""The verdict of each finding, from the summaries of a study's cells."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.study.best_context import NO_BEST_CONTEXT, best_context_lead
from odp_callbacks.analysis.study.figures import NOT_MEASURED, CellSummary, mean_figure, study_estimate
from odp_callbacks.analysis.study.findings import FINDINGS, Finding

HOLDS, DOES_NOT_HOLD, CANNOT_TELL = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """What the data say of a finding.

    Attributes:
        finding: The finding.
        measurement: How the contrast was measured.
        estimate: The contrast's mean over the cells, with its interval.
        verdict: :data:`HOLDS`, :data:`DOES_NOT_HOLD` or :data:`CANNOT_TELL`.
        of_cells: The contrast and the verdict of each cell, by (student, task).
    """

    finding: Finding
    measurement: str
    estimate: Estimate
    verdict: str
    of_cells: dict[tuple[str, str], tuple[Estimate, str]]


def verdict_of(estimate: Estimate, claim: tuple[float, float]) -> str:
    """Say whether a finding holds, by the interval of its contrast and nothing else.

    Args:
        estimate: The contrast; without an interval nothing can be told.
        claim: The open range that the finding claims.

    Examples:
        >>> verdict_of(Estimate(0.2, 0.1, 0.3, 9, 9), (0.0, float("inf")))
        'holds'
        >>> verdict_of(Estimate(0.2, -0.1, 0.5, 9, 9), (0.0, float("inf")))
        'cannot tell'
    """
    low, high = claim
    if np.isnan(estimate.low) or np.isnan(estimate.high):
        return CANNOT_TELL
    if low < estimate.low and estimate.high < high:
        return HOLDS
    return DOES_NOT_HOLD if estimate.high <= low or estimate.low >= high else CANNOT_TELL


def study_verdicts(cells: Sequence[CellSummary], confidence: float = 0.95) -> list[Verdict]:
    """The verdict of every finding in every measurement that asks it.

    The tested contrast is the mean over the cells, students and tasks weighing the same. Its interval is for these
    students and tasks, and for questions like theirs.

    Args:
        cells: Summaries of cells.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        Verdicts in the order of the findings. One that no cell measured has an estimate of NaN, and cannot be told.
    """
    verdicts = []
    for finding in FINDINGS:
        for measurement, contrast in finding.contrasts.items():
            measured = {
                (cell.student, cell.task): of_cell
                for cell in cells
                if cell.measurement == measurement and (of_cell := contrast(cell)) is not None
            }
            mean = mean_figure(list(measured.values()))
            estimate = NOT_MEASURED if mean is None else study_estimate(mean, confidence)
            of_cells = {}
            for place, of_cell in measured.items():
                one = study_estimate(of_cell, confidence)
                of_cells[place] = one, verdict_of(one, finding.claim)
            verdict = verdict_of(estimate, finding.claim)
            verdicts.append(Verdict(finding, measurement, estimate, verdict, of_cells))
    for measurement in NO_BEST_CONTEXT.contrasts:
        lead = best_context_lead(cells, measurement, confidence)
        verdict = verdict_of(lead, NO_BEST_CONTEXT.claim)
        verdicts.append(Verdict(NO_BEST_CONTEXT, measurement, lead, verdict, {}))
    return verdicts
