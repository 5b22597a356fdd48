"""Evidence from the updates of the last probes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.gates.class_evidence import ALL_DEPTHS
from odp_callbacks.gates.update_evidence import UpdateEvidence
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import concatenate
from tests.helpers.records import MakeReport
from tests.helpers.updates import update_only

CORRECT, INCORRECT = (True, ALL_DEPTHS), (False, ALL_DEPTHS)


@pytest.fixture
def probe(make_report: MakeReport) -> ProbeReport:
    """Of eight questions, without continuations."""
    report = make_report(lambda correct, depth: (0.0, 0.0), questions=8)
    return update_only(report, lambda correct: (0.5 if correct else -0.3, 0.2), noise=0.3)


def test_figures_and_differences_are_those_of_the_summaries(probe: ProbeReport) -> None:
    evidence = UpdateEvidence()
    evidence.add(probe)
    assert evidence.classes() == [INCORRECT, CORRECT]
    analysis = Analysis(probe)
    for token_class, split in ((CORRECT, "correct"), (INCORRECT, "incorrect")):
        for summary in analysis.summaries():
            if summary.split == split:
                expected = summary.figures["update_gain"]
                assert replace(evidence.estimate(token_class, summary.teacher), questions=8) == expected
        (contrast,) = [contrast for contrast in analysis.contrasts() if contrast.split == split]
        expected = contrast.figures["update_gain"]
        found = evidence.difference(token_class, "near", "far")
        assert (found.value, found.low, found.high) == (expected.value, expected.low, expected.high)


def test_the_same_questions_in_several_probes_count_once(probe: ProbeReport) -> None:
    """A copy of a probe says nothing new: value and interval stay as they are."""
    once, twice = UpdateEvidence(), UpdateEvidence()
    once.add(probe)
    twice.add(probe)
    twice.add(probe)
    for token_class in (CORRECT, INCORRECT):
        first, second = once.estimate(token_class, "near"), twice.estimate(token_class, "near")
        assert (second.value, second.low, second.high) == pytest.approx((first.value, first.low, first.high))
        assert second.questions == 8


def test_other_questions_make_the_interval_narrower(make_report: MakeReport) -> None:
    evidence = UpdateEvidence()
    widths = []
    for probe in range(4):
        report = make_report(lambda correct, depth: (0.0, 0.0), questions=8, first=8 * probe)
        evidence.add(update_only(report, lambda correct: (0.5, 0.2), noise=0.3, seed=probe))
        widths.append(evidence.estimate(CORRECT, "near").half_width)
    assert evidence.estimate(CORRECT, "near").questions == 32
    assert widths[-1] < 0.7 * widths[0]


def test_the_parts_of_several_processes_are_told_apart(make_report: MakeReport) -> None:
    parts = [
        update_only(
            make_report(lambda correct, depth: (0.0, 0.0), questions=4, first=4 * rank),
            lambda correct: (0.5, 0.2),
            seed=rank,
        )
        for rank in range(2)
    ]
    evidence = UpdateEvidence()
    evidence.add(concatenate(parts))
    assert evidence.estimate(CORRECT, "near").questions == 8
    evidence.add(concatenate(parts[::-1]))
    assert evidence.estimate(CORRECT, "near").questions == 8


def test_rows_with_the_same_id_count_each(probe: ProbeReport) -> None:
    same = replace(probe, rollouts=tuple(replace(rollout, question="q") for rollout in probe.rollouts))
    evidence = UpdateEvidence()
    evidence.add(same)
    assert evidence.estimate(CORRECT, "near").questions == 8


def test_only_the_last_probes_count(make_report: MakeReport) -> None:
    evidence = UpdateEvidence(probes=2)
    report = make_report(lambda correct, depth: (0.0, 0.0), questions=4)
    values = []
    for level in (0.9, 0.5, 0.1):
        evidence.add(update_only(report, lambda correct, level=level: (level, 0.0), noise=0.0))
        values.append(evidence.estimate(CORRECT, "near").value)
    single = []
    for level in (0.9, 0.5, 0.1):
        alone = UpdateEvidence()
        alone.add(update_only(report, lambda correct, level=level: (level, 0.0), noise=0.0))
        single.append(alone.estimate(CORRECT, "near").value)
    assert values == pytest.approx([single[0], (single[0] + single[1]) / 2, (single[1] + single[2]) / 2])


def test_a_class_without_rollouts_is_none(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.0, 0.0), questions=8)
    incorrect = replace(report, rollouts=tuple(rollout for rollout in report.rollouts if not rollout.correct))
    evidence = UpdateEvidence()
    evidence.add(update_only(incorrect, lambda correct: (0.5, 0.2)))
    assert evidence.classes() == [INCORRECT]
    assert np.isnan(evidence.estimate(CORRECT, "near").value)


def test_a_probe_without_an_update_is_refused(make_report: MakeReport) -> None:
    with pytest.raises(ValueError, match=r"no update \(`update=False`\).*use `figure='predicted_gain'`"):
        UpdateEvidence().add(make_report(lambda correct, depth: (0.0, 0.0)))


def test_other_teachers_need_a_new_gate(probe: ProbeReport) -> None:
    evidence = UpdateEvidence()
    evidence.add(probe)
    with pytest.raises(ValueError, match="use a new gate"):
        evidence.add(replace(probe, teachers=("near", "other")))


def test_the_state_of_sixteen_questions_and_two_teachers_is_small(make_report: MakeReport) -> None:
    evidence = UpdateEvidence(probes=4)
    for probe in range(6):
        report = make_report(lambda correct, depth: (0.0, 0.0), questions=16)
        evidence.add(update_only(report, lambda correct: (0.5, 0.2), seed=probe))
    assert len(json.dumps(evidence.state_dict())) < 600_000
