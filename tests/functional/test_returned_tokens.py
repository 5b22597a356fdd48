"""Losses on what a server returned are those in which all other tokens are one outcome."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from odp_callbacks.functional import distillation_logit_gradient, distillation_loss
from odp_callbacks.functional.policies import teacher_equals_student
from odp_callbacks.functional.returned_tokens import SMALLEST_REST, ReturnedTokens
from tests.helpers.models import DIVERGENCES

SIZE = 9


def policies(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and log-probabilities of a teacher at four positions."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, SIZE, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return student, teacher.log_softmax(-1)


def likeliest(teacher: Tensor, count: int) -> ReturnedTokens:
    top = teacher.topk(count, dim=-1)
    return ReturnedTokens(top.indices, top.values)


def lumped(policy: Tensor, token_ids: Tensor) -> Tensor:
    """Probabilities of tokens, and of the others together."""
    chosen = policy.gather(-1, token_ids)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)


def divergence_of(p: Tensor, q: Tensor, name: str, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    beta = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(name, beta)
    if beta in (0.0, 1.0):
        return kl(p, q) if beta else kl(q, p)
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


@pytest.mark.parametrize(("name", "options"), DIVERGENCES)
@pytest.mark.parametrize("count", [1, 3, SIZE - 1])
def test_losses_and_directions_are_those_with_the_rest_as_one_outcome(
    name: str, options: dict[str, Any], count: int
) -> None:
    student, teacher = policies()
    returned = likeliest(teacher, count)
    options = {**options, "tokens": returned.token_ids[:, -1]} if name == "sampled_token" else options
    logits = student.clone().requires_grad_()
    p, q = lumped(logits.softmax(-1), returned.token_ids), lumped(teacher.exp(), returned.token_ids)
    if name == "sampled_token":
        chosen = p[:, count - 1].log()
        expected = -(q[:, count - 1].log() - chosen).detach() * chosen
    else:
        expected = divergence_of(p, q, name, options.get("beta", 0.5))
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    filled = returned.logits(student)
    torch.testing.assert_close(distillation_loss(student, filled, name, **options), expected.detach())
    torch.testing.assert_close(distillation_logit_gradient(student, filled, name, **options), -gradient)
    if name != "sampled_token":
        assert (expected <= distillation_loss(student, teacher, name, **options) + 1e-12).all()


def test_all_tokens_are_the_teachers_policy_and_none_is_the_students() -> None:
    student, teacher = policies(1)
    whole = likeliest(teacher, SIZE)
    torch.testing.assert_close(whole.logits(student), teacher)
    torch.testing.assert_close(whole.missing_mass(), torch.zeros(4, dtype=torch.float64))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = student.to(dtype)
        nothing = ReturnedTokens(torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), -math.inf))
        filled = nothing.logits(logits).to(torch.promote_types(dtype, torch.float32))
        assert torch.equal(filled, logits.to(filled))
        assert teacher_equals_student(logits, filled).all()
        assert not distillation_logit_gradient(logits.to(filled), filled).any()


def test_missing_mass_is_that_of_the_other_tokens_and_the_rest_has_it() -> None:
    student, teacher = policies(2)
    returned = likeliest(teacher, 3)
    others = 1 - teacher.exp().topk(3, dim=-1).values.sum(-1)
    torch.testing.assert_close(returned.missing_mass(), others)
    filled = returned.logits(student).softmax(-1)
    torch.testing.assert_close(filled.sum(-1) - filled.gather(-1, returned.token_ids).sum(-1), others)
    certain = ReturnedTokens(torch.tensor([[2]]), torch.tensor([[0.0]], dtype=torch.float64))
    rest = certain.logits(student[:1]).softmax(-1)
    assert 1 - rest[0, 2] == pytest.approx(SMALLEST_REST)


def test_parts_of_several_responses_are_joined() -> None:
    student, teacher = policies(3)
    narrow, wide = likeliest(teacher[:2], 2), likeliest(teacher[2:], 5)
    joined = ReturnedTokens.concatenate([narrow, wide])
    assert len(joined) == 4
    expected = torch.cat([narrow.logits(student[:2]), wide.logits(student[2:])])
    torch.testing.assert_close(joined.logits(student), expected)
    torch.testing.assert_close(joined[[3, 0]].logits(student[[3, 0]]), expected[[3, 0]])


def test_a_token_that_the_student_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="has the token 9, but the student knows 9 tokens"):
        ReturnedTokens(torch.tensor([[9]]), torch.tensor([[-1.0]])).logits(torch.zeros(1, SIZE))
