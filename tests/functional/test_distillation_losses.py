import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from odp_callbacks.functional import (
    distillation_logit_gradient,
    distillation_loss,
    gradient_alignment,
    node_predictors,
)
from tests.helpers.models import DIVERGENCES, DTYPES

every_divergence = pytest.mark.parametrize(("divergence", "options"), DIVERGENCES)
V = 8


def random_logits(rows=6, seed=0):
    torch.manual_seed(seed)
    return 2 * torch.randn(rows, V, dtype=torch.float64), 2 * torch.randn(rows, V, dtype=torch.float64)


def token_option(divergence, student):
    return {"tokens": torch.arange(len(student)) % student.shape[-1]} if divergence == "sampled_token" else {}


def reference_loss(student, teacher, divergence, beta=None, tokens=None, top_k=None, temperature=1.0):
    """The loss by its definition, row by row, with torch's KL divergence."""
    beta = {"reverse_kl": 1.0, "sampled_token": 1.0, "forward_kl": 0.0}.get(divergence, 0.5 if beta is None else beta)
    losses = []
    for row in range(len(student)):
        kept = set(range(student.shape[-1]))
        if top_k is not None:
            top_of_student, top_of_teacher = (
                set(x[row].argsort(descending=True)[:top_k].tolist()) for x in (student, teacher)
            )
            kept = (top_of_student if beta > 0 else set()) | (top_of_teacher if beta < 1 else set())
        support = sorted(kept)
        log_p, log_q = (F.log_softmax(x[row, support] / temperature, dim=0) for x in (student, teacher))
        if divergence == "sampled_token":
            token = int(tokens[row])
            index = support.index(token) if token in kept else None
            losses.append(log_p.sum() * 0 if index is None else -(log_q[index] - log_p[index]).detach() * log_p[index])
        elif beta in (0.0, 1.0):
            target, source = (log_q, log_p) if beta == 0 else (log_p, log_q)
            losses.append(F.kl_div(source, target, reduction="sum", log_target=True))
        else:
            mixture = torch.log(beta * log_q.exp() + (1 - beta) * log_p.exp())
            of_teacher, of_student = (F.kl_div(mixture, x, reduction="sum", log_target=True) for x in (log_q, log_p))
            losses.append(beta * of_teacher + (1 - beta) * of_student)
    return torch.stack(losses)


@every_divergence
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, V, 100])
def test_direction_is_minus_the_gradient_of_the_loss(divergence, options, temperature, top_k):
    student, teacher = random_logits()
    options = {**options, **token_option(divergence, student), "top_k": top_k, "temperature": temperature}
    direction = distillation_logit_gradient(student, teacher, divergence, **options)
    values = []
    for loss in (distillation_loss, reference_loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, divergence, **options)
        assert value.shape == (len(student),)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(direction, -gradient, rtol=1e-10, atol=1e-12)
        values.append(value)
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, 3.7])
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_that_equals_the_student_gives_exact_zeros(divergence, options, dtype, constant, top_k):
    torch.manual_seed(1)
    student = (5 * torch.randn(40, 61, dtype=torch.float64)).to(dtype)
    teacher = student + constant
    direction = distillation_logit_gradient(
        student, teacher, divergence, **options, **token_option(divergence, student), top_k=top_k
    )
    assert direction.dtype == dtype
    assert (direction == 0).all()
    assert gradient_alignment(direction, torch.ones_like(student)).isnan().all()


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_that_differs_beyond_rounding_gives_a_direction(divergence, options, dtype):
    student = torch.linspace(-1, 1, 12).to(dtype).expand(12, -1)
    teacher = student + 16 * torch.finfo(dtype).eps * torch.eye(12, dtype=dtype).roll(5, 0)
    # For the sampled token, the logits must differ at that token.
    tokens = {"tokens": (torch.arange(12) - 5) % 12} if divergence == "sampled_token" else {}
    direction = distillation_logit_gradient(student, teacher, divergence, **options, **tokens)
    assert (direction != 0).any(dim=-1).all()


@every_divergence
def test_a_token_masked_in_the_teacher_is_a_difference(divergence, options):
    """With a logit of -inf the teacher never takes the token, although the student does."""
    student = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    teacher = torch.tensor([2.0, 1.0, -math.inf], dtype=torch.float64)
    tokens = {"tokens": torch.tensor(0)} if divergence == "sampled_token" else {}
    direction = distillation_logit_gradient(student, teacher, divergence, **options, **tokens)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(leaf, teacher, divergence, **options, **tokens), leaf)
    reverse = options.get("beta") == 1.0 or divergence == "reverse_kl"
    if reverse:  # the divergence is infinite, so the direction is not finite, and not zero
        assert not torch.equal(direction, torch.zeros(3, dtype=torch.float64))
    else:
        torch.testing.assert_close(direction, -gradient, rtol=1e-10, atol=1e-12)
        assert (direction != 0).any()


@every_divergence
def test_tokens_masked_in_both_models_change_nothing(divergence, options):
    student, teacher = random_logits()
    tokens = token_option(divergence, student)
    expected = distillation_logit_gradient(student, teacher, divergence, **options, **tokens)
    masked = [F.pad(x, (0, 2), value=-math.inf) for x in (student, teacher)]
    direction = distillation_logit_gradient(*masked, divergence, **options, **tokens)
    torch.testing.assert_close(direction, F.pad(expected, (0, 2)), rtol=1e-12, atol=1e-14)
    loss = distillation_loss(*masked, divergence, **options, **tokens)
    torch.testing.assert_close(
        loss, distillation_loss(student, teacher, divergence, **options, **tokens), rtol=1e-12, atol=1e-14
    )


def test_agreement_is_judged_on_the_support():
    """Under forward KL on the teacher's top 5, a teacher that differs only outside them gives exact zeros."""
    student, _ = random_logits(rows=50)
    student[:, 0] = 9.0
    teacher = student + 0.7
    teacher[:, 0] = -9.0
    assert (distillation_logit_gradient(student, teacher, "forward_kl", top_k=5) == 0).all()


def test_a_students_top_token_masked_in_the_teacher_is_a_difference_under_top_k():
    student = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    teacher = torch.tensor([3.0, 0.0, -math.inf], dtype=torch.float64)
    p, q = torch.softmax(student[:2], 0), torch.softmax(teacher[:2], 0)
    direction = distillation_logit_gradient(student, teacher, "forward_kl", top_k=2)
    torch.testing.assert_close(direction, F.pad(q - p, (0, 1)), rtol=1e-12, atol=1e-14)


@given(
    st.lists(st.tuples(st.floats(-300, 300), st.floats(-300, 300)), min_size=2, max_size=10),
    st.sampled_from(DIVERGENCES),
    st.sampled_from([None, 2, 5]),
)
def test_directions_are_finite_and_sum_to_zero(pairs, divergence, top_k):
    student, teacher = torch.tensor(pairs, dtype=torch.float64).T
    name, options = divergence
    tokens = {"tokens": torch.tensor(1)} if name == "sampled_token" else {}
    direction = distillation_logit_gradient(student, teacher, name, **options, **tokens, top_k=top_k)
    assert direction.isfinite().all()
    assert abs(direction.sum()) <= 1e-11 * max(1.0, float(direction.abs().max()))


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_half_precision_is_computed_in_float32(divergence, options, dtype):
    student, teacher = (x.to(dtype) for x in random_logits())
    tokens = token_option(divergence, student)
    direction = distillation_logit_gradient(student, teacher, divergence, **options, **tokens)
    wide = distillation_logit_gradient(student.double(), teacher.double(), divergence, **options, **tokens)
    torch.testing.assert_close(direction.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_step_along_the_direction_lowers_the_loss():
    student, teacher = random_logits()
    for divergence, options in DIVERGENCES[:-1]:
        step = 1e-3 * distillation_logit_gradient(student, teacher, divergence, **options)
        assert (
            distillation_loss(student + step, teacher, divergence, **options)
            < distillation_loss(student, teacher, divergence, **options)
        ).all()


def test_predictors_equal_those_of_scipy():
    student, teacher = random_logits()
    predictors = node_predictors(student, teacher, temperature=0.7)
    p, q = (torch.softmax(x / 0.7, dim=-1).numpy() for x in (student, teacher))
    expected = {
        "forward_kl": entropy(q, p, axis=1),
        "reverse_kl": entropy(p, q, axis=1),
        "js": jensenshannon(p, q, axis=1) ** 2,
        "cosine": (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1),
        "student_entropy": entropy(p, axis=1),
        "teacher_entropy": entropy(q, axis=1),
    }
    assert predictors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(predictors[name].numpy(), value, rtol=1e-10, err_msg=name)


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize("function", [distillation_loss, distillation_logit_gradient])
@pytest.mark.parametrize(
    ("teacher", "divergence", "options", "error", "message"),
    [
        (ZEROS, "kl", {}, ValueError, r"`divergence` must be one of .*, got 'kl'"),
        (torch.zeros(2, 4), "reverse_kl", {}, ValueError, r"shape of `student_logits`, but \(2, 4\) and \(2, 3\)"),
        (ZEROS.long(), "reverse_kl", {}, TypeError, r"`teacher_logits` must be a floating-point"),
        (ZEROS, "reverse_kl", {"beta": 0.5}, ValueError, r"`beta` belongs to divergence 'jsd'"),
        (ZEROS, "jsd", {"beta": 1.5}, ValueError, r"`beta` must lie in \[0, 1\], but 1.5"),
        (ZEROS, "jsd", {"beta": math.nan}, ValueError, r"`beta` must lie in \[0, 1\]"),
        (ZEROS, "jsd", {"top_k": 0}, ValueError, r"`top_k` must be a positive integer or None, but 0"),
        (ZEROS, "jsd", {"top_k": True}, ValueError, r"`top_k` must be a positive integer"),
        (ZEROS, "jsd", {"top_k": 2.0}, ValueError, r"`top_k` must be a positive integer"),
        (ZEROS, "sampled_token", {}, ValueError, r"'sampled_token' needs `tokens`, but none were given"),
        (
            ZEROS,
            "jsd",
            {"tokens": torch.zeros(2).long()},
            ValueError,
            r"`tokens` belongs to divergence 'sampled_token', but .* is 'jsd'",
        ),
        (ZEROS, "sampled_token", {"tokens": torch.zeros(3).long()}, ValueError, r"`tokens` must have shape \(2,\)"),
        (ZEROS, "jsd", {"temperature": -1.0}, ValueError, r"`temperature` must be a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(function, teacher, divergence, options, error, message):
    with pytest.raises(error, match=message):
        function(ZEROS, teacher, divergence, **options)
