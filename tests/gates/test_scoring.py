"""Rules scored from records."""

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.gates import AlignmentGate, IncorrectRolloutGate, Tokens, score_rules, tokens_of_report
from odp_callbacks.gates.rules import RULES, everything, incorrect_rollouts
from odp_callbacks.records import Floats, NodeRecord, ProbeReport
from tests.helpers.records import MakeReport


def gains(correct: bool, depth: int) -> tuple[float, ...]:
    """The first teacher helps incorrect rollouts and harms correct ones; the second the other way round."""
    return (-0.4, 0.6) if correct else (0.8, -0.2)


def share_kept(weighted: Floats, token_weight: Floats, values: Floats) -> float:
    return float((weighted * values).sum() / (token_weight * values).sum())


def test_shares_are_sums_over_tokens_where_success_is_known(make_report: MakeReport) -> None:
    report = make_report(gains, noise=0.3, exact=True)
    rule = lambda tokens: 1 / (1.0 + tokens.depth)  # noqa: E731
    evidence = gather(report.nodes)
    token_weight = evidence.token_weight
    weighted = token_weight / (1.0 + evidence.depth)
    for teacher_index, score in enumerate(score_rules(report, {"early tokens": rule})):
        gain = evidence.gain[:, teacher_index]
        gain_per_weight = (weighted * gain).sum() / weighted.sum()
        assert score.help_kept.value == pytest.approx(share_kept(weighted, token_weight, gain.clip(min=0)))
        assert score.harm_removed.value == pytest.approx(1 - share_kept(weighted, token_weight, (-gain).clip(min=0)))
        assert score.ideal_gain_kept.value == pytest.approx(share_kept(weighted, token_weight, evidence.ideal_norm))
        assert score.predicted_gain.value == pytest.approx(gain_per_weight)
        gain_without_rule = (token_weight * gain).sum() / token_weight.sum()
        assert score.gained.value == pytest.approx(gain_per_weight - gain_without_rule)
        assert score.token_share == 1


def test_a_rule_that_separates_help_from_harm_keeps_all_and_removes_all(make_report: MakeReport) -> None:
    near, far = score_rules(make_report(gains, noise=0.0, exact=True), {"incorrect": IncorrectRolloutGate()})
    assert near.help_kept.value == near.harm_removed.value == pytest.approx(1)
    assert far.help_kept.value == far.harm_removed.value == pytest.approx(0)
    assert near.gained.low > 0 > far.gained.high
    assert near.token_share == pytest.approx(0.5)


def test_no_rule_keeps_everything_and_gains_nothing(make_report: MakeReport) -> None:
    report = make_report(gains, noise=0.3)
    summaries = {summary.teacher: summary for summary in Analysis(report).summaries() if summary.split == "all"}
    for score in score_rules(report, {"everything": everything}):
        assert score.ideal_gain_kept.value == score.help_kept.value == pytest.approx(1)
        assert score.harm_removed.value == pytest.approx(0)
        assert score.gained.value == pytest.approx(0)
        expected = summaries[score.teacher].figures["predicted_gain"]
        assert (score.predicted_gain.value, score.predicted_gain.low) == pytest.approx((expected.value, expected.low))


def test_scores_do_not_depend_on_the_scale_of_the_weights(make_report: MakeReport) -> None:
    report = make_report(gains, noise=0.3)
    small_scores = score_rules(report, {"rule": lambda tokens: 0.3 * incorrect_rollouts(tokens) + 0.1})
    large_scores = score_rules(report, {"rule": lambda tokens: 3 * incorrect_rollouts(tokens) + 1})
    for small, large in zip(small_scores, large_scores, strict=True):
        assert small.harm_removed.value == pytest.approx(large.harm_removed.value)
        assert small.predicted_gain.value == pytest.approx(large.predicted_gain.value)


def test_noise_is_not_counted_as_harm(make_report: MakeReport) -> None:
    """A teacher that helps everywhere: noise turns the sign of many nodes, yet little of it must count as harm."""
    generator = np.random.default_rng(0)

    def noisy(node: NodeRecord) -> NodeRecord:
        # A difference of 0.2 in success, estimated from four continuations of each branch.
        total = generator.binomial(4, (0.4, 0.6)).astype(float)
        return NodeRecord(**{**node.__dict__, "total": total, "total_square": total})

    clean = make_report(lambda correct, depth: (0.5,), questions=40, noise=0.0, teachers=("near",))
    report = ProbeReport(**{**clean.__dict__, "nodes": tuple(noisy(node) for node in clean.nodes)})
    evidence = gather(report.nodes)
    gain, token_weight = evidence.gain[:, 0], evidence.token_weight
    plain_ratio = (token_weight * (-gain).clip(min=0)).sum() / (token_weight * gain.clip(min=0)).sum()
    # A rule that keeps one half of all tokens at random removes one half of the harm, whatever the noise.
    half = score_rules(report, {"half": lambda tokens: (torch.arange(len(tokens)) % 2).double()})[0]
    assert 0.3 < half.harm_removed.value < 0.7
    assert plain_ratio > 0.25
    from odp_callbacks.analysis.success_model import fit_success_model

    success = fit_success_model(evidence).draw(evidence)
    sampled_gain = np.einsum("na,nsa->ns", evidence.gain_form[:, 0], success - success[:, :, :1])
    sampled_harm, sampled_help = (-sampled_gain).clip(min=0), sampled_gain.clip(min=0)
    model_ratio = (token_weight[:, None] * sampled_harm).sum() / (token_weight[:, None] * sampled_help).sum()
    assert model_ratio < plain_ratio / 2


def test_the_tokens_of_a_report_are_those_that_training_would_see(make_report: MakeReport) -> None:
    report = make_report(gains)
    tokens = tokens_of_report(report, 1)
    assert len(tokens) == len(report.nodes)
    assert tokens.teacher.tolist() == [1] * len(tokens)
    assert set(tokens.pass_rate.tolist()) == {0.5}
    assert set(tokens.length.tolist()) == {8}
    assert tokens.need("weight").tolist() == [1 / node.inclusion for node in report.nodes]
    node = report.nodes[0]
    assert float(tokens.need("teacher_log_prob")[0]) == pytest.approx(np.log(node.teacher_probability[1, node.taken]))


def test_every_published_rule_can_be_scored(make_report: MakeReport) -> None:
    scores = score_rules(make_report(gains))
    assert len(scores) == 2 * len(RULES)
    assert all(np.isfinite(score.predicted_gain.value) for score in scores if score.rule != "pass rate")


def test_a_gate_that_learned_elsewhere_is_scored_like_a_rule(make_report: MakeReport) -> None:
    gate = AlignmentGate("predicted_gain")
    gate.observe(make_report(gains))
    near, far = score_rules(make_report(gains, seed=1, first=10), {"learned": gate})
    for score in (near, far):
        assert score.harm_removed.value > 0.9
        assert score.help_kept.value > 0.9


def test_a_rule_whose_weights_are_all_0_has_no_gain_per_weight(make_report: MakeReport) -> None:
    score = score_rules(make_report(gains, exact=True), {"nothing": lambda tokens: torch.zeros(len(tokens))})[0]
    assert np.isnan(score.predicted_gain.value)
    assert score.help_kept.value == 0
    assert score.harm_removed.value == 1


def test_a_report_without_nodes_cannot_score(make_report: MakeReport) -> None:
    report = ProbeReport(**{**make_report(gains).__dict__, "nodes": ()})
    with pytest.raises(ValueError, match="`report` must have nodes"):
        score_rules(report)


def test_rules_are_given_tokens_of_each_teacher(make_report: MakeReport) -> None:
    seen_tokens: list[Tokens] = []

    def rule(tokens: Tokens) -> torch.Tensor:
        seen_tokens.append(tokens)
        return torch.ones(len(tokens))

    score_rules(make_report(gains), {"rule": rule})
    assert [tokens.need("teacher").unique().tolist() for tokens in seen_tokens] == [[0], [1]]
