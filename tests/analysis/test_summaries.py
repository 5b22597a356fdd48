import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.node_estimates import estimate
from odp_callbacks.analysis.summaries import (
    FIGURES,
    GAP,
    PREDICTORS,
    SPLITS,
    Analysis,
    correlations,
    scalars,
    success_rate,
    summarise,
)
from odp_callbacks.records import ProbeReport, RolloutRecord
from tests.helpers.records import synthetic

RNG = np.random.default_rng(0)


def rollout(question, reward, truncated=False):
    return RolloutRecord(question, "p", ("t",), "t", reward, reward >= 1, truncated)


def report(nodes, teachers=("near", "far")):
    rollouts = (rollout("0", 1.0), rollout("0", 0.0, True), rollout("1", 0.5), rollout("2", 1.0))
    spent = {"rollouts": 40, "continuations": 60}
    seconds = {"rollouts": 1.0, "gradients": 2.0}
    return ProbeReport(teachers, ("m", "n"), rollouts, tuple(nodes), spent, 16, 4, seconds)


def nodes(n=12):
    """Three questions, both classes, unequal inclusion; every fourth node has the same success everywhere."""
    return [
        synthetic(
            [0.5] * 3 if i % 4 == 3 else RNG.random(3),
            seed=i,
            question=str(i % 3),
            correct=i % 2 == 0,
            inclusion=1 / (1 + i % 5),
            exact=i % 8 == 3,
        ).record
        for i in range(n)
    ]


def by_hand(values, weights, questions, confidence=0.95):
    """Weighted mean with the delete-one-question jackknife, written out."""
    labels = sorted(set(questions))
    out = [np.average(values[questions != q], weights=weights[questions != q]) for q in labels]
    m = len(labels)
    error = math.sqrt((m - 1) / m * sum((x - sum(out) / m) ** 2 for x in out))
    half = stats.t.ppf(0.5 + confidence / 2, m - 1) * error
    mean = np.average(values, weights=weights)
    return mean, mean - half, mean + half


def test_means_are_over_tokens_and_their_intervals_over_questions():
    given = nodes(24)
    found = {(s.teacher, s.split): s for s in summarise(report(given))}
    assert set(found) == {(t, s) for t in ("near", "far") for s in (*SPLITS, GAP)}
    for k, teacher in enumerate(("near", "far")):
        for split in SPLITS:
            chosen = [n for n in given if split == "all" or n.correct == (split == "correct")]
            summary, estimates = found[teacher, split], [estimate(n) for n in chosen]
            weights, groups = np.array([1 / n.inclusion for n in chosen]), np.array([n.question for n in chosen])
            values = {
                "predicted_gain": np.array([e.predicted_gain[k] for e in estimates]),
                "teacher_advantage": np.array([e.teacher_advantage[k] for e in estimates]),
                **{p: np.array([n.predictors[p][k] for n in chosen]) for p in PREDICTORS},
            }
            assert set(summary.figures) == set(FIGURES)
            for name, value in values.items():
                figure = summary.figures[name]
                assert (figure.value, figure.low, figure.high) == pytest.approx(by_hand(value, weights, groups))
                assert (figure.questions, figure.nodes) == (3, len(chosen))
            blank = [n for n in chosen if (n.total == n.total[0]).all()]
            assert summary.nodes == len(chosen)
            assert summary.undefined == sum(n.exact.all() for n in blank)
            assert summary.undetermined == sum(not n.exact.all() for n in blank)
            # Beside the corrected one the paper's, where nodes without an alignment are left out.
            cosine = np.array([e.alignment[k] for e in estimates])
            there = ~np.isnan(cosine)
            assert summary.figures["alignment"].uncorrected == pytest.approx(
                np.average(cosine[there], weights=weights[there])
            )
            norms = np.array([e.ideal_norm for e in estimates])
            assert summary.figures["gain_weighted_alignment"].uncorrected == pytest.approx(
                (weights @ values["predicted_gain"]) / (weights @ norms)
            )


def known(given):
    """The same nodes, their success known for certain."""
    return [
        replace(n, count=np.ones_like(n.count), total=n.total / n.count, exact=np.ones_like(n.exact)) for n in given
    ]


def test_what_is_known_for_certain_needs_no_correction():
    given = known([n for n in nodes(40) if not (n.total == n.total[0]).all()])
    for summary in summarise(report(given)):
        for name in ("gain_weighted_alignment", "alignment"):
            figure = summary.figures[name]
            assert figure.value == pytest.approx(figure.uncorrected, abs=5e-3 if name == "alignment" else 1e-12)


def test_the_gap_and_the_contrasts_are_differences_with_their_own_intervals():
    analysis = Analysis(report(nodes(36)))
    found = {(s.teacher, s.split): s.figures for s in analysis.summaries()}
    gap, right, wrong = (found["near", split]["predicted_gain"] for split in (GAP, "correct", "incorrect"))
    assert gap.value == pytest.approx(wrong.value - right.value)
    assert gap.half_width > 0
    (contrast,) = [c.figures["predicted_gain"] for c in analysis.contrasts() if c.split == "all"]
    near, far = (found[t, "all"]["predicted_gain"] for t in ("near", "far"))
    assert contrast.value == pytest.approx(near.value - far.value)
    # Paired: nodes where both teachers say the same leave nothing to doubt.
    gram = [n.gram.copy() for n in nodes(36)]
    for g in gram:
        g[:, -1], g[:, :, -1] = g[:, -2], g[:, :, -2]
        g[:, -1, -1] = g[:, -2, -2]
    twins = Analysis(report([replace(n, gram=g) for n, g in zip(nodes(36), gram)]))
    (same,) = [c.figures["predicted_gain"] for c in twins.contrasts() if c.split == "all"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"`by` must be"):
        analysis.summaries("length")


def test_other_ways_to_split():
    given = [replace(n, depth=i % 6, rollout=i % 4) for i, n in enumerate(nodes(48))]
    analysis = Analysis(report(given))
    depths = [s for s in analysis.summaries("depth") if s.teacher == "near"]
    assert [s.split for s in depths] == ["depth 0", "depth 1", "depth 2-3", "depth 4-7"]
    assert [s.nodes for s in depths] == [8, 8, 16, 16]
    modules = {s.split: s for s in analysis.summaries("module") if s.teacher == "near"}
    assert set(modules) == {"m", "n"}
    for m, module in enumerate(("m", "n")):
        alone = [replace(n, gram=n.gram[m : m + 1]) for n in given]
        (expected, *_) = [s for s in summarise(replace(report(alone), modules=(module,))) if s.split == "all"]
        for name in ("predicted_gain", "alignment"):
            assert modules[module].figures[name].value == pytest.approx(expected.figures[name].value, nan_ok=True)
    questions = [s for s in analysis.summaries("question") if s.teacher == "far"]
    assert [s.split for s in questions] == ["question 0", "question 1", "question 2"]
    assert all(s.figures["predicted_gain"].note == "one question" for s in questions)
    assert len(analysis.summaries("rollout")) == 2 * 4


def test_edges_say_what_they_cannot_tell():
    """One continuation, one node, all correct, all incorrect: finite, or NaN with a reason."""
    one = [replace(n, count=np.ones_like(n.count), total=np.round(n.total / n.count)) for n in nodes(30)]
    cases = [one, nodes(1), [replace(n, correct=True) for n in nodes()], [replace(n, correct=False) for n in nodes()]]
    for given in cases:
        for summary in [*summarise(report(given)), *Analysis(report(given)).contrasts()]:
            for figure in summary.figures.values():
                assert math.isfinite(figure.value) or figure.note
                assert math.isfinite(figure.low) or figure.note
                assert not math.isinf(figure.low)
                assert not math.isinf(figure.high)
    for summary in summarise(report(one)):
        assert summary.figures["alignment"].note == "few continuations"
        assert math.isfinite(summary.figures["predicted_gain"].value)


def test_an_empty_class_is_nan():
    (near, *_) = [s for s in summarise(report([n for n in nodes() if n.correct])) if s.split == "incorrect"]
    assert (near.nodes, near.undefined) == (0, 0)
    assert all(math.isnan(f.value) and f.note for f in near.figures.values())
    assert all(s.nodes == 0 for s in summarise(report([])))


@pytest.mark.parametrize("confidence", [0, 1, -0.5, math.nan])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match=r"`confidence` must lie in \(0, 1\)"):
        summarise(report([]), confidence)


def test_correlations():
    given = nodes(20)
    defined = [n for n in given if not (n.total == n.total[0]).all()]
    found = correlations(report(given))
    assert set(found) == {(t, p) for t in ("near", "far") for p in PREDICTORS}
    for k, teacher in enumerate(("near", "far")):
        alignment = [estimate(n).alignment[k] for n in defined]
        for name in PREDICTORS:
            expected = stats.pearsonr(alignment, [n.predictors[name][k] for n in defined]).statistic
            figure = found[teacher, name]
            assert figure.value == pytest.approx(expected, rel=1e-10)
            out = [
                stats.pearsonr(
                    [estimate(n).alignment[k] for n in defined if n.question != q],
                    [n.predictors[name][k] for n in defined if n.question != q],
                ).statistic
                for q in "012"
            ]
            half = stats.t.ppf(0.975, 2) * math.sqrt(2 / 3 * sum((x - np.mean(out)) ** 2 for x in out))
            assert figure.low == pytest.approx(max(-1, expected - half))
            assert figure.high == pytest.approx(min(1, expected + half))


def test_correlations_that_do_not_exist():
    assert all(math.isnan(f.value) for f in correlations(report(nodes(2))).values())
    constant = [replace(n, predictors={p: np.ones(2) for p in PREDICTORS}) for n in nodes()]
    assert all(math.isnan(f.value) for f in correlations(report(constant)).values())


def test_scalars_are_named_and_complete():
    given = nodes()
    logged = scalars(report(given))
    for s in summarise(report(given)):
        for name, figure in s.figures.items():
            if s.split == GAP and name in PREDICTORS:
                continue
            ends = [logged[f"odp/{name}{end}/{s.teacher}/{s.split}"] for end in ("", "_low", "_high")]
            assert ends == pytest.approx([figure.value, figure.low, figure.high], nan_ok=True)
        if s.split == GAP:
            continue
        assert logged[f"odp/questions/{s.teacher}/{s.split}"] == 3
        assert logged[f"odp/nodes/{s.teacher}/{s.split}"] == s.nodes
        assert logged[f"odp/undefined_share/{s.teacher}/{s.split}"] == s.undefined / s.nodes
        assert logged[f"odp/undetermined_share/{s.teacher}/{s.split}"] == s.undetermined / s.nodes
    for (teacher, name), figure in correlations(report(given)).items():
        assert logged[f"odp/correlation_{name}/{teacher}"] == figure.value
        assert logged[f"odp/correlation_{name}_low/{teacher}"] == pytest.approx(figure.low, nan_ok=True)
    expected = {
        "success_rate": 0.625,
        "success_rate_low": success_rate(report(given)).low,
        "success_rate_high": 1.0,
        "undefined_share": 2 / 12,
        "undetermined_share": 1 / 12,
        "truncated_share": 4 / 20,
        "nodes": 12,
        "generated_tokens": 100,
        "seconds": 3.0,
        "seconds_rollouts": 1.0,
        "seconds_gradients": 2.0,
    }
    assert {k.removeprefix("odp/probe/"): v for k, v in logged.items() if "/probe/" in k} == pytest.approx(expected)
    assert all(isinstance(v, float) for v in logged.values())


def test_a_report_without_anything():
    empty = ProbeReport(("near",), (), (), (), {}, 0, 0, {})
    assert math.isnan(success_rate(empty).value)
    logged = scalars(empty)
    assert math.isnan(logged["odp/probe/truncated_share"])
    assert logged["odp/probe/nodes"] == 0
