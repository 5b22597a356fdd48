"""Intervals of combined figures, against independent formulas."""

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.paper.aggregates import mean_over_questions
from odp_callbacks.analysis.study.figures import (
    FigureKey,
    StudyFigure,
    combination,
    figures_without_each,
    mean_figure,
    study_estimate,
)
from tests.helpers.study import mean_of


def test_one_task_has_the_interval_of_students_t() -> None:
    values = np.random.default_rng(0).normal(size=11)
    estimate, expected = study_estimate(mean_of(values)), mean_over_questions(values, nodes=11)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    assert estimate.questions == 11


def test_tasks_are_strata_with_the_degrees_of_welch_and_satterthwaite() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=8), rng.normal(3.0, 2.0, size=15)
    difference = combination([(1.0, mean_of(second, "b")), (-1.0, mean_of(first, "a"))])
    estimate = study_estimate(difference)
    expected = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_two_students_on_the_same_questions_are_paired() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(size=12)
    first, second = difficulty + 0.1 * rng.normal(size=12), difficulty + 0.1 * rng.normal(size=12)
    paired = study_estimate(combination([(1.0, mean_of(first)), (-1.0, mean_of(second))]))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    both = mean_figure([mean_of(first), mean_of(second)])
    assert both is not None
    clustered = mean_over_questions((first + second) / 2, nodes=12)
    assert study_estimate(both).low == pytest.approx(clustered.low)


def test_too_few_questions_or_no_spread_give_no_interval() -> None:
    assert np.isnan(study_estimate(mean_of(np.array([0.0, 1.0]))).low)
    assert np.isnan(study_estimate(StudyFigure(1.0, {})).low)
    few = combination([(1.0, mean_of(np.arange(9.0), "a")), (1.0, mean_of(np.arange(2.0), "b"))])
    assert np.isnan(study_estimate(few).low)
    assert np.isnan(study_estimate(StudyFigure(1.0, {f"t/{i}": float("nan") for i in range(9)})).low)


def test_a_question_without_part_in_a_figure_does_not_count() -> None:
    values = {0: 1.0, 1: 3.0, 2: float("nan")}

    def mean(left_out: int | None) -> dict[FigureKey, float]:
        return {FigureKey("mean"): float(np.nanmean([v for q, v in values.items() if q != left_out]))}

    found = figures_without_each({q: f"t/{q}" for q in values}, mean)[FigureKey("mean")]
    assert found == StudyFigure(2.0, {"t/0": 3.0, "t/1": 1.0})


def test_an_undefined_figure_is_left_out_of_a_mean() -> None:
    assert mean_figure([StudyFigure(float("nan"), {}), StudyFigure(2.0, {})]) == StudyFigure(2.0, {})
    assert mean_figure([StudyFigure(float("nan"), {})]) is None


def test_only_questions_that_tell_something_give_degrees_of_freedom() -> None:
    values = np.random.default_rng(3).normal(size=12)
    figure = StudyFigure(mean_of(values, "t").value, mean_of(values, "t").left_out, {"t": 4})
    expected = stats.t.ppf(0.975, 4) * values.std(ddof=1) / np.sqrt(12)
    assert study_estimate(figure).half_width == pytest.approx(expected)
    assert np.isnan(study_estimate(StudyFigure(figure.value, figure.left_out, {"t": 2})).low)
    fewer = StudyFigure(0.0, figure.left_out, {"t": 3})
    assert combination([(1.0, figure), (1.0, fewer)]).informative == {"t": 3}
