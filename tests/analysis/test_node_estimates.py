from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.node_estimates import (
    DEFINED,
    UNDEFINED,
    UNDETERMINED,
    branch_success,
    estimate,
    student_success,
)
from tests.helpers.records import synthetic

SUCCESS = [0.75, 0.25, 0.5, 1.0]
WEIGHT = [0.5, 0.2, 0.1, 0.2]


def cosine(first, second):
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


@pytest.mark.parametrize("tail", [None, [False, False, True, True]])
def test_figures_are_those_of_the_explicit_vectors(tail):
    vectors = synthetic(SUCCESS, weight=WEIGHT, tail=tail)
    node, figures = vectors.record, estimate(vectors.record)
    ideal, logit_ideal = (
        sum(
            weight * (success - SUCCESS[0]) * direction
            for weight, success, direction in zip(WEIGHT[1:], SUCCESS[1:], directions)
        )
        for directions in (vectors.branches, vectors.logit_branches)
    )
    assert (figures.status == DEFINED).all()
    assert figures.ideal_norm == pytest.approx(np.linalg.norm(ideal), rel=1e-12)
    assert figures.success == pytest.approx(np.dot(WEIGHT, SUCCESS), rel=1e-12)
    for teacher_index, (gradient, logit_gradient) in enumerate(zip(vectors.teachers, vectors.logit_teachers)):
        gain = ideal @ gradient / np.linalg.norm(gradient)
        module_cosines = [cosine(ideal[:5], gradient[:5]), cosine(ideal[5:], gradient[5:])]
        assert figures.alignment[teacher_index] == pytest.approx(cosine(ideal, gradient), abs=1e-12)
        assert figures.logit_alignment[teacher_index] == pytest.approx(cosine(logit_ideal, logit_gradient), abs=1e-12)
        assert figures.predicted_gain[teacher_index] == pytest.approx(gain, abs=1e-12)
        assert figures.module_alignment[:, teacher_index] == pytest.approx(module_cosines, abs=1e-12)
        probability, tail_probability = node.teacher_probability[teacher_index], node.teacher_tail[teacher_index]
        if tail is None:
            expected = probability @ SUCCESS + tail_probability * SUCCESS[0] - figures.success
        else:  # all of the tail counts as one token, with the mean success of its draws
            tail_success = (0.1 * 0.5 + 0.2 * 1.0) / 0.3
            expected = probability[:2] @ SUCCESS[:2] + tail_probability * tail_success - figures.success
        assert figures.teacher_advantage[teacher_index] == pytest.approx(expected, abs=1e-12)


def test_a_common_constant_of_the_success_does_not_matter():
    plain, shifted = (estimate(synthetic(np.array([0.5, 0.1, 0.3]) + shift).record) for shift in (0, 0.25))
    np.testing.assert_allclose(plain.alignment, shifted.alignment, atol=1e-14)
    np.testing.assert_allclose(plain.predicted_gain, shifted.predicted_gain, atol=1e-14)
    assert shifted.success - plain.success == pytest.approx(0.25)


def test_predicted_gain_is_linear_in_the_success():
    first, second = np.array([0.2, 0.9, 0.4]), np.array([0.7, 0.1, 0.5])
    successes = first, second, (first + second) / 2
    gains = [estimate(synthetic(success).record).predicted_gain for success in successes]
    np.testing.assert_allclose(gains[2], (gains[0] + gains[1]) / 2, atol=1e-15)


def test_success_is_the_mean_of_the_rewards():
    node = synthetic(SUCCESS, count=[1, 2, 4, 8], weight=WEIGHT).record
    np.testing.assert_allclose(branch_success(node), SUCCESS)
    assert student_success(node) == pytest.approx(np.dot(WEIGHT, SUCCESS))


def assert_undefined_everywhere(figures):
    assert np.isnan(figures.alignment).all()
    assert np.isnan(figures.module_alignment).all()
    assert np.isnan(figures.logit_alignment).all()
    assert (figures.predicted_gain == 0).all()
    assert figures.ideal_norm == 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_same_success_everywhere_has_no_direction(value, exact):
    figures = estimate(synthetic([value] * 4, exact=exact).record)
    assert_undefined_everywhere(figures)
    assert (figures.status == (UNDEFINED if exact else UNDETERMINED)).all()
    assert figures.success == value


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_the_same_reward_every_time_has_no_direction_however_often_it_was_given(reward):
    """Sums of decimal rewards round; 0.1 + 0.1 + 0.1 over 3 is not 0.1, and no difference in success either."""
    count = np.array([1, 3, 6, 7])
    node = synthetic([reward] * 4, count=count, total=np.array([sum([reward] * number) for number in count])).record
    figures = estimate(node)
    assert_undefined_everywhere(figures)
    assert (figures.status == UNDETERMINED).all()


def test_one_branch_that_cannot_tell_is_enough():
    figures = estimate(synthetic([0.0] * 3, exact=[True, False, True]).record)
    assert (figures.status == UNDETERMINED).all()


def test_a_node_with_one_possible_token_is_undefined():
    figures = estimate(synthetic([0.5]).record)
    assert_undefined_everywhere(figures)
    assert (figures.status == UNDEFINED).all()


def test_an_unseen_part_of_the_tail_leaves_it_undetermined():
    """Every branch is known and agrees, but the tail holds 0.3 and its one draw has 0.05: others may differ."""
    node = synthetic([1.0, 1.0], weight=[0.7, 0.3], tail=[False, True], exact=True).record
    assert (estimate(replace(node, probability=np.array([0.7, 0.05]))).status == UNDETERMINED).all()
    assert (estimate(replace(node, probability=np.array([0.7, 0.3]))).status == UNDEFINED).all()


def with_second_teacher(node, number):
    """The same record with ``number`` for every inner product with the second teacher's gradient."""
    gram, logit_gram = node.gram.copy(), node.logit_gram.copy()
    for matrix in (*gram, logit_gram):
        matrix[-1, :] = matrix[:, -1] = number
    return replace(node, gram=gram, logit_gram=logit_gram)


def test_a_teacher_without_gradient_is_undefined_alone():
    node = synthetic(SUCCESS).record
    unchanged, figures = estimate(node), estimate(with_second_teacher(node, 0.0))
    assert list(figures.status) == [DEFINED, UNDEFINED]
    assert figures.predicted_gain[1] == 0
    assert np.isnan([figures.alignment[1], figures.logit_alignment[1], *figures.module_alignment[:, 1]]).all()
    assert figures.alignment[0] == unchanged.alignment[0]
    zero_gradients = estimate(with_second_teacher(synthetic([0.5] * 4).record, 0.0))
    assert list(zero_gradients.status) == [UNDETERMINED, UNDEFINED]


def test_a_teacher_infinitely_far_has_no_figures():
    """Reverse KL to a teacher that rules a token out has no finite gradient."""
    figures = estimate(with_second_teacher(synthetic(SUCCESS).record, np.nan))
    assert figures.status[0] == DEFINED
    assert figures.status[1] != DEFINED
    assert np.isnan(figures.alignment[1])
    assert np.isnan(figures.predicted_gain[1])


def test_a_module_without_a_gradient_is_nan_alone():
    node = synthetic(SUCCESS).record
    figures = estimate(replace(node, gram=node.gram * np.array([1.0, 0.0])[:, None, None]))
    assert np.isfinite(figures.module_alignment[0]).all()
    assert np.isnan(figures.module_alignment[1]).all()
    np.testing.assert_allclose(figures.alignment, figures.module_alignment[0], rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_alignment_does_not_depend_on_scale(scale):
    node = synthetic(SUCCESS).record
    figures = estimate(replace(node, gram=node.gram * scale**2, logit_gram=node.logit_gram * scale**2))
    np.testing.assert_allclose(figures.alignment, estimate(node).alignment, rtol=1e-12)
    assert (figures.status == DEFINED).all()


def test_rounding_does_not_leave_the_range():
    """A Gram matrix of parallel vectors: the quadratic forms round, the cosine stays in [-1, 1]."""
    for seed in range(50):
        generator = np.random.default_rng(seed)
        parallel = generator.normal(size=(3, 1)) * generator.normal(size=12)
        vectors = np.concatenate([parallel, parallel[:2]])
        gram = (vectors @ vectors.T)[None]
        figures = estimate(replace(synthetic(SUCCESS, seed=seed).record, gram=gram))
        assert np.abs(figures.alignment) == pytest.approx([1, 1], abs=1e-6)
        assert (np.abs(figures.alignment) <= 1).all()
