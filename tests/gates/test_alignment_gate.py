"""The gate that acts on measurements."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.gates import AlignmentGate, tokens_of
from odp_callbacks.gates.class_evidence import ALL_DEPTHS, ClassEvidence, class_name, window_indices
from tests.helpers.records import MakeReport

TOKENS = tokens_of(torch.ones(2, 8), [1.0, 0.0], teachers=("near",))
"""A correct and an incorrect rollout of 8 tokens."""


def weights(gate: AlignmentGate) -> list[list[float]]:
    return gate(TOKENS).reshape(2, 8).tolist()


def test_it_closes_classes_that_harm_and_keeps_those_that_help(make_report: MakeReport) -> None:
    gate = AlignmentGate(floor=0.1)
    gate.observe(make_report(lambda correct, depth: (-0.8 if correct else 0.8, 0.0)))
    correct, incorrect = weights(gate)
    assert correct == pytest.approx([0.1] * 8)
    assert incorrect == [1.0] * 8


def test_on_noise_it_closes_a_side_as_rarely_as_its_confidence_says(make_report: MakeReport) -> None:
    closed_count = 0
    for seed in range(60):
        gate = AlignmentGate(confidence=0.9)
        gate.observe(make_report(lambda correct, depth: (0.0, 0.0), noise=0.3, seed=seed, depths=(0, 2)))
        closed_count += sum(not gate.is_open("near", (correct, ALL_DEPTHS)) for correct in (True, False))
    # 5 % of 120; three standard deviations above it.
    assert closed_count <= 6 + 3 * (120 * 0.05 * 0.95) ** 0.5


def test_it_does_nothing_before_three_questions_give_an_interval(make_report: MakeReport) -> None:
    gate = AlignmentGate()
    gate.observe(make_report(lambda correct, depth: (-0.9, -0.9), questions=2))
    assert weights(gate) == [[1.0] * 8] * 2
    gate.observe(make_report(lambda correct, depth: (-0.9, -0.9), questions=2, first=2))
    assert weights(gate) == [[0.0] * 8] * 2


def test_a_window_can_differ_from_its_side(make_report: MakeReport) -> None:
    gate = AlignmentGate()
    gate.observe(make_report(lambda correct, depth: (0.9 if depth == 0 else -0.9, 0.0)))
    # Depth 1 was not measured: it follows the whole side, which harms.
    assert weights(gate) == [[1.0, *[0.0] * 7]] * 2


def test_a_switch_stays_until_the_whole_interval_is_on_the_other_side(make_report: MakeReport) -> None:
    gate = AlignmentGate(probes=1)
    for level, expected in ((-0.8, 0.0), (0.0, 0.0), (0.8, 1.0), (0.0, 1.0), (-0.8, 0.0)):
        gate.observe(make_report(lambda correct, depth, level=level: (level, 0.0), noise=0.4))
        assert weights(gate)[0][0] == expected, level


def test_proportional_weights_follow_the_gain_between_floor_and_maximum(make_report: MakeReport) -> None:
    gate = AlignmentGate(proportional=True, max_weight=1.4, windows=(0, 2, 5))
    gate.observe(make_report(lambda correct, depth: ({0: 0.3, 2: 0.6, 5: 0.9}[depth], 0.0), noise=0.01))
    correct, _ = weights(gate)
    assert correct[0] == pytest.approx(0.5, abs=0.05)
    assert correct[2] == pytest.approx(1.0, abs=0.05)
    assert correct[5] == pytest.approx(1.4)


def test_the_figures_of_a_class_are_those_of_the_summaries(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.2 + 0.5 * correct, -0.3), noise=0.2)
    evidence = ClassEvidence()
    evidence.add(report)
    for summary in Analysis(report).summaries():
        if summary.split in ("correct", "incorrect"):
            for name in ("predicted_gain", "gain_weighted_alignment"):
                estimate = evidence.estimate((summary.split == "correct", ALL_DEPTHS), summary.teacher, name)
                expected = summary.figures[name]
                assert estimate.value == pytest.approx(expected.value if not expected.note else estimate.value)
                if name == "predicted_gain":
                    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_only_the_last_probes_count(make_report: MakeReport) -> None:
    evidence = ClassEvidence(probes=2)
    values = []
    for level in (0.9, 0.5, 0.1):
        evidence.add(make_report(lambda correct, depth, level=level: (level, 0.0), noise=0.0))
        values.append(evidence.estimate((True, ALL_DEPTHS), "near").value)
    assert values == pytest.approx([0.9 / 4, 0.7 / 4, 0.3 / 4], rel=1e-6)


def test_a_class_in_which_success_never_differed_has_no_figure(make_report: MakeReport) -> None:
    evidence = ClassEvidence()
    evidence.add(make_report(lambda correct, depth: (0.5, 0.5), success=(0.5, 0.5)))
    estimate = evidence.estimate((True, ALL_DEPTHS), "near")
    assert np.isnan(estimate.value)
    assert estimate.note == "no difference"


def test_a_checkpoint_keeps_what_it_learned_in_plain_python(make_report: MakeReport) -> None:
    gate = AlignmentGate()
    gate.observe(make_report(lambda correct, depth: (-0.8 if correct else 0.3, 0.0), noise=0.3))
    restored = AlignmentGate()
    restored.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert weights(restored) == weights(gate)
    later_report = make_report(lambda correct, depth: (0.1, 0.0), noise=0.6, seed=1)
    gate.observe(later_report)
    restored.observe(later_report)
    assert weights(restored) == weights(gate)
    assert restored.scalars() == gate.scalars()


def test_it_logs_the_weight_of_each_class(make_report: MakeReport) -> None:
    gate = AlignmentGate()
    gate.observe(make_report(lambda correct, depth: (-0.8 if correct else 0.8, 0.0)))
    logged_weights = gate.scalars()
    assert logged_weights["odp/gate/near/correct depth 4-7"] == 0
    assert logged_weights["odp/gate/near/incorrect"] == 1


def test_a_teacher_that_no_probe_measures_is_named(make_report: MakeReport) -> None:
    gate = AlignmentGate()
    gate.observe(make_report(lambda correct, depth: (0.0, 0.0)))
    with pytest.raises(ValueError, match=r"knows the teachers \['near', 'far'\].*distils from 'self'"):
        gate(tokens_of(torch.ones(1, 1), [1.0], teachers=("self",)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"figure": "alignment"}, "`figure` must be one of"),
        ({"floor": 1.5}, "`floor` must lie in"),
        ({"max_weight": 0.5}, "`max_weight` must be finite and at least 1"),
        ({"probes": 0}, "`probes` must be a positive integer"),
        ({"windows": (1, 2)}, "`windows` must be depths that rise from 0"),
        ({"windows": (0, 2, 2)}, "`windows` must be depths that rise from 0"),
        ({"confidence": 1.0}, "`confidence` must lie in"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AlignmentGate(**options)


def test_windows_are_those_of_the_summaries(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.5, 0.5), depths=(0, 1, 2, 3, 4, 7, 8, 100))
    expected = {summary.split for summary in Analysis(report).summaries("depth")}
    indices = window_indices(torch.tensor([0, 1, 2, 3, 4, 7, 8, 100]), ClassEvidence().windows)
    assert {class_name((True, int(index))).removeprefix("correct ") for index in indices} == expected
