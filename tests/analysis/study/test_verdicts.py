"""The verdict of every finding, from constructed cells; nothing but intervals decides."""

import numpy as np
import pytest

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.study.figures import GAP, FigureKey
from odp_callbacks.analysis.study.findings import FINDINGS
from odp_callbacks.analysis.study.verdicts import (
    CANNOT_TELL,
    DOES_NOT_HOLD,
    HOLDS,
    Verdict,
    study_verdicts,
    verdict_of,
)
from tests.helpers.study import cell_of, normal_mean

HEADLINE = FigureKey("cosine", paths=GAP)


def headline(*cells) -> Verdict:
    verdicts = study_verdicts(cells)
    return next(v for v in verdicts if v.finding.id == "incorrect-above-correct" and v.measurement == "paper")


@pytest.mark.parametrize(("mean", "verdict"), [(0.2, HOLDS), (-0.2, DOES_NOT_HOLD), (0.01, CANNOT_TELL)])
def test_the_interval_of_the_contrast_decides(mean: float, verdict: str) -> None:
    found = headline(cell_of({HEADLINE: normal_mean(mean)}))
    assert found.verdict == verdict
    assert found.estimate.value == pytest.approx(mean)
    assert found.of_cells["small", "sums"][1] == verdict


def test_a_claim_with_two_bounds() -> None:
    def estimate(low: float, high: float) -> Estimate:
        return Estimate((low + high) / 2, low, high, 9, 9)

    assert verdict_of(estimate(-0.05, 0.05), (-0.1, 0.1)) == HOLDS
    assert verdict_of(estimate(0.15, 0.2), (-0.1, 0.1)) == DOES_NOT_HOLD
    assert verdict_of(estimate(-0.3, 0.3), (-0.1, 0.1)) == CANNOT_TELL
    assert verdict_of(estimate(0.0, 0.3), (0.0, float("inf"))) == CANNOT_TELL


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.id)
def test_no_finding_is_told_without_an_interval(finding) -> None:
    empty = [v for v in study_verdicts([cell_of({})]) if v.finding == finding]
    assert {v.verdict for v in empty} == {CANNOT_TELL}
    two_questions = cell_of({HEADLINE: normal_mean(5.0, questions=2)})
    assert headline(two_questions).verdict == CANNOT_TELL


def test_cells_are_averaged_and_told_apart() -> None:
    cells = [
        cell_of({HEADLINE: normal_mean(0.3, seed=1)}),
        cell_of({HEADLINE: normal_mean(-0.1, seed=2, task="products")}, task="products"),
    ]
    found = headline(*cells)
    assert found.estimate.value == pytest.approx(0.1)
    assert [verdict for _, verdict in found.of_cells.values()] == [HOLDS, DOES_NOT_HOLD]
    half_width = 0.5 * np.hypot(0.1, 0.1) / np.sqrt(20)
    assert found.estimate.half_width == pytest.approx(2.02 * half_width, rel=0.01)


def test_teachers_are_compared_whatever_the_case_of_their_names() -> None:
    figures = {FigureKey("cosine", "self-1c"): normal_mean(0.3), FigureKey("cosine", "SELF-1C1W"): normal_mean(0.1)}
    found = [v for v in study_verdicts([cell_of(figures)]) if v.finding.id == "wrong-response-lowers"]
    assert found[0].estimate.value == pytest.approx(0.2)


def test_the_difference_is_set_beside_that_of_a_control() -> None:
    figures = {HEADLINE: normal_mean(0.3), FigureKey("cosine", "control", GAP): normal_mean(0.25, seed=1)}
    found = study_verdicts([cell_of(figures)])
    beyond = next(v for v in found if v.finding.id == "incorrect-above-correct-beyond-control")
    assert beyond.estimate.value == pytest.approx(0.05)
    without_control = study_verdicts([cell_of({HEADLINE: normal_mean(0.3)})])
    assert next(v for v in without_control if v.finding == beyond.finding).verdict == CANNOT_TELL
