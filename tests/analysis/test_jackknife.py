import math

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.jackknife import Estimator, jackknife

RNG = np.random.default_rng(0)


def mean(values, weights, groups, **more):
    """Weighted mean as a function of question weights."""
    labels = sorted(set(groups))
    sums = np.array([[(weights * x)[groups == g].sum() for x in (values, np.ones(len(values)))] for g in labels])

    def function(w):
        total = w @ sums.reshape(-1, 2)
        return total[..., 0] / total[..., 1]

    return Estimator(function, np.ones(len(labels), bool), len(values), **more)


def jackknife_mean(values, weights, groups, confidence=0.95):
    return jackknife(mean(values, weights, groups), confidence)


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


def test_a_difference_covers_as_its_parts_do():
    """Parts that rest on different questions, some on both: 95 % over 2,000 simulated sets."""
    rng, hits, runs = np.random.default_rng(3), 0, 2000
    groups = np.array([*"abcdefgh"])
    first, second = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool), np.array([0, 0, 0, 1, 1, 1, 1, 1], bool)
    for _ in range(runs):
        x = rng.normal(size=8)
        parts = []
        for used, shift in ((first, 0.5), (second, 0.0)):
            values = np.where(used, x + rng.normal(size=8) + shift, 0)
            parts.append(
                Estimator(lambda w, v=values, u=used: (w * u) @ v / (w @ u.astype(float)), used, int(used.sum()))
            )
        figure = jackknife(parts[0] - parts[1])
        hits += figure.low <= 0.5 <= figure.high
    assert figure.questions == 5
    assert 0.93 < hits / runs < 0.975
    assert groups.size == 8


def test_a_difference_that_hangs_on_one_question_has_no_interval():
    used = np.array([1, 0, 0, 0], bool)
    lone = Estimator(lambda w: (w @ np.array([2.0, 0, 0, 0])) / (w @ used.astype(float)), used, 3)
    rest = mean(RNG.normal(size=4), np.ones(4), np.array([*"abcd"]))
    assert jackknife(lone).note == "one question"
    figure = jackknife(rest - lone)
    assert math.isnan(figure.low)
    assert figure.note == "one question"


def test_ends_cut_the_interval_and_say_so_of_the_value():
    values = np.array([0.9, 1.2, 1.1, 0.95])
    plain = jackknife(mean(values, np.ones(4), np.array([*"abcd"])))
    cut = jackknife(mean(values, np.ones(4), np.array([*"abcd"]), ends=(-1.0, 1.0)))
    assert plain.value > 1
    assert (cut.value, cut.low, cut.high) == (1.0, plain.low, 1.0)
    assert cut.note == "cut to +1"
    above = jackknife(mean(values + 2, np.ones(4), np.array([*"abcd"]), ends=(-1.0, 1.0)))
    assert above.value == above.high == 1
    assert above.low == pytest.approx(1 - plain.half_width)


def test_what_is_withheld_keeps_its_uncorrected_value():
    figure = jackknife(mean(RNG.normal(size=4), np.ones(4), np.array([*"abcd"]), withheld="too noisy", uncorrected=0.3))
    assert math.isnan(figure.value)
    assert (figure.note, figure.uncorrected) == ("too noisy", 0.3)
