"""Every aggregate against plain loops and scipy."""

import warnings

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.paper.aggregates import (
    CLASSES,
    class_difference,
    class_difference_change,
    class_gaps,
    of_class,
    teacher_figures,
)
from odp_callbacks.analysis.paper.oracle_filter import oracle_filter
from odp_callbacks.analysis.paper.predictor_correlations import path_correlations, spearman
from tests.helpers.paper import random_nodes

NODES = random_nodes()


def along_path(figure, cosine, advantage, success_range):
    """The mean of a figure over the nodes of one path."""
    if figure == "advantage":
        return np.mean(advantage)
    kept = [(c, w) for c, w in zip(cosine, success_range, strict=True) if not np.isnan(c)]
    if not kept:
        return np.nan
    if figure == "weighted_cosine":
        return sum(c * w for c, w in kept) / sum(w for _, w in kept)
    return np.mean([c > 0 if figure == "positive" else c for c, _ in kept])


def by_question(nodes, figure, teacher, paths):
    """For each question, the mean over its paths."""
    found = {}
    for question in sorted(set(nodes.question)):
        means = []
        for path in sorted(set(nodes.path[nodes.question == question])):
            rows = np.flatnonzero(nodes.path == path)
            if paths == "all" or nodes.correct[rows[0]] == (paths == "correct"):
                columns = nodes.cosine[rows, teacher], nodes.advantage[rows, teacher], nodes.success_range[rows]
                means.append(along_path(figure, *columns))
        means = [mean for mean in means if not np.isnan(mean)]
        if means:
            found[question] = np.mean(means)
    return found


@pytest.mark.parametrize("figure", ["cosine", "positive", "weighted_cosine", "advantage"])
@pytest.mark.parametrize("paths", CLASSES)
@pytest.mark.parametrize("teacher", range(2))
def test_figures_are_means_of_means_with_students_t(figure, paths, teacher):
    values = list(by_question(NODES, figure, teacher, paths).values())
    (figures,) = (f for f in teacher_figures(NODES) if (f.teacher, f.paths) == (f"teacher {teacher}", paths))
    estimate = getattr(figures, figure)
    interval = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    low, high = np.clip(interval, 0 if figure == "positive" else -1, 1)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((np.mean(values), low, high))
    assert estimate.questions == len(values)


@pytest.mark.parametrize("figure", ["cosine", "advantage"])
def test_the_difference_of_the_classes_is_a_paired_t_test(figure):
    means = {}
    for paths in ("correct", "incorrect"):
        of_teachers = [by_question(NODES, figure, teacher, paths) for teacher in range(2)]
        for question in set().union(*of_teachers):
            means[paths, question] = np.mean([found[question] for found in of_teachers if question in found])
    both = [q for q in range(5) if ("correct", q) in means and ("incorrect", q) in means]
    incorrect, correct = ([means[paths, q] for q in both] for paths in ("incorrect", "correct"))
    expected = stats.ttest_rel(incorrect, correct)
    found = class_difference(NODES, figure)
    assert found.difference.value == pytest.approx(np.mean(incorrect) - np.mean(correct))
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_a_change_of_the_difference_is_paired_by_question():
    other = random_nodes(seed=1)
    gaps, others = class_gaps(NODES), class_gaps(other)
    changes = [gaps[question] - others[question] for question in sorted(gaps.keys() & others.keys())]
    found = class_difference_change(NODES, other)
    low, high = stats.t.interval(0.95, len(changes) - 1, np.mean(changes), stats.sem(changes))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(changes), low, high))


def test_correlations_are_those_of_scipy_averaged_over_paths():
    found = path_correlations(NODES)
    columns = {"depth": NODES.depth[:, None].repeat(2, axis=1), **NODES.predictors}
    for name, column in columns.items():
        of_all = []
        for teacher in range(2):
            values = []
            for path in sorted(set(NODES.path)):
                rows = (NODES.path == path) & np.isfinite(NODES.cosine[:, teacher])
                if rows.sum() >= 3:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", stats.ConstantInputWarning)
                        values.append(stats.spearmanr(NODES.cosine[rows, teacher], column[rows, teacher]).statistic)
            values = [value for value in values if not np.isnan(value)]
            assert found[f"teacher {teacher}", name].value == pytest.approx(np.mean(values))
            of_all += values
        assert found["all", name].value == pytest.approx(np.mean(of_all))


def test_a_correlation_of_too_few_or_of_equal_values_is_undefined():
    assert np.isnan(spearman(np.array([1.0, 2.0]), np.array([1.0, 2.0])))
    assert np.isnan(spearman(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])))
    assert spearman(np.array([1.0, np.nan, 2.0, 3.0]), np.array([3.0, 9.0, 2.0, 1.0])) == pytest.approx(-1)


def test_the_oracle_filter_keeps_tokens_with_positive_alignment():
    filters = {one.teacher: one for one in oracle_filter(NODES)}
    for teacher in range(2):
        pairs = [(c, c * r) for c, r in zip(NODES.cosine[:, teacher], NODES.success_range, strict=True) if c == c]
        one = filters[f"teacher {teacher}"]
        assert one.kept == pytest.approx(np.mean([c > 0 for c, _ in pairs]))
        assert one.before == pytest.approx(np.mean([product for _, product in pairs]))
        assert one.after == pytest.approx(np.mean([product for c, product in pairs if c > 0]))
    assert filters["all"].tokens == filters["teacher 0"].tokens + filters["teacher 1"].tokens


def test_without_nodes_every_figure_is_undefined():
    empty = NODES.select(np.zeros(len(NODES), dtype=bool))
    assert all(np.isnan(figures.cosine.value) for figures in teacher_figures(empty))
    assert np.isnan(class_difference(empty).difference.value)
    assert np.isnan(oracle_filter(empty)[0].kept)
    assert np.isnan(path_correlations(empty)["all", "depth"].value)


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="`paths` must be one of"):
        of_class(NODES, "wrong")
