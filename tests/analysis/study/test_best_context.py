"""Whether a context is best everywhere, with simultaneous intervals."""

import numpy as np
import pytest

from odp_callbacks.analysis.study.best_context import best_context_lead
from odp_callbacks.analysis.study.figures import CellSummary, FigureKey
from odp_callbacks.analysis.study.verdicts import CANNOT_TELL, DOES_NOT_HOLD, HOLDS, study_verdicts
from tests.helpers.study import cell_of, mean_of, normal_mean


def cells_of(*differences: float, deviation: float = 0.1) -> list[CellSummary]:
    """One cell for each difference between Self-1C and Self-1C1W."""
    return [
        cell_of(
            {
                FigureKey("cosine", "Self-1C"): normal_mean(0.0, deviation, seed=2 * i, task=f"t{i}"),
                FigureKey("cosine", "Self-1C1W"): normal_mean(-one, deviation, seed=2 * i + 1, task=f"t{i}"),
                FigureKey("cosine", "control"): normal_mean(9.0, seed=7, task=f"t{i}"),
            },
            task=f"t{i}",
        )
        for i, one in enumerate(differences)
    ]


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [((0.5, -0.5), HOLDS), ((0.5, 0.4), DOES_NOT_HOLD), ((0.5, 0.02), CANNOT_TELL), ((0.5,), CANNOT_TELL)],
)
def test_all_three_verdicts(differences: tuple[float, ...], verdict: str) -> None:
    found = study_verdicts(cells_of(*differences))
    of_contexts = [v for v in found if v.finding.id == "no-best-context" and v.measurement == "paper"]
    assert [v.verdict for v in of_contexts] == [verdict]


def test_the_lead_is_the_smallest_difference_of_the_best_context() -> None:
    assert best_context_lead(cells_of(0.5, 0.2), "paper").value == pytest.approx(0.2)
    assert best_context_lead(cells_of(0.5, -0.2), "paper").value == pytest.approx(-0.2)


def test_the_interval_covers_the_true_lead() -> None:
    rng = np.random.default_rng(0)
    truth, covered = np.array([[0.1, 0.05], [0.0, 0.1]]), 0  # (cells, contexts): the lead is -0.05
    for _ in range(200):
        cells = [
            cell_of(
                {
                    FigureKey("cosine", name): mean_of(rng.normal(truth[i, k], 0.3, size=12), f"t{i}")
                    for k, name in enumerate(("Self-1C", "Self-1C1W"))
                },
                task=f"t{i}",
            )
            for i in range(2)
        ]
        lead = best_context_lead(cells, "paper")
        covered += lead.low <= -0.05 <= lead.high
    assert covered >= 190  # at least 95 %: the intervals are conservative
