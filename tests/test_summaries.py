import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from conftest import synthetic
from odp_callbacks.estimates import estimate
from odp_callbacks.records import ProbeReport, RolloutRecord
from odp_callbacks.summaries import (
    FIGURES,
    PREDICTORS,
    SPLITS,
    correlations,
    jackknife_mean,
    scalars,
    success_rate,
    summarise,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_jackknife_leaves_out_one_group_at_a_time(confidence):
    groups = np.array([*"aaabbcddddeff"])
    values, weights = RNG.normal(size=len(groups)), RNG.uniform(0.5, 8, size=len(groups))
    labels = sorted(set(groups))
    m = len(labels)
    out = [np.average(values[groups != g], weights=weights[groups != g]) for g in labels]
    error = math.sqrt((m - 1) / m * sum((x - sum(out) / m) ** 2 for x in out))
    mean = np.average(values, weights=weights)
    half = stats.t.ppf(0.5 + confidence / 2, m - 1) * error
    found = jackknife_mean(values, weights, groups, confidence)
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-12)
    assert (found.questions, found.nodes) == (6, 13)


def test_equal_groups_give_students_interval():
    values = RNG.normal(size=(8, 5))
    means = values.mean(axis=1)
    expected = stats.t.interval(0.95, 7, loc=means.mean(), scale=stats.sem(means))
    found = jackknife_mean(values.ravel(), np.full(40, 2.5), np.repeat([*"abcdefgh"], 5))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)


def test_the_interval_covers():
    """95 % over simulated sets of 8 questions whose nodes depend on each other."""
    rng, hits, runs = np.random.default_rng(1), 0, 1000
    groups = np.repeat(np.arange(8), 4).astype(str)
    for _ in range(runs):
        figure = jackknife_mean(np.repeat(rng.normal(size=8), 4) + rng.normal(size=32), np.ones(32), groups)
        hits += figure.low <= 0 <= figure.high
    assert stats.binomtest(hits, runs, 0.95).pvalue > 1e-3


def test_too_few_groups_have_no_interval():
    one = jackknife_mean(np.array([1.0, 3.0]), np.array([3.0, 1.0]), np.array(["a", "a"]))
    assert one.value == 1.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert (one.questions, one.nodes) == (1, 2)
    none = jackknife_mean(np.array([]), np.array([]), np.array([], dtype=str))
    assert math.isnan(none.value)
    assert math.isnan(none.low)
    assert (none.questions, none.nodes) == (0, 0)


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


def test_summaries_are_weighted_means_over_the_class():
    given = nodes()
    found = {(s.teacher, s.split): s for s in summarise(report(given))}
    assert set(found) == {(t, s) for t in ("near", "far") for s in SPLITS}
    for k, teacher in enumerate(("near", "far")):
        for split in SPLITS:
            chosen = [n for n in given if split == "all" or n.correct == (split == "correct")]
            summary, estimates = found[teacher, split], [estimate(n) for n in chosen]
            values = {
                **{f: np.array([getattr(e, f)[k] for e in estimates]) for f in FIGURES[:4]},
                **{p: np.array([n.predictors[p][k] for n in chosen]) for p in PREDICTORS},
            }
            assert set(summary.figures) == set(FIGURES) == set(values)
            weights, groups = np.array([1 / n.inclusion for n in chosen]), np.array([n.question for n in chosen])
            for name, value in values.items():
                kept = ~np.isnan(value)
                assert summary.figures[name] == jackknife_mean(value[kept], weights[kept], groups[kept])
            blank = [n for n in chosen if (n.total == n.total[0]).all()]
            assert summary.nodes == len(chosen)
            assert summary.undefined == sum(n.exact.all() for n in blank)
            assert summary.undetermined == sum(not n.exact.all() for n in blank)
            # Left out of the cosines' means, but not of the gain's.
            assert summary.figures["alignment"].nodes == summary.figures["logit_alignment"].nodes
            assert summary.figures["alignment"].nodes == len(chosen) - len(blank)
            assert summary.figures["predicted_gain"].nodes == len(chosen)
    assert found["near", "correct"].undefined + found["near", "incorrect"].undefined == 2
    assert found["near", "all"].undetermined == 1


def test_an_empty_class_is_nan():
    (near, *_) = [s for s in summarise(report([n for n in nodes() if n.correct])) if s.split == "incorrect"]
    assert (near.nodes, near.undefined) == (0, 0)
    assert all(math.isnan(f.value) for f in near.figures.values())
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
            assert found[teacher, name] == pytest.approx(expected, rel=1e-10)


def test_correlations_that_do_not_exist():
    assert all(math.isnan(v) for v in correlations(report(nodes(2))).values())
    constant = [replace(n, predictors={p: np.ones(2) for p in PREDICTORS}) for n in nodes()]
    assert all(math.isnan(v) for v in correlations(report(constant)).values())


def test_scalars_are_named_and_complete():
    given = nodes()
    logged = scalars(report(given))
    for s in summarise(report(given)):
        for name, figure in s.figures.items():
            ends = [logged[f"odp/{name}{end}/{s.teacher}/{s.split}"] for end in ("", "_low", "_high")]
            assert ends == pytest.approx([figure.value, figure.low, figure.high], nan_ok=True)
        assert logged[f"odp/undefined_share/{s.teacher}/{s.split}"] == s.undefined / s.nodes
        assert logged[f"odp/undetermined_share/{s.teacher}/{s.split}"] == s.undetermined / s.nodes
    for (teacher, name), value in correlations(report(given)).items():
        assert logged[f"odp/correlation_{name}/{teacher}"] == value
    expected = {
        "success_rate": 0.625,
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
    assert math.isnan(success_rate(empty))
    logged = scalars(empty)
    assert math.isnan(logged["odp/probe/truncated_share"])
    assert logged["odp/probe/nodes"] == 0
