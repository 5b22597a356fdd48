"""Evidence from the nodes of the last probes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.gates.class_evidence import ALL_DEPTHS, class_name, window_indices
from odp_callbacks.gates.node_evidence import NODE_FIGURES, NodeEvidence
from tests.helpers.records import MakeReport


@pytest.mark.parametrize("figure", NODE_FIGURES)
def test_the_figures_of_a_class_are_those_of_the_summaries(make_report: MakeReport, figure: str) -> None:
    report = make_report(lambda correct, depth: (0.2 + 0.5 * correct, -0.3), noise=0.2)
    evidence = NodeEvidence(figure)
    evidence.add(report)
    for summary in Analysis(report).summaries():
        if summary.split in ("correct", "incorrect"):
            estimate = evidence.estimate((summary.split == "correct", ALL_DEPTHS), summary.teacher)
            expected = summary.figures[figure]
            assert estimate.value == pytest.approx(expected.value if not expected.note else estimate.value)
            if figure == "predicted_gain":
                assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_only_the_last_probes_count(make_report: MakeReport) -> None:
    evidence = NodeEvidence(probes=2)
    values = []
    for level in (0.9, 0.5, 0.1):
        evidence.add(make_report(lambda correct, depth, level=level: (level, 0.0), noise=0.0))
        values.append(evidence.estimate((True, ALL_DEPTHS), "near").value)
    assert values == pytest.approx([0.9 / 4, 0.7 / 4, 0.3 / 4], rel=1e-6)


def test_a_class_in_which_success_never_differed_has_no_figure(make_report: MakeReport) -> None:
    evidence = NodeEvidence()
    evidence.add(make_report(lambda correct, depth: (0.5, 0.5), success=(0.5, 0.5)))
    estimate = evidence.estimate((True, ALL_DEPTHS), "near")
    assert np.isnan(estimate.value)
    assert estimate.note == "no difference"


def test_windows_are_those_of_the_summaries(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.5, 0.5), depths=(0, 1, 2, 3, 4, 7, 8, 100))
    expected = {summary.split for summary in Analysis(report).summaries("depth")}
    indices = window_indices(torch.tensor([0, 1, 2, 3, 4, 7, 8, 100]), NodeEvidence().windows)
    assert {class_name((True, int(index))).removeprefix("correct ") for index in indices} == expected


def test_probes_without_continuations_are_refused_where_they_never_have_any(make_report: MakeReport) -> None:
    report = replace(make_report(lambda correct, depth: (0.5, 0.5)), nodes=())
    evidence = NodeEvidence()
    evidence.add(report)  # all of its continuations happened to be left out
    assert evidence.classes() == []
    with pytest.raises(ValueError, match=r"has no continuations \(`budget=0`\).*use `figure='update_gain'`"):
        evidence.add(replace(report, settings={"budget": 0}))
