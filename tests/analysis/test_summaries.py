import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.node_estimates import estimate
from odp_callbacks.analysis.predictors import ENTROPY_GAP, PREDICTORS, TOP_K_PREDICTORS
from odp_callbacks.analysis.summaries import (
    FIGURES,
    INCORRECT_MINUS_CORRECT,
    SPLITS,
    UPDATE_FIGURES,
    Analysis,
    summarise,
)
from tests.helpers.records import has_equal_successes, random_nodes, report_of


def jackknife_by_hand(values, weights, questions, confidence=0.95):
    """Weighted mean with the delete-one-question jackknife, written out."""
    labels = sorted(set(questions))
    count = len(labels)
    leave_one_out = [np.average(values[questions != label], weights=weights[questions != label]) for label in labels]
    squared_deviations = sum((mean - sum(leave_one_out) / count) ** 2 for mean in leave_one_out)
    half_width = stats.t.ppf(0.5 + confidence / 2, count - 1) * math.sqrt((count - 1) / count * squared_deviations)
    mean = np.average(values, weights=weights)
    return mean, mean - half_width, mean + half_width


def test_means_are_over_tokens_and_their_intervals_over_questions():
    nodes = random_nodes(24)
    summaries = {(summary.teacher, summary.split): summary for summary in summarise(report_of(nodes))}
    assert set(summaries) == {
        (teacher, split) for teacher in ("near", "far") for split in (*SPLITS, INCORRECT_MINUS_CORRECT)
    }
    for teacher_index, teacher in enumerate(("near", "far")):
        for split in SPLITS:
            in_class = [node for node in nodes if split == "all" or node.correct == (split == "correct")]
            assert_class_summary(summaries[teacher, split], in_class, teacher_index)


def assert_class_summary(summary, nodes, teacher_index):
    estimates = [estimate(node) for node in nodes]
    weights = np.array([1 / node.inclusion for node in nodes])
    questions = np.array([node.question for node in nodes])
    values_by_figure = {
        "predicted_gain": np.array([figures.predicted_gain[teacher_index] for figures in estimates]),
        "teacher_advantage": np.array([figures.teacher_advantage[teacher_index] for figures in estimates]),
        **{name: np.array([node.predictors[name][teacher_index] for node in nodes]) for name in PREDICTORS},
    }
    gaps = [abs(node.predictors["teacher_entropy"] - node.predictors["student_entropy"]) for node in nodes]
    values_by_figure[ENTROPY_GAP] = np.array(gaps)[:, teacher_index]
    assert set(summary.figures) == set(FIGURES) - {*UPDATE_FIGURES, *TOP_K_PREDICTORS}, "these records have no top k"
    for name, values in values_by_figure.items():
        figure = summary.figures[name]
        expected = jackknife_by_hand(values, weights, questions)
        assert (figure.value, figure.low, figure.high) == pytest.approx(expected)
        assert (figure.questions, figure.nodes) == (3, len(nodes))
    without_difference = [node for node in nodes if has_equal_successes(node)]
    assert summary.nodes == len(nodes)
    assert summary.undefined == sum(node.exact.all() for node in without_difference)
    assert summary.undetermined == sum(not node.exact.all() for node in without_difference)
    # The uncorrected mean leaves out the nodes without an alignment, as the paper does.
    cosine = np.array([figures.alignment[teacher_index] for figures in estimates])
    exists = ~np.isnan(cosine)
    assert summary.figures["alignment"].uncorrected == pytest.approx(
        np.average(cosine[exists], weights=weights[exists])
    )
    norms = np.array([figures.ideal_norm for figures in estimates])
    assert summary.figures["gain_weighted_alignment"].uncorrected == pytest.approx(
        (weights @ values_by_figure["predicted_gain"]) / (weights @ norms)
    )


def with_known_success(nodes):
    """The same nodes, but their success is known for certain."""
    return [
        replace(
            node,
            count=np.ones_like(node.count),
            total=node.total / node.count,
            exact=np.ones_like(node.exact),
        )
        for node in nodes
    ]


def test_what_is_known_for_certain_needs_no_correction():
    nodes = with_known_success([node for node in random_nodes(40) if not has_equal_successes(node)])
    for summary in summarise(report_of(nodes)):
        for name in ("gain_weighted_alignment", "alignment"):
            figure = summary.figures[name]
            tolerance = 5e-3 if name == "alignment" else 1e-12
            assert figure.value == pytest.approx(figure.uncorrected, abs=tolerance)


def test_the_gap_and_the_contrasts_are_differences_with_their_own_intervals():
    analysis = Analysis(report_of(random_nodes(36)))
    figures = {(summary.teacher, summary.split): summary.figures for summary in analysis.summaries()}
    gap, correct, incorrect = (
        figures["near", split]["predicted_gain"] for split in (INCORRECT_MINUS_CORRECT, "correct", "incorrect")
    )
    assert gap.value == pytest.approx(incorrect.value - correct.value)
    assert gap.half_width > 0
    assert_contrast_on_all_nodes(analysis, figures)
    # Contrasts are paired: where both teachers have the same gradients, the difference is certain.
    nodes = random_nodes(36)
    grams = [node.gram.copy() for node in nodes]
    for gram in grams:
        gram[:, -1], gram[:, :, -1] = gram[:, -2], gram[:, :, -2]
        gram[:, -1, -1] = gram[:, -2, -2]
    twins = Analysis(report_of([replace(node, gram=gram) for node, gram in zip(nodes, grams)]))
    (difference,) = predicted_gains_on_all_nodes(twins.contrasts())
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"`by` must be"):
        analysis.summaries("length")


def predicted_gains_on_all_nodes(summaries):
    return [summary.figures["predicted_gain"] for summary in summaries if summary.split == "all"]


def assert_contrast_on_all_nodes(analysis, figures):
    (contrast,) = predicted_gains_on_all_nodes(analysis.contrasts())
    near, far = (figures[teacher, "all"]["predicted_gain"] for teacher in ("near", "far"))
    assert contrast.value == pytest.approx(near.value - far.value)


def test_other_ways_to_split():
    nodes = [replace(node, depth=index % 6, rollout=index % 4) for index, node in enumerate(random_nodes(48))]
    analysis = Analysis(report_of(nodes))
    by_depth = [summary for summary in analysis.summaries("depth") if summary.teacher == "near"]
    assert [summary.split for summary in by_depth] == ["depth 0", "depth 1", "depth 2-3", "depth 4-7"]
    assert [summary.nodes for summary in by_depth] == [8, 8, 16, 16]
    by_module = {summary.split: summary for summary in analysis.summaries("module") if summary.teacher == "near"}
    assert set(by_module) == {"m", "n"}
    for module_index, module in enumerate(("m", "n")):
        alone = [replace(node, gram=node.gram[module_index : module_index + 1]) for node in nodes]
        one_module = replace(report_of(alone), modules=(module,))
        (expected, *_) = [summary for summary in summarise(one_module) if summary.split == "all"]
        for name in ("predicted_gain", "alignment"):
            value = by_module[module].figures[name].value
            assert value == pytest.approx(expected.figures[name].value, nan_ok=True)
    by_question = [summary for summary in analysis.summaries("question") if summary.teacher == "far"]
    assert [summary.split for summary in by_question] == ["question 0", "question 1", "question 2"]
    assert all(summary.figures["predicted_gain"].note == "one question" for summary in by_question)
    assert len(analysis.summaries("rollout")) == 2 * 4


def test_edge_cases_have_a_number_or_a_reason():
    """One continuation, one node, all correct, all incorrect: finite, or NaN with a reason."""
    one_continuation = [
        replace(node, count=np.ones_like(node.count), total=np.round(node.total / node.count))
        for node in random_nodes(30)
    ]
    cases = [
        one_continuation,
        random_nodes(1),
        [replace(node, correct=True) for node in random_nodes()],
        [replace(node, correct=False) for node in random_nodes()],
    ]
    for nodes in cases:
        for summary in [*summarise(report_of(nodes)), *Analysis(report_of(nodes)).contrasts()]:
            for figure in summary.figures.values():
                assert math.isfinite(figure.value) or figure.note
                assert math.isfinite(figure.low) or figure.note
                assert not math.isinf(figure.low)
                assert not math.isinf(figure.high)
    for summary in summarise(report_of(one_continuation)):
        assert summary.figures["alignment"].note == "few continuations"
        assert math.isfinite(summary.figures["predicted_gain"].value)


def test_an_empty_class_is_nan():
    only_correct = report_of([node for node in random_nodes() if node.correct])
    (near, *_) = [summary for summary in summarise(only_correct) if summary.split == "incorrect"]
    assert (near.nodes, near.undefined) == (0, 0)
    assert all(math.isnan(figure.value) and figure.note for figure in near.figures.values())
    assert all(summary.nodes == 0 for summary in summarise(report_of([])))


@pytest.mark.parametrize("confidence", [0, 1, -0.5, math.nan])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match=r"`confidence` must lie in \(0, 1\)"):
        summarise(report_of([]), confidence)
