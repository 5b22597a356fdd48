"""Figures of an update's Gram matrix against the explicit gradients behind it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.analysis.update_gain import direction_cosine, update_alignment, update_contribution, update_gain
from odp_callbacks.functional.updates import update_gain as gain_of_gradients
from odp_callbacks.update_records import gram_of_rows

ALL = (1.0, 1.0)


def draw(groups: int, seed: int, size: int = 7):
    rng = np.random.default_rng(seed)
    questions = rng.integers(1, 4, groups).astype(float)
    return questions, rng.normal(size=(groups, size)), rng.normal(size=(groups, 2, 2, size))


def make_gram(questions, success, directions):
    return gram_of_rows(questions, np.ones((len(questions), 2)), success, directions)


@given(st.integers(2, 8), st.integers(0, 500), st.sampled_from([ALL, (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)]))
def test_the_gain_is_that_of_the_explicit_gradients_whichever_groups_count(groups, seed, classes):
    questions, success, directions = draw(groups, seed)
    estimator = update_gain([make_gram(questions, success, directions)], 1, classes)
    whole = np.einsum("fcp,c->fp", directions[:, 1], classes)
    chosen = np.random.default_rng(seed).integers(0, 2, (3, groups)).astype(float)
    for weights, found in zip([np.ones(groups), *chosen], [*estimator.statistic(np.vstack([np.ones(groups), chosen]))]):
        kept = weights > 0
        if kept.sum() < 2:
            continue
        gains = gain_of_gradients(torch.from_numpy(success[kept]), torch.from_numpy(whole[kept]))
        assert found == pytest.approx(float(gains.sum()) / questions[kept].sum())


@given(st.integers(2, 8), st.integers(0, 500))
def test_contributions_of_classes_add_up(groups, seed):
    gram = make_gram(*draw(groups, seed))
    parts = [update_contribution([gram], 0, classes).statistic(np.ones(groups)) for classes in ((1, 0), (0, 1))]
    assert sum(parts) == pytest.approx(update_contribution([gram], 0, ALL).statistic(np.ones(groups)))


@given(st.integers(2, 8), st.integers(0, 500))
def test_a_contribution_is_the_mean_gradient_of_the_other_groups_times_the_part(groups, seed):
    questions, success, directions = draw(groups, seed)
    total = 0.0
    for group in range(groups):
        others = [other for other in range(groups) if other != group]
        mean = success[others].sum(0) / questions[others].sum()
        total += mean @ directions[group, 0, 1]
    norm = np.linalg.norm(directions[:, 0].sum(axis=(0, 1)))
    gram = make_gram(questions, success, directions)
    assert update_contribution([gram], 0, (0, 1)).statistic(np.ones(groups)) == pytest.approx(total / norm)


def test_the_step_alignment_divides_by_the_norm_of_the_mean_gradient_estimated_from_other_groups():
    rng = np.random.default_rng(0)
    groups, size = 400, 5
    mean = rng.normal(size=size)
    success = mean + 0.05 * rng.normal(size=(groups, size))
    directions = np.broadcast_to(rng.normal(size=(1, 2, 1, size)), (groups, 2, 2, size)) / 2
    gram = make_gram(np.ones(groups), success, directions)
    direction = directions[0, 0].sum(0)
    cosine = mean @ direction / np.linalg.norm(mean) / np.linalg.norm(direction)
    found = float(update_alignment([gram], 0).statistic(np.ones(groups)))
    assert found == pytest.approx(cosine, abs=0.02)
    square = (success.sum(0) @ success.sum(0) - (success**2).sum()) / (groups * (groups - 1))
    gain = float(update_gain([gram], 0).statistic(np.ones(groups)))
    assert found == pytest.approx(gain / np.sqrt(square))


def test_the_cosine_of_two_teachers_directions():
    questions, success, directions = draw(4, 0)
    first, second = directions.sum(axis=(0, 2))
    found = direction_cosine([make_gram(questions, success, directions)], 0, 1)
    assert found == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_a_teacher_without_any_direction_has_no_gain_rather_than_rounding():
    questions, success, directions = draw(5, 0)
    directions[:, 0] = 0.0
    gram = make_gram(questions, success, directions)
    assert np.isnan(update_gain([gram], 0).statistic(np.ones(5)))
    assert np.isnan(direction_cosine([gram], 0, 1))
    alone = directions.copy()
    alone[1:] = 0.0  # nothing is left when the first group is left out
    alone[0] = 0.1 + np.arange(7)
    assert np.isnan(update_gain([make_gram(questions, success, alone)], 0).statistic(np.ones(5)))


def test_one_group_or_one_class_alone_is_said():
    questions, success, directions = draw(1, 0)
    assert update_gain([make_gram(questions, success, directions)], 0).withheld == "one question"
    questions, success, directions = draw(3, 0)
    tokens = np.array([[0.0, 5.0], [0.0, 4.0], [7.0, 0.0]])
    gram = gram_of_rows(questions, tokens, success, directions)
    assert update_gain([gram], 0, (1.0, 0.0)).withheld == "too few rollouts of this class"
    assert update_gain([gram], 0, (0.0, 1.0)).nodes == 9


def test_questions_with_equal_rewards_or_without_rollouts_of_the_class_tell_nothing():
    questions, success, directions = draw(6, 0)
    success[:2] = 0.0
    tokens = np.full((6, 2), 4.0)
    tokens[1:5, 0] = 0.0
    gram = gram_of_rows(questions, tokens, success, directions)
    found = [update_gain([gram], 0, classes).informative for classes in (ALL, (1.0, 0.0), (0.0, 1.0))]
    assert found == [4, 2, 4]
