import pytest
import torch
import torch.nn.functional as F

from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.functional import distillation_logit_gradient
from tests.helpers.models import DIVERGENCES

torch.manual_seed(0)
STUDENT, TEACHER = 2 * torch.randn(2, 5, 9, dtype=torch.float64)
TOKENS = torch.tensor([0, 3, 8, 1, 1])


def reverse_kl(student, teacher):
    return F.kl_div(F.log_softmax(teacher, -1), F.log_softmax(student, -1), reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize(("divergence", "options"), DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_named_loss_equals_the_function(divergence, options, top_k):
    direction = distillation_direction(divergence, options.get("beta"), top_k, 0.7)
    tokens = {"tokens": TOKENS} if divergence == "sampled_token" else {}
    expected = distillation_logit_gradient(
        STUDENT, TEACHER, divergence, **options, **tokens, top_k=top_k, temperature=0.7
    )
    assert torch.equal(direction(STUDENT, TEACHER, TOKENS), expected)


def test_a_users_loss_equals_the_named_one():
    with torch.no_grad():
        descent = distillation_direction(reverse_kl, None, None, 1.0)(STUDENT, TEACHER, TOKENS)
    torch.testing.assert_close(descent, distillation_logit_gradient(STUDENT, TEACHER), rtol=1e-10, atol=1e-13)


def test_a_users_loss_does_not_train_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    descent = distillation_direction(lambda student, teacher: ((student - teacher) ** 2).sum(-1), None, None, 1.0)(
        STUDENT, teacher, TOKENS
    )
    torch.testing.assert_close(descent, 2 * (TEACHER - STUDENT), rtol=1e-13, atol=0)
    assert not descent.requires_grad
    assert teacher.grad is None


@pytest.mark.parametrize("divergence", ["reverse_kl", reverse_kl])
def test_logits_beyond_the_teachers_vocabulary_get_zeros(divergence):
    direction = distillation_direction(divergence, None, None, 1.0)
    descent = direction(STUDENT, TEACHER[:, :7], TOKENS)
    torch.testing.assert_close(
        descent[:, :7], distillation_logit_gradient(STUDENT[:, :7], TEACHER[:, :7]), rtol=1e-10, atol=1e-13
    )
    assert (descent[:, 7:] == 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", reverse_kl])
@pytest.mark.parametrize("constant", [0.0, 2.5])
def test_a_teacher_that_equals_the_student_gives_exact_zeros(divergence, constant):
    assert (distillation_direction(divergence, None, None, 1.0)(STUDENT, STUDENT + constant, TOKENS) == 0).all()


@pytest.mark.parametrize(
    "bad",
    [lambda student, teacher: (student - teacher).sum(), lambda student, teacher: student - teacher, lambda *_: 0.5],
)
def test_a_users_loss_of_another_shape_is_refused(bad):
    with pytest.raises(
        ValueError, match=r"`divergence` must return one loss for each token, shape \(5,\), but it gave"
    ):
        distillation_direction(bad, None, None, 1.0)(STUDENT, TEACHER, TOKENS)


def test_options_are_checked_at_construction():
    with pytest.raises(ValueError, match="`beta` belongs to divergence 'jsd'"):
        distillation_direction("reverse_kl", 0.5, None, 1.0)
    with pytest.raises(ValueError, match=r"`divergence` must be one of .* or a function"):
        distillation_direction("kl", None, None, 1.0)
