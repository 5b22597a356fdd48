"""Rules scored from records."""

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.gates import AlignmentGate, IncorrectRolloutGate, Tokens, score_rules, tokens_of_report
from odp_callbacks.gates.rules import RULES, everything, incorrect_rollouts
from odp_callbacks.records import NodeRecord, ProbeReport
from tests.helpers.records import MakeReport


def gains(correct: bool, depth: int) -> tuple[float, ...]:
    """The first teacher helps incorrect rollouts and harms correct ones; the second the other way round."""
    return (-0.4, 0.6) if correct else (0.8, -0.2)


def test_shares_are_sums_over_tokens_where_success_is_known(make_report: MakeReport) -> None:
    report = make_report(gains, noise=0.3, exact=True)
    rule = lambda tokens: 1 / (1.0 + tokens.depth)  # noqa: E731
    evidence = gather(report.nodes)
    w, t = 1 / (1.0 + evidence.depth), evidence.token_weight
    for k, score in enumerate(score_rules(report, {"mine": rule})):
        gain = evidence.gain[:, k]
        plus, minus = gain.clip(min=0), (-gain).clip(min=0)
        assert score.help_kept.value == pytest.approx((t * w * plus).sum() / (t * plus).sum())
        assert score.harm_removed.value == pytest.approx(1 - (t * w * minus).sum() / (t * minus).sum())
        assert score.ideal_gain_kept.value == pytest.approx(
            (t * w * evidence.ideal_norm).sum() / (t * evidence.ideal_norm).sum()
        )
        assert score.predicted_gain.value == pytest.approx((t * w * gain).sum() / (t * w).sum())
        plain = (t * gain).sum() / t.sum()
        assert score.gained.value == pytest.approx((t * w * gain).sum() / (t * w).sum() - plain)
        assert score.token_share == 1


def test_a_rule_that_separates_help_from_harm_keeps_all_and_removes_all(make_report: MakeReport) -> None:
    near, far = score_rules(make_report(gains, noise=0.0, exact=True), {"incorrect": IncorrectRolloutGate()})
    assert near.help_kept.value == near.harm_removed.value == pytest.approx(1)
    assert far.help_kept.value == far.harm_removed.value == pytest.approx(0)
    assert near.gained.low > 0 > far.gained.high
    assert near.token_share == pytest.approx(0.5)


def test_no_rule_keeps_everything_and_gains_nothing(make_report: MakeReport) -> None:
    report = make_report(gains, noise=0.3)
    summaries = {s.teacher: s for s in Analysis(report).summaries() if s.split == "all"}
    for score in score_rules(report, {"everything": everything}):
        assert score.ideal_gain_kept.value == score.help_kept.value == pytest.approx(1)
        assert score.harm_removed.value == pytest.approx(0)
        assert score.gained.value == pytest.approx(0)
        figure = summaries[score.teacher].figures["predicted_gain"]
        assert (score.predicted_gain.value, score.predicted_gain.low) == pytest.approx((figure.value, figure.low))


def test_shares_do_not_hang_on_the_scale_of_the_weights(make_report: MakeReport) -> None:
    report = make_report(gains, noise=0.3)
    one = score_rules(report, {"x": lambda tokens: 0.3 * incorrect_rollouts(tokens) + 0.1})
    ten = score_rules(report, {"x": lambda tokens: 3 * incorrect_rollouts(tokens) + 1})
    for a, b in zip(one, ten, strict=True):
        assert a.harm_removed.value == pytest.approx(b.harm_removed.value)
        assert a.predicted_gain.value == pytest.approx(b.predicted_gain.value)


def test_noise_is_not_counted_as_harm(make_report: MakeReport) -> None:
    """A teacher that helps everywhere: noise turns the sign of many nodes, yet little of it must count as harm."""
    rng = np.random.default_rng(0)

    def noisy(node: NodeRecord) -> NodeRecord:
        # A lead of 0.2 seen through four continuations a branch.
        total = rng.binomial(4, (0.4, 0.6)).astype(float)
        return NodeRecord(**{**node.__dict__, "total": total, "total_square": total})

    clean = make_report(lambda correct, depth: (0.5,), questions=40, noise=0.0, teachers=("near",))
    report = ProbeReport(**{**clean.__dict__, "nodes": tuple(noisy(n) for n in clean.nodes)})
    evidence = gather(report.nodes)
    gain, t = evidence.gain[:, 0], evidence.token_weight
    naive = (t * (-gain).clip(min=0)).sum() / (t * gain.clip(min=0)).sum()
    # A rule that keeps one half of all tokens at random removes one half of the harm, whatever the noise.
    half = score_rules(report, {"half": lambda tokens: (torch.arange(len(tokens)) % 2).double()})[0]
    assert 0.3 < half.harm_removed.value < 0.7
    assert naive > 0.25
    from odp_callbacks.analysis.success_model import fit_success_model

    drawn = fit_success_model(evidence).draw(evidence)
    drawn_gain = np.einsum("na,nsa->ns", evidence.gain_form[:, 0], drawn - drawn[:, :, :1])
    modelled = (t[:, None] * (-drawn_gain).clip(min=0)).sum() / (t[:, None] * drawn_gain.clip(min=0)).sum()
    assert modelled < naive / 2


def test_the_tokens_of_a_report_are_those_that_training_would_see(make_report: MakeReport) -> None:
    report = make_report(gains)
    tokens = tokens_of_report(report, 1)
    assert len(tokens) == len(report.nodes)
    assert tokens.teacher.tolist() == [1] * len(tokens)
    assert set(tokens.pass_rate.tolist()) == {0.5}
    assert set(tokens.length.tolist()) == {8}
    assert tokens.need("weight").tolist() == [1 / n.inclusion for n in report.nodes]
    node = report.nodes[0]
    assert float(tokens.need("teacher_log_prob")[0]) == pytest.approx(np.log(node.teacher_probability[1, node.taken]))


def test_every_published_rule_can_be_scored(make_report: MakeReport) -> None:
    scores = score_rules(make_report(gains))
    assert len(scores) == 2 * len(RULES)
    assert all(np.isfinite(s.predicted_gain.value) for s in scores if s.rule != "pass rate")


def test_a_gate_that_learned_elsewhere_is_scored_like_a_rule(make_report: MakeReport) -> None:
    gate = AlignmentGate()
    gate.observe(make_report(gains))
    near, far = score_rules(make_report(gains, seed=1, first=10), {"learned": gate})
    for score in (near, far):
        assert score.harm_removed.value > 0.9
        assert score.help_kept.value > 0.9


def test_a_rule_that_lets_nothing_through_has_no_gain_per_weight(make_report: MakeReport) -> None:
    score = score_rules(make_report(gains, exact=True), {"nothing": lambda tokens: torch.zeros(len(tokens))})[0]
    assert np.isnan(score.predicted_gain.value)
    assert score.help_kept.value == 0
    assert score.harm_removed.value == 1


def test_the_free_mode_cannot_score(make_report: MakeReport) -> None:
    report = make_report(gains)
    free = ProbeReport(**{**report.__dict__, "free": True})
    with pytest.raises(ValueError, match="`report` must have continuations"):
        score_rules(free)


def test_rules_see_each_teacher_as_the_one_that_teaches(make_report: MakeReport) -> None:
    seen: list[Tokens] = []

    def rule(tokens: Tokens) -> torch.Tensor:
        seen.append(tokens)
        return torch.ones(len(tokens))

    score_rules(make_report(gains), {"x": rule})
    assert [t.need("teacher").unique().tolist() for t in seen] == [[0], [1]]
