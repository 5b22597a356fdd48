"""Rules scored by what they would do to a whole update."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.gates import RULES, AlignmentGate, IncorrectRolloutGate, score_rules
from odp_callbacks.gates.rules import correct_rollouts, everything, high_entropy, incorrect_rollouts
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import concatenate
from tests.helpers.records import MakeReport
from tests.helpers.updates import update_only, with_features, with_update


def gains(correct: bool) -> tuple[float, ...]:
    """The first teacher harms correct rollouts, the second helps everywhere."""
    return (-0.6, 0.6) if correct else (0.8, 0.3)


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    """Of twelve questions, without continuations."""
    return with_features(update_only(make_report(lambda correct, depth: (0.0, 0.0), questions=12), gains))


def test_rules_by_correctness_have_the_update_gain_of_their_class(report: ProbeReport) -> None:
    splits = {"everything": "all", "incorrect rollouts": "incorrect", "correct rollouts": "correct"}
    figures = {(summary.teacher, summary.split): summary.figures for summary in Analysis(report).summaries()}
    scores = {(score.teacher, score.rule): score for score in score_rules(report)}
    for teacher in report.teachers:
        for rule, split in splits.items():
            assert scores[teacher, rule].update_gain == figures[teacher, split]["update_gain"]
    harmful = scores["near", "incorrect rollouts"].update_gained
    assert harmful.low > 0  # leaving the correct rollouts out helps
    nothing = scores["near", "everything"].update_gained
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_a_mixture_of_the_classes_is_a_rule_as_well(report: ProbeReport) -> None:
    quarter = score_rules(report, {"rule": IncorrectRolloutGate(correct_weight=0.25)})[0]
    all_of_it, none_of_it = score_rules(report, {"all": everything, "none": incorrect_rollouts})[:2]
    assert all_of_it.update_gain.value < quarter.update_gain.value < none_of_it.update_gain.value
    gate = AlignmentGate()
    gate.observe(report)
    learned = score_rules(report, {"learned": gate})[0]
    assert learned.update_gain == none_of_it.update_gain


def test_other_rules_have_a_contribution_and_no_update_gain(report: ProbeReport) -> None:
    for score in score_rules(report, {"high entropy": high_entropy}):
        assert np.isnan(score.update_gain.value)
        assert score.update_gain.note == score.update_gained.note == "needs `rules=`"
        assert score.contribution.low < score.contribution.value < score.contribution.high
        assert score.contribution.questions == 12
        assert score.token_share == pytest.approx(0.2, abs=0.01)
        assert np.isnan(score.predicted_gain.value)
        assert score.predicted_gain.note == "no continuations"


def test_contributions_of_a_partition_add_up(report: ProbeReport) -> None:
    def rest(tokens: Tokens) -> torch.Tensor:
        return 1 - high_entropy(tokens)

    partitions = {"high": high_entropy, "rest": rest, "all": everything, "1": correct_rollouts, "0": incorrect_rollouts}
    scores = {(score.teacher, score.rule): score for score in score_rules(report, partitions)}
    for teacher in report.teachers:
        whole = scores[teacher, "all"].contribution.value
        for parts in (("high", "rest"), ("0", "1")):
            assert sum(scores[teacher, part].contribution.value for part in parts) == pytest.approx(whole, abs=1e-9)
    assert sum(scores["far", part].contribution_share.value for part in ("high", "rest")) == pytest.approx(1)
    assert scores["far", "all"].contribution_share.value == pytest.approx(1)


def test_the_influences_of_a_report_add_up_to_the_contribution_of_everything(report: ProbeReport) -> None:
    tokens = report.tokens()
    for score in score_rules(report, {"all": everything}):
        assert score.contribution.value == pytest.approx(tokens[f"influence_{score.teacher}"].sum(), abs=1e-9)


def test_scores_do_not_depend_on_the_scale_of_the_weights(report: ProbeReport) -> None:
    small, large = (
        score_rules(report, {"rule": lambda tokens, scale=scale: scale * (incorrect_rollouts(tokens) + 0.1)})[0]
        for scale in (0.3, 3.0)
    )
    assert small.update_gain.value == pytest.approx(large.update_gain.value)
    assert small.contribution.value == pytest.approx(large.contribution.value)


def test_a_rule_without_a_weight_has_no_figure(report: ProbeReport) -> None:
    score = score_rules(report, {"nothing": lambda tokens: torch.zeros(len(tokens))})[0]
    assert score.token_share == 0
    for estimate in (score.update_gain, score.update_gained, score.contribution, score.contribution_share):
        assert np.isnan(estimate.value)
        assert estimate.note == "no token has a weight"


def test_a_share_of_an_undecided_update_is_withheld(make_report: MakeReport) -> None:
    report = update_only(
        make_report(lambda correct, depth: (0.0, 0.0), questions=8), lambda correct: (0.0, 0.0), noise=1.0
    )
    score = score_rules(with_features(report), {"rule": high_entropy})[0]
    assert np.isnan(score.contribution_share.value)
    assert score.contribution_share.note == "whole update undecided"
    assert np.isfinite(score.contribution.value)


def test_without_influences_contributions_come_from_classes(report: ProbeReport) -> None:
    without = replace(report, updates=tuple(replace(update, influence=None) for update in report.updates))
    figures = {(summary.teacher, summary.split): summary.figures for summary in Analysis(without).summaries()}
    for score in score_rules(without, {"incorrect": incorrect_rollouts}):
        expected = figures[score.teacher, "incorrect"]["update_contribution"]
        assert (score.contribution.value, score.contribution.low) == (expected.value, expected.low)
    assert score_rules(without, {"rule": high_entropy})[0].contribution.note == "needs `rules=`"


def test_merged_reports_are_scored_together(make_report: MakeReport) -> None:
    parts = [
        with_features(
            update_only(make_report(lambda correct, depth: (0.0, 0.0), questions=6, first=6 * rank), gains, seed=rank),
            seed=rank,
        )
        for rank in range(2)
    ]
    apart = [score_rules(part, {"rule": incorrect_rollouts})[0] for part in parts]
    together = score_rules(concatenate(parts), {"rule": incorrect_rollouts})[0]
    for figure in ("update_gain", "contribution"):
        mean = sum(getattr(score, figure).value for score in apart) / 2
        assert getattr(together, figure).value == pytest.approx(mean)
    assert together.contribution.questions == 12


def test_nodes_and_updates_are_scored_beside_each_other(make_report: MakeReport) -> None:
    nodes = make_report(lambda correct, depth: (-0.4, 0.6) if correct else (0.8, -0.2), questions=8)
    both = with_features(with_update(nodes, gains))
    of_nodes = score_rules(nodes)
    for score, alone in zip(score_rules(both), of_nodes, strict=True):
        assert score.predicted_gain == alone.predicted_gain
        assert alone.update_gain.note == "no update"
    assert len(of_nodes) == 2 * len(RULES)
