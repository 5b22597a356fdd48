"""The gate that acts on measurements."""

import json
from typing import Any

import pytest
import torch

from odp_callbacks.gates import AlignmentGate, tokens_of
from odp_callbacks.gates.class_evidence import ALL_DEPTHS
from tests.helpers.records import MakeReport
from tests.helpers.updates import update_only, with_update

TOKENS = tokens_of(torch.ones(2, 8), [1.0, 0.0], teachers=("near",))
"""A correct and an incorrect rollout of 8 tokens."""


def weights(gate: AlignmentGate) -> list[list[float]]:
    return gate(TOKENS).reshape(2, 8).tolist()


def test_it_acts_on_the_update_gain_of_probes_without_continuations(make_report: MakeReport) -> None:
    gate = AlignmentGate(floor=0.1)
    report = make_report(lambda correct, depth: (0.0, 0.0), questions=8)
    gate.observe(update_only(report, lambda correct: (-0.8 if correct else 0.8, 0.0)))
    correct, incorrect = weights(gate)
    assert correct == pytest.approx([0.1] * 8)
    assert incorrect == [1.0] * 8
    assert gate.scalars() == {
        "odp/gate/near/incorrect": 1.0,
        "odp/gate/near/correct": 0.1,
        "odp/gate/far/incorrect": 1.0,
        "odp/gate/far/correct": 1.0,
    }


def test_weights_in_proportion_to_the_update_gain(make_report: MakeReport) -> None:
    gate = AlignmentGate(proportional=True)
    report = make_report(lambda correct, depth: (0.0, 0.0), questions=8)
    gate.observe(update_only(report, lambda correct: (0.3 if correct else 0.9, 0.0), noise=0.001))
    correct, incorrect = weights(gate)
    assert correct[0] == pytest.approx(0.5, abs=0.05)
    assert incorrect[0] == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("figure", ["update_gain", "predicted_gain"])
def test_a_state_of_another_figure_is_refused(make_report: MakeReport, figure: str) -> None:
    gate = AlignmentGate("gain_weighted_alignment")
    gate.observe(make_report(lambda correct, depth: (-0.8, 0.3)))
    with pytest.raises(ValueError, match=f"the figure 'gain_weighted_alignment', but this one has '{figure}'"):
        AlignmentGate(figure).load_state_dict(gate.state_dict())


def test_it_closes_classes_that_harm_and_keeps_those_that_help(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain", floor=0.1)
    gate.observe(make_report(lambda correct, depth: (-0.8 if correct else 0.8, 0.0)))
    correct, incorrect = weights(gate)
    assert correct == pytest.approx([0.1] * 8)
    assert incorrect == [1.0] * 8


def test_on_noise_it_closes_a_side_as_rarely_as_its_confidence_says(make_report: MakeReport) -> None:
    closed_count = 0
    for seed in range(60):
        gate = AlignmentGate("predicted_gain", confidence=0.9)
        gate.observe(make_report(lambda correct, depth: (0.0, 0.0), noise=0.3, seed=seed, depths=(0, 2)))
        closed_count += sum(not gate.is_open("near", (correct, ALL_DEPTHS)) for correct in (True, False))
    # 5 % of 120; three standard deviations above it.
    assert closed_count <= 6 + 3 * (120 * 0.05 * 0.95) ** 0.5


def test_it_does_nothing_before_three_questions_give_an_interval(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain")
    gate.observe(make_report(lambda correct, depth: (-0.9, -0.9), questions=2))
    assert weights(gate) == [[1.0] * 8] * 2
    gate.observe(make_report(lambda correct, depth: (-0.9, -0.9), questions=2, first=2))
    assert weights(gate) == [[0.0] * 8] * 2


def test_a_window_can_differ_from_its_side(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain")
    gate.observe(make_report(lambda correct, depth: (0.9 if depth == 0 else -0.9, 0.0)))
    # Depth 1 was not measured: it follows the whole side, which harms.
    assert weights(gate) == [[1.0, *[0.0] * 7]] * 2


def test_a_switch_stays_until_the_whole_interval_is_on_the_other_side(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain", probes=1)
    for level, expected in ((-0.8, 0.0), (0.0, 0.0), (0.8, 1.0), (0.0, 1.0), (-0.8, 0.0)):
        gate.observe(make_report(lambda correct, depth, level=level: (level, 0.0), noise=0.4))
        assert weights(gate)[0][0] == expected, level


def test_proportional_weights_follow_the_gain_between_floor_and_maximum(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain", proportional=True, max_weight=1.4, windows=(0, 2, 5))
    gate.observe(make_report(lambda correct, depth: ({0: 0.3, 2: 0.6, 5: 0.9}[depth], 0.0), noise=0.01))
    correct, _ = weights(gate)
    assert correct[0] == pytest.approx(0.5, abs=0.05)
    assert correct[2] == pytest.approx(1.0, abs=0.05)
    assert correct[5] == pytest.approx(1.4)


@pytest.mark.parametrize("figure", ["update_gain", "predicted_gain"])
def test_a_checkpoint_keeps_what_it_learned_in_plain_python(make_report: MakeReport, figure: str) -> None:
    gate = AlignmentGate(figure)
    first_report = make_report(lambda correct, depth: (-0.8 if correct else 0.3, 0.0), noise=0.3)
    gate.observe(with_update(first_report, lambda correct: (-0.8 if correct else 0.3, 0.0)))
    restored = AlignmentGate(figure)
    restored.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert weights(restored) == weights(gate)
    assert 0 in weights(gate)[0]
    later_report = make_report(lambda correct, depth: (0.1, 0.0), noise=0.6, seed=1)
    later_report = with_update(later_report, lambda correct: (0.1, 0.0), noise=0.6, seed=1)
    gate.observe(later_report)
    restored.observe(later_report)
    assert weights(restored) == weights(gate)
    assert restored.scalars() == gate.scalars()


def test_it_logs_the_weight_of_each_class(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain")
    gate.observe(make_report(lambda correct, depth: (-0.8 if correct else 0.8, 0.0)))
    logged_weights = gate.scalars()
    assert logged_weights["odp/gate/near/correct depth 4-7"] == 0
    assert logged_weights["odp/gate/near/incorrect"] == 1


def test_a_teacher_that_no_probe_measures_is_named(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain")
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
        ({"figure": "predicted_gain", "windows": (1, 2)}, "`windows` must be depths that rise from 0"),
        ({"figure": "predicted_gain", "windows": (0, 2, 2)}, "`windows` must be depths that rise from 0"),
        ({"windows": (0, 2)}, "`windows` was given .* known for all depths together"),
        ({"confidence": 1.0}, "`confidence` must lie in"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AlignmentGate(**options)
