"""Summaries of the paper's protocol, against the library's own tables of the same record."""

import numpy as np
import pytest

from odp_callbacks.analysis.paper.aggregates import FIGURES, class_difference, teacher_figures
from odp_callbacks.analysis.paper.oracle_filter import oracle_filter
from odp_callbacks.analysis.paper.predictor_correlations import path_correlations
from odp_callbacks.analysis.paper.records import PREDICTORS
from odp_callbacks.analysis.paper.scored_nodes import score_nodes
from odp_callbacks.analysis.study.figures import GAP, UNBIASED, FigureKey, study_estimate
from odp_callbacks.analysis.study.paper_summary import paper_figures, paper_summary
from tests.helpers.paper import example_record, random_nodes


def test_teachers_means_are_those_of_the_papers_table() -> None:
    nodes = random_nodes()
    figures = paper_figures(nodes)
    for expected in teacher_figures(nodes):
        for name in FIGURES:
            found = figures[FigureKey(name, expected.teacher, expected.paths)]
            assert found == pytest.approx(getattr(expected, name).value)
    for name in FIGURES:
        expected_gap = class_difference(nodes, name).difference.value
        assert figures[FigureKey(name, paths=GAP)] == pytest.approx(expected_gap)


def test_correlations_and_the_filter_are_those_of_the_paper() -> None:
    nodes = random_nodes(count=120)
    figures = paper_figures(nodes)
    correlations = path_correlations(nodes)
    for name in ("depth", *PREDICTORS):
        assert figures[FigureKey(f"correlation {name}")] == pytest.approx(correlations["all", name].value)
    for one in oracle_filter(nodes):
        assert figures[FigureKey("filter kept", one.teacher)] == pytest.approx(one.kept)
        assert figures[FigureKey("filter after", one.teacher)] == pytest.approx(one.after)


def test_a_control_is_left_out_of_means_over_teachers() -> None:
    nodes = random_nodes(teachers=2)
    named = type(nodes)(**{**nodes.__dict__, "teachers": ("Self-1C", "control")})
    figures = paper_figures(named)
    for name in ("cosine", "filter kept", "correlation depth"):
        assert figures[FigureKey(name)] == pytest.approx(figures[FigureKey(name, "Self-1C")])
    assert figures[FigureKey("cosine", paths=GAP)] == pytest.approx(figures[FigureKey("cosine", "Self-1C", GAP)])
    assert figures[FigureKey("cosine", "control")] != figures[FigureKey("cosine")]


def test_the_interval_of_a_record_is_that_of_the_table() -> None:
    record = example_record()
    names = ["d", "c", "b", "a"]
    cell = paper_summary(record, "small", "worlds", names)
    difference = class_difference(score_nodes(record)).difference
    found = study_estimate(cell.figures[FigureKey("cosine", paths=GAP)])
    assert (found.value, found.low, found.high) == pytest.approx((difference.value, difference.low, difference.high))
    assert set(cell.figures[FigureKey("cosine")].left_out) <= {f"worlds/{name}" for name in names}
    unbiased = class_difference(score_nodes(record, own_path="left out", ancestors="own policy only")).difference
    assert cell.figures[FigureKey(UNBIASED, paths=GAP)].value == pytest.approx(unbiased.value)
    assert cell.questions == 4
    assert cell.facts["targeted_rollouts"] == record.targeted_rollouts
    assert all(np.isfinite(figure.value) for figure in cell.figures.values())
