import math

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.jackknife import Estimator, jackknife, question_pairs
from odp_callbacks.analysis.skewness import skewed_interval

RNG = np.random.default_rng(0)


def weighted_mean(values, weights, groups, **options):
    """Weighted mean as a function of question weights."""
    questions = sorted(set(groups))
    columns = values, np.ones(len(values))
    question_sums = np.array(
        [[(weights * column)[groups == question].sum() for column in columns] for question in questions]
    )

    def statistic(question_weights):
        total = question_weights @ question_sums.reshape(-1, 2)
        return total[..., 0] / total[..., 1]

    return Estimator(statistic, np.ones(len(questions), bool), len(values), **options)


def jackknife_mean(values, weights, groups, confidence=0.95):
    return jackknife(weighted_mean(values, weights, groups), confidence)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_jackknife_leaves_out_one_group_at_a_time(confidence):
    groups = np.array([*"aaabbcddddeff"])
    values, weights = RNG.normal(size=len(groups)), RNG.uniform(0.5, 8, size=len(groups))
    labels = sorted(set(groups))
    group_count = len(labels)
    leave_one_out = [np.average(values[groups != label], weights=weights[groups != label]) for label in labels]
    centre = sum(leave_one_out) / group_count
    squared_deviations = sum((mean - centre) ** 2 for mean in leave_one_out)
    standard_error = math.sqrt((group_count - 1) / group_count * squared_deviations)
    mean = np.average(values, weights=weights)
    half_width = stats.t.ppf(0.5 + confidence / 2, group_count - 1) * standard_error
    estimate = jackknife_mean(values, weights, groups, confidence)
    expected = (mean, mean - half_width, mean + half_width)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)
    assert (estimate.questions, estimate.nodes) == (6, 13)


def test_equal_groups_give_students_interval():
    values = RNG.normal(size=(8, 5))
    means = values.mean(axis=1)
    expected = stats.t.interval(0.95, 7, loc=means.mean(), scale=stats.sem(means))
    estimate = jackknife_mean(values.ravel(), np.full(40, 2.5), np.repeat([*"abcdefgh"], 5))
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)


def test_the_interval_covers():
    """In 95 % of simulated sets of 8 questions whose nodes depend on each other."""
    generator, covered, repetitions = np.random.default_rng(1), 0, 1000
    groups = np.repeat(np.arange(8), 4).astype(str)
    for _ in range(repetitions):
        values = np.repeat(generator.normal(size=8), 4) + generator.normal(size=32)
        estimate = jackknife_mean(values, np.ones(32), groups)
        covered += estimate.low <= 0 <= estimate.high
    assert stats.binomtest(covered, repetitions, 0.95).pvalue > 1e-3


def test_too_few_groups_have_no_interval():
    one_group = jackknife_mean(np.array([1.0, 3.0]), np.array([3.0, 1.0]), np.array(["a", "a"]))
    assert one_group.value == 1.5
    assert math.isnan(one_group.low)
    assert math.isnan(one_group.high)
    assert (one_group.questions, one_group.nodes) == (1, 2)
    no_group = jackknife_mean(np.array([]), np.array([]), np.array([], dtype=str))
    assert math.isnan(no_group.value)
    assert math.isnan(no_group.low)
    assert (no_group.questions, no_group.nodes) == (0, 0)


def test_a_difference_covers_as_its_parts_do():
    """Parts that rest on different questions, some on both: in about 95 % of 2,000 simulated sets."""
    generator, covered, repetitions = np.random.default_rng(3), 0, 2000
    groups = np.array([*"abcdefgh"])
    in_first, in_second = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool), np.array([0, 0, 0, 1, 1, 1, 1, 1], bool)
    for _ in range(repetitions):
        question_effect = generator.normal(size=8)
        parts = []
        for questions, shift in ((in_first, 0.5), (in_second, 0.0)):
            values = np.where(questions, question_effect + generator.normal(size=8) + shift, 0)
            parts.append(mean_over(values, questions))
        estimate = jackknife(parts[0] - parts[1])
        covered += estimate.low <= 0.5 <= estimate.high
    assert estimate.questions == 5
    assert 0.93 < covered / repetitions < 0.975
    assert groups.size == 8


def mean_over(values, questions):
    def statistic(question_weights):
        return (question_weights * questions) @ values / (question_weights @ questions.astype(float))

    return Estimator(statistic, questions, int(questions.sum()))


def test_a_difference_that_hangs_on_one_question_has_no_interval():
    only_first = np.array([1, 0, 0, 0], bool)
    lone = Estimator(lambda weights: (weights @ [2.0, 0, 0, 0]) / (weights @ only_first.astype(float)), only_first, 3)
    rest = weighted_mean(RNG.normal(size=4), np.ones(4), np.array([*"abcd"]))
    assert jackknife(lone).note == "one question"
    difference = jackknife(rest - lone)
    assert math.isnan(difference.low)
    assert difference.note == "one question"


def test_bounds_clip_the_interval_and_the_note_tells_of_the_value():
    values = np.array([0.9, 1.2, 1.1, 0.95])
    unbounded = jackknife(weighted_mean(values, np.ones(4), np.array([*"abcd"])))
    bounded = jackknife(weighted_mean(values, np.ones(4), np.array([*"abcd"]), bounds=(-1.0, 1.0)))
    assert unbounded.value > 1
    assert (bounded.value, bounded.low, bounded.high) == (1.0, unbounded.low, 1.0)
    assert bounded.note == "cut to +1"
    outside = jackknife(weighted_mean(values + 2, np.ones(4), np.array([*"abcd"]), bounds=(-1.0, 1.0)))
    assert outside.value == outside.high == 1
    assert outside.low == pytest.approx(1 - unbounded.half_width)


def test_a_withheld_figure_keeps_its_uncorrected_value():
    estimator = weighted_mean(
        RNG.normal(size=4), np.ones(4), np.array([*"abcd"]), withheld="too noisy", uncorrected=0.3
    )
    estimate = jackknife(estimator)
    assert math.isnan(estimate.value)
    assert (estimate.note, estimate.uncorrected) == ("too noisy", 0.3)


def pairs_of(values, **options):
    """A mean, said to be a figure over pairs of questions; it has no part of pairs."""
    return weighted_mean(values, np.ones(len(values)), np.arange(len(values)), pairs=True, **options)


def test_a_figure_over_pairs_has_halls_interval_with_the_degrees_of_what_tells_something():
    values = np.array([0.0, 0.0, 0.3, 0.0, 1.0, 0.1, 0.0, 0.0])
    estimate = jackknife(pairs_of(values, informative=3))
    assert estimate.value == pytest.approx(values.mean())
    quantile, skewness = stats.t.ppf(0.975, 3), stats.skew(values)
    expected = skewed_interval(values.mean(), stats.sem(values), skewness, 8, quantile)
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    all_tell = jackknife(pairs_of(values, informative=8))
    assert all_tell.half_width < estimate.half_width
    assert pairs_of(values, informative=8).degrees_of_freedom == 7


def test_two_questions_that_tell_something_give_a_value_and_say_why_no_interval():
    values = np.array([0.0, 0.0, 0.3, 0.0, 1.0, 0.0])
    estimate = jackknife(pairs_of(values, informative=2))
    assert estimate.value == pytest.approx(values.mean())
    assert math.isnan(estimate.low)
    assert estimate.note == "few unequal rewards"
    difference = pairs_of(values, informative=2) - pairs_of(values, informative=5)
    assert difference.informative == 2


def test_pairs_are_all_of_few_questions_and_a_balanced_part_of_many() -> None:
    assert [len(question_pairs(count)[0]) for count in (2, 10, 64)] == [1, 45, 64 * 63 // 2]
    for count in (65, 200, 3000):
        first, second = question_pairs(count)
        assert (first != second).all()
        assert len({frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
        assert len(set(np.bincount(np.concatenate([first, second]), minlength=count).tolist())) == 1
        assert len(first) <= max(2048, count)


def test_a_part_of_the_pairs_tells_their_variance() -> None:
    """A sum over pairs of random products, 120 questions: within the error of 2,040 of 7,140 pairs."""
    generator = np.random.default_rng(0)
    gram = generator.normal(size=(120, 120)) / 120
    np.fill_diagonal(gram, 0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(-1)
        return np.einsum("...a,ab,...b->...", weights, gram, weights, optimize=True) / (total * (total - 1))

    figure = Estimator(statistic, np.ones(120, bool), 120, pairs=True)
    leave_one_out = figure.statistic(1 - np.eye(120))
    part = figure._pair_variance(leave_one_out)
    all_pairs = np.array(
        [
            120 * figure.statistic(np.ones(120)) - 119 * (leave_one_out[a] + leave_one_out[b])
            + 118 * figure.statistic(np.where(np.isin(np.arange(120), (a, b)), 0.0, 1.0))
            for a in range(120)
            for b in range(a + 1, 120)
        ]
    )  # fmt: skip
    assert part == pytest.approx(all_pairs.var() / 2, rel=0.1)
