"""The gradients of a node against autograd, and the score against torch's cosine."""

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.paper.node_score import (
    gkd_gradient,
    ideal_gradient,
    logit_cosine,
    renormalised,
    teacher_advantage,
)

RNG = np.random.default_rng(0)
SIZES = (2, 3, 7)


def drawn(size):
    """Log-probabilities of student and two teachers that do not sum to 1, and success rates."""
    logits = torch.log_softmax(torch.from_numpy(RNG.normal(size=(3, size + 4))), dim=-1)[:, :size]
    return logits, torch.from_numpy(RNG.random(size))


@pytest.mark.parametrize("size", SIZES)
def test_the_ideal_gradient_is_that_of_the_success_on_the_visited_tokens(size):
    logits, success = drawn(size)
    student = logits[0].clone().requires_grad_()
    (torch.softmax(student, -1) @ success).backward()
    policy = np.exp(renormalised(logits[0].numpy()))
    np.testing.assert_allclose(ideal_gradient(policy, success.numpy()), student.grad.numpy(), atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_the_gkd_gradient_descends_the_kl_from_student_to_teacher(size):
    logits, _ = drawn(size)
    own = renormalised(logits[0].numpy())
    gradients = gkd_gradient(np.exp(own), logits[0].numpy() - logits[1:].numpy())
    for teacher, gradient in zip(logits[1:], gradients, strict=True):
        student = logits[0].clone().requires_grad_()
        log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
        (log_p.exp() * (log_p - log_q)).sum().backward()
        np.testing.assert_allclose(gradient, -student.grad.numpy(), atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_the_score_is_a_cosine(size):
    a, b = torch.from_numpy(RNG.normal(size=size)), torch.from_numpy(RNG.normal(size=(2, size)))
    expected = torch.nn.functional.cosine_similarity(a[None], b, dim=-1)
    np.testing.assert_allclose(logit_cosine(a.numpy(), b.numpy()), expected.numpy(), atol=1e-14)


def test_with_two_tokens_the_score_is_a_sign():
    for _ in range(20):
        logits, success = drawn(2)
        policy, success = np.exp(renormalised(logits[0].numpy())), success.numpy()
        ratio = (logits[0] - logits[1]).numpy()
        score = float(logit_cosine(ideal_gradient(policy, success), gkd_gradient(policy, ratio)))
        assert score == pytest.approx(np.sign((success[0] - success[1]) * (ratio[1] - ratio[0])), abs=1e-12)


def test_the_score_is_undefined_where_a_gradient_vanishes():
    policy = np.array([0.25, 0.75])
    assert np.isnan(logit_cosine(ideal_gradient(policy, np.array([0.3, 0.3])), np.array([1.0, -1.0])))
    assert np.isnan(logit_cosine(np.array([1.0, -1.0]), gkd_gradient(policy, np.array([0.5, 0.5 + 1e-7]))))


def test_the_teacher_advantage_renormalises_both_policies():
    student, teacher, success = [0.2, 0.1, 0.1], [0.1, 0.0, 0.3], [1.0, 0.5, 0.25]
    expected = sum((t / 0.4 - s / 0.4) * q for s, t, q in zip(student, teacher, success, strict=True))
    assert float(teacher_advantage(*map(np.array, (student, teacher, success)))) == pytest.approx(expected)
