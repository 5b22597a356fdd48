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


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("tail", [None, [False, False, True, True]])
def test_figures_are_those_of_the_explicit_vectors(tail):
    given = synthetic(SUCCESS, weight=WEIGHT, tail=tail)
    node, found = given.record, estimate(given.record)
    g, logit_g = (
        sum(w * (q - SUCCESS[0]) * u for w, q, u in zip(WEIGHT[1:], SUCCESS[1:], arms))
        for arms in (given.arms, given.logit_arms)
    )
    assert (found.status == DEFINED).all()
    assert found.ideal_norm == pytest.approx(np.linalg.norm(g), rel=1e-12)
    assert found.success == pytest.approx(np.dot(WEIGHT, SUCCESS), rel=1e-12)
    for k, (d, logit_d) in enumerate(zip(given.teachers, given.logit_teachers)):
        assert found.alignment[k] == pytest.approx(cosine(g, d), abs=1e-12)
        assert found.logit_alignment[k] == pytest.approx(cosine(logit_g, logit_d), abs=1e-12)
        assert found.predicted_gain[k] == pytest.approx(g @ d / np.linalg.norm(d), abs=1e-12)
        assert found.module_alignment[:, k] == pytest.approx([cosine(g[:5], d[:5]), cosine(g[5:], d[5:])], abs=1e-12)
        q = node.teacher_probability[k]
        if tail is None:
            expected = q @ SUCCESS + node.teacher_tail[k] * SUCCESS[0] - found.success
        else:  # all of the tail counts as one token, with its draws' mean
            expected = q[:2] @ SUCCESS[:2] + node.teacher_tail[k] * (0.1 * 0.5 + 0.2 * 1.0) / 0.3 - found.success
        assert found.teacher_advantage[k] == pytest.approx(expected, abs=1e-12)


def test_a_common_constant_of_the_success_does_not_matter():
    low, high = (estimate(synthetic(np.array([0.5, 0.1, 0.3]) + shift).record) for shift in (0, 0.25))
    np.testing.assert_allclose(low.alignment, high.alignment, atol=1e-14)
    np.testing.assert_allclose(low.predicted_gain, high.predicted_gain, atol=1e-14)
    assert high.success - low.success == pytest.approx(0.25)


def test_predicted_gain_is_linear_in_the_success():
    a, b = np.array([0.2, 0.9, 0.4]), np.array([0.7, 0.1, 0.5])
    gains = [estimate(synthetic(q).record).predicted_gain for q in (a, b, (a + b) / 2)]
    np.testing.assert_allclose(gains[2], (gains[0] + gains[1]) / 2, atol=1e-15)


def test_success_is_the_mean_of_the_rewards():
    node = synthetic(SUCCESS, count=[1, 2, 4, 8], weight=WEIGHT).record
    np.testing.assert_allclose(branch_success(node), SUCCESS)
    assert student_success(node) == pytest.approx(np.dot(WEIGHT, SUCCESS))


def undefined_everywhere(found):
    assert np.isnan(found.alignment).all()
    assert np.isnan(found.module_alignment).all()
    assert np.isnan(found.logit_alignment).all()
    assert (found.predicted_gain == 0).all()
    assert found.ideal_norm == 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_same_success_everywhere_has_no_direction(value, exact):
    found = estimate(synthetic([value] * 4, exact=exact).record)
    undefined_everywhere(found)
    assert (found.status == (UNDEFINED if exact else UNDETERMINED)).all()
    assert found.success == value


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_the_same_reward_every_time_has_no_direction_however_often_it_was_given(reward):
    """Sums of decimal rewards round; 0.1 + 0.1 + 0.1 over 3 is not 0.1, and no difference in success either."""
    count = np.array([1, 3, 6, 7])
    node = synthetic([reward] * 4, count=count, total=np.array([sum([reward] * n) for n in count])).record
    found = estimate(node)
    undefined_everywhere(found)
    assert (found.status == UNDETERMINED).all()


def test_one_branch_that_cannot_tell_is_enough():
    found = estimate(synthetic([0.0] * 3, exact=[True, False, True]).record)
    assert (found.status == UNDETERMINED).all()


def test_a_node_with_one_possible_token_is_undefined():
    found = estimate(synthetic([0.5]).record)
    undefined_everywhere(found)
    assert (found.status == UNDEFINED).all()


def test_an_unseen_part_of_the_tail_leaves_it_undetermined():
    """Every branch is known and agrees, but the tail holds 0.3 and its one draw has 0.05: others may differ."""
    node = synthetic([1.0, 1.0], weight=[0.7, 0.3], tail=[False, True], exact=True).record
    assert (estimate(replace(node, probability=np.array([0.7, 0.05]))).status == UNDETERMINED).all()
    assert (estimate(replace(node, probability=np.array([0.7, 0.3]))).status == UNDEFINED).all()


def with_teacher(node, number):
    """The same record with the second teacher's gradient of that number everywhere."""
    gram, logit_gram = node.gram.copy(), node.logit_gram.copy()
    for matrix in (*gram, logit_gram):
        matrix[-1, :] = matrix[:, -1] = number
    return replace(node, gram=gram, logit_gram=logit_gram)


def test_a_silent_teacher_is_undefined_and_alone():
    node = synthetic(SUCCESS).record
    whole, found = estimate(node), estimate(with_teacher(node, 0.0))
    assert list(found.status) == [DEFINED, UNDEFINED]
    assert found.predicted_gain[1] == 0
    assert np.isnan([found.alignment[1], found.logit_alignment[1], *found.module_alignment[:, 1]]).all()
    assert found.alignment[0] == whole.alignment[0]
    silent_and_blind = estimate(with_teacher(synthetic([0.5] * 4).record, 0.0))
    assert list(silent_and_blind.status) == [UNDETERMINED, UNDEFINED]


def test_a_teacher_infinitely_far_has_no_figures():
    """Reverse KL to a teacher that rules a token out has no finite gradient."""
    found = estimate(with_teacher(synthetic(SUCCESS).record, np.nan))
    assert found.status[0] == DEFINED
    assert found.status[1] != DEFINED
    assert np.isnan(found.alignment[1])
    assert np.isnan(found.predicted_gain[1])


def test_a_module_without_a_gradient_is_nan_alone():
    node = synthetic(SUCCESS).record
    found = estimate(replace(node, gram=node.gram * np.array([1.0, 0.0])[:, None, None]))
    assert np.isfinite(found.module_alignment[0]).all()
    assert np.isnan(found.module_alignment[1]).all()
    np.testing.assert_allclose(found.alignment, found.module_alignment[0], rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_alignment_does_not_depend_on_scale(scale):
    node = synthetic(SUCCESS).record
    found = estimate(replace(node, gram=node.gram * scale**2, logit_gram=node.logit_gram * scale**2))
    np.testing.assert_allclose(found.alignment, estimate(node).alignment, rtol=1e-12)
    assert (found.status == DEFINED).all()


def test_rounding_does_not_leave_the_range():
    """A Gram matrix of parallel vectors: the quadratic forms round, the cosine stays in [-1, 1]."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        u = rng.normal(size=(3, 1)) * rng.normal(size=12)
        rows = np.concatenate([u, u[:2]])
        gram = (rows @ rows.T)[None]
        found = estimate(replace(synthetic(SUCCESS, seed=seed).record, gram=gram))
        assert np.abs(found.alignment) == pytest.approx([1, 1], abs=1e-6)
        assert (np.abs(found.alignment) <= 1).all()
