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


def logits(rows=6, seed=0):
    torch.manual_seed(seed)
    return 2 * torch.randn(rows, V, dtype=torch.float64), 2 * torch.randn(rows, V, dtype=torch.float64)


def sampled(divergence, z):
    return {"tokens": torch.arange(len(z)) % z.shape[-1]} if divergence == "sampled_token" else {}


def plain_loss(z, t, divergence, beta=None, tokens=None, top_k=None, temperature=1.0):
    """The definition, row by row, with torch's own KL."""
    beta = {"reverse_kl": 1.0, "sampled_token": 1.0, "forward_kl": 0.0}.get(divergence, 0.5 if beta is None else beta)
    losses = []
    for row in range(len(z)):
        kept = set(range(z.shape[-1]))
        if top_k is not None:
            of_student, of_teacher = (set(x[row].argsort(descending=True)[:top_k].tolist()) for x in (z, t))
            kept = (of_student if beta > 0 else set()) | (of_teacher if beta < 1 else set())
        at = sorted(kept)
        lp, lq = (F.log_softmax(x[row, at] / temperature, dim=0) for x in (z, t))
        if divergence == "sampled_token":
            y = int(tokens[row])
            here = at.index(y) if y in kept else None
            losses.append(lp.sum() * 0 if here is None else -(lq[here] - lp[here]).detach() * lp[here])
        elif beta in (0.0, 1.0):
            target, source = (lq, lp) if beta == 0 else (lp, lq)
            losses.append(F.kl_div(source, target, reduction="sum", log_target=True))
        else:
            m = torch.log(beta * lq.exp() + (1 - beta) * lp.exp())
            first, second = (F.kl_div(m, x, reduction="sum", log_target=True) for x in (lq, lp))
            losses.append(beta * first + (1 - beta) * second)
    return torch.stack(losses)


@every_divergence
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, V, 100])
def test_direction_is_minus_the_gradient_of_the_loss(divergence, options, temperature, top_k):
    z, t = logits()
    options = {**options, **sampled(divergence, z), "top_k": top_k, "temperature": temperature}
    direction = distillation_logit_gradient(z, t, divergence, **options)
    values = []
    for loss in (distillation_loss, plain_loss):
        leaf = z.clone().requires_grad_()
        value = loss(leaf, t, divergence, **options)
        assert value.shape == (len(z),)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(direction, -gradient, rtol=1e-10, atol=1e-12)
        values.append(value)
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, 3.7])
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_that_equals_the_student_says_nothing(divergence, options, dtype, constant, top_k):
    torch.manual_seed(1)
    z = (5 * torch.randn(40, 61, dtype=torch.float64)).to(dtype)
    t = z + constant
    direction = distillation_logit_gradient(z, t, divergence, **options, **sampled(divergence, z), top_k=top_k)
    assert direction.dtype == dtype
    assert (direction == 0).all()
    assert gradient_alignment(direction, torch.ones_like(z)).isnan().all()


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_that_differs_visibly_is_heard(divergence, options, dtype):
    z = torch.linspace(-1, 1, 12).to(dtype).expand(12, -1)
    t = z + 16 * torch.finfo(dtype).eps * torch.eye(12, dtype=dtype).roll(5, 0)
    # A difference at the token that is asked for, where only one token is.
    where = {"tokens": (torch.arange(12) - 5) % 12} if divergence == "sampled_token" else {}
    direction = distillation_logit_gradient(z, t, divergence, **options, **where)
    assert (direction != 0).any(dim=-1).all()


@every_divergence
def test_a_masked_token_in_the_teacher_is_no_agreement(divergence, options):
    """-inf is a statement: the teacher never takes the token, the student does."""
    z = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    t = torch.tensor([2.0, 1.0, -math.inf], dtype=torch.float64)
    tokens = {"tokens": torch.tensor(0)} if divergence == "sampled_token" else {}
    direction = distillation_logit_gradient(z, t, divergence, **options, **tokens)
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(leaf, t, divergence, **options, **tokens), leaf)
    reverse = options.get("beta") == 1.0 or divergence == "reverse_kl"
    if reverse:  # infinitely far: no finite direction, and certainly not zero
        assert not torch.equal(direction, torch.zeros(3, dtype=torch.float64))
    else:
        torch.testing.assert_close(direction, -gradient, rtol=1e-10, atol=1e-12)
        assert (direction != 0).any()


@every_divergence
def test_tokens_that_neither_can_take_do_not_disturb(divergence, options):
    z, t = logits()
    tokens = sampled(divergence, z)
    expected = distillation_logit_gradient(z, t, divergence, **options, **tokens)
    masked = [F.pad(x, (0, 2), value=-math.inf) for x in (z, t)]
    found = distillation_logit_gradient(*masked, divergence, **options, **tokens)
    torch.testing.assert_close(found, F.pad(expected, (0, 2)), rtol=1e-12, atol=1e-14)
    loss = distillation_loss(*masked, divergence, **options, **tokens)
    torch.testing.assert_close(loss, distillation_loss(z, t, divergence, **options, **tokens), rtol=1e-12, atol=1e-14)


def test_silence_is_judged_on_the_support():
    """Forward KL on the teacher's top 5; the teacher agrees there, and differs where nobody looks."""
    z, _ = logits(rows=50)
    z[:, 0] = 9.0
    t = z + 0.7
    t[:, 0] = -9.0
    assert (distillation_logit_gradient(z, t, "forward_kl", top_k=5) == 0).all()


def test_masking_the_students_choice_under_top_k_is_no_agreement():
    z = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    t = torch.tensor([3.0, 0.0, -math.inf], dtype=torch.float64)
    p, q = torch.softmax(z[:2], 0), torch.softmax(t[:2], 0)
    found = distillation_logit_gradient(z, t, "forward_kl", top_k=2)
    torch.testing.assert_close(found, F.pad(q - p, (0, 1)), rtol=1e-12, atol=1e-14)


@given(
    st.lists(st.tuples(st.floats(-300, 300), st.floats(-300, 300)), min_size=2, max_size=10),
    st.sampled_from(DIVERGENCES),
    st.sampled_from([None, 2, 5]),
)
def test_directions_are_finite_and_sum_to_zero(pairs, divergence, top_k):
    z, t = torch.tensor(pairs, dtype=torch.float64).T
    name, options = divergence
    tokens = {"tokens": torch.tensor(1)} if name == "sampled_token" else {}
    direction = distillation_logit_gradient(z, t, name, **options, **tokens, top_k=top_k)
    assert direction.isfinite().all()
    assert abs(direction.sum()) <= 1e-11 * max(1.0, float(direction.abs().max()))


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_half_precision_is_computed_wide(divergence, options, dtype):
    z, t = (x.to(dtype) for x in logits())
    tokens = sampled(divergence, z)
    found = distillation_logit_gradient(z, t, divergence, **options, **tokens)
    wide = distillation_logit_gradient(z.double(), t.double(), divergence, **options, **tokens)
    torch.testing.assert_close(found.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_descending_lowers_the_loss():
    z, t = logits()
    for divergence, options in DIVERGENCES[:-1]:
        step = 1e-3 * distillation_logit_gradient(z, t, divergence, **options)
        assert (
            distillation_loss(z + step, t, divergence, **options) < distillation_loss(z, t, divergence, **options)
        ).all()


def test_predictors_against_scipy():
    z, t = logits()
    found = node_predictors(z, t, temperature=0.7)
    p, q = (torch.softmax(x / 0.7, dim=-1).numpy() for x in (z, t))
    expected = {
        "forward_kl": entropy(q, p, axis=1),
        "reverse_kl": entropy(p, q, axis=1),
        "js": jensenshannon(p, q, axis=1) ** 2,
        "cosine": (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1),
        "student_entropy": entropy(p, axis=1),
        "teacher_entropy": entropy(q, axis=1),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-10, err_msg=name)


Z = torch.zeros(2, 3)


@pytest.mark.parametrize("function", [distillation_loss, distillation_logit_gradient])
@pytest.mark.parametrize(
    ("teacher", "divergence", "options", "error", "message"),
    [
        (Z, "kl", {}, ValueError, r"`divergence` must be one of .*, got 'kl'"),
        (torch.zeros(2, 4), "reverse_kl", {}, ValueError, r"shape of `student_logits`, but \(2, 4\) and \(2, 3\)"),
        (Z.long(), "reverse_kl", {}, TypeError, r"`teacher_logits` must be a floating-point"),
        (Z, "reverse_kl", {"beta": 0.5}, ValueError, r"`beta` belongs to divergence 'jsd'"),
        (Z, "jsd", {"beta": 1.5}, ValueError, r"`beta` must lie in \[0, 1\], but 1.5"),
        (Z, "jsd", {"beta": math.nan}, ValueError, r"`beta` must lie in \[0, 1\]"),
        (Z, "jsd", {"top_k": 0}, ValueError, r"`top_k` must be a positive integer or None, but 0"),
        (Z, "jsd", {"top_k": True}, ValueError, r"`top_k` must be a positive integer"),
        (Z, "jsd", {"top_k": 2.0}, ValueError, r"`top_k` must be a positive integer"),
        (Z, "sampled_token", {}, ValueError, r"'sampled_token' needs `tokens`"),
        (Z, "jsd", {"tokens": torch.zeros(2).long()}, ValueError, r"'sampled_token' is the only divergence that takes"),
        (Z, "sampled_token", {"tokens": torch.zeros(3).long()}, ValueError, r"`tokens` must have shape \(2,\)"),
        (Z, "jsd", {"temperature": -1.0}, ValueError, r"`temperature` must be a positive number"),
    ],
)
def test_errors(function, teacher, divergence, options, error, message):
    with pytest.raises(error, match=message):
        function(Z, teacher, divergence, **options)
