"""Overlap and masses of the likeliest tokens, by hand and against an independent computation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from odp_callbacks.functional.top_k import TOP_K, top_k_predictors


def figures_of(student: list[float], teacher: list[float], **options: float) -> dict[str, float]:
    logits = [torch.tensor(policy, dtype=torch.float64).log() for policy in (student, teacher)]
    return {name: float(value) for name, value in top_k_predictors(*logits, **options).items()}  # type: ignore[arg-type]


def by_sets(student_logits: Tensor, teacher_logits: Tensor, temperature: float, top_k: int) -> dict[str, float]:
    """The definitions, token by token."""
    p, q = (
        (weights := np.exp(logits.double().numpy() / temperature)) / weights.sum()
        for logits in (student_logits, teacher_logits)
    )
    likeliest = [set(np.argsort(-policy)[:top_k].tolist()) for policy in (p, q)]
    shared = sorted(likeliest[0] & likeliest[1])
    own, other = p[shared] / p[shared].sum(), q[shared] / q[shared].sum()
    return {
        "top_k_overlap": len(shared) / top_k,
        "overlap_advantage": float(np.mean(own * np.log(other / own))) if shared else math.nan,
        "student_mass_on_teacher_top_k": sum(p[token] for token in likeliest[1]),
        "teacher_mass_on_student_top_k": sum(q[token] for token in likeliest[0]),
    }


def test_figures_by_hand() -> None:
    figures = figures_of([0.5, 0.3, 0.1, 0.1], [0.3, 0.1, 0.5, 0.1], top_k=2)  # tokens 0, 1 and 2, 0
    assert figures["top_k_overlap"] == 0.5
    assert figures["overlap_advantage"] == 0, "of a single shared token both give all"
    assert figures["student_mass_on_teacher_top_k"] == pytest.approx(0.6)
    assert figures["teacher_mass_on_student_top_k"] == pytest.approx(0.4)
    swapped = figures_of([0.6, 0.2, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], top_k=2)
    assert swapped["top_k_overlap"] == 1
    kl = 0.75 * math.log(3) - 0.25 * math.log(3)
    assert swapped["overlap_advantage"] == pytest.approx(-kl / 2)


@pytest.mark.parametrize("top_k", [1, 3, 16])
def test_figures_are_those_of_the_definitions(top_k: int) -> None:
    student, teacher = 2 * torch.randn(2, 4, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figures = top_k_predictors(student, teacher, 0.7, top_k=top_k)
    for place in np.ndindex(4, 5):
        expected = by_sets(student[place], teacher[place], 0.7, top_k)
        found = {name: float(values[place]) for name, values in figures.items()}
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14, nan_ok=True)


def test_equal_policies_agree_exactly() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    figures = top_k_predictors(logits, logits.clone())
    assert (figures["top_k_overlap"] == 1).all()
    assert (figures["overlap_advantage"] == 0).all()
    assert torch.equal(figures["student_mass_on_teacher_top_k"], figures["teacher_mass_on_student_top_k"])


def test_without_a_shared_token_the_advantage_is_undefined() -> None:
    figures = figures_of([0.9, 0.05, 0.05], [0.05, 0.9, 0.05], top_k=1)
    assert math.isnan(figures.pop("overlap_advantage"))
    assert figures == pytest.approx(
        {"top_k_overlap": 0, "student_mass_on_teacher_top_k": 0.05, "teacher_mass_on_student_top_k": 0.05}
    )


def test_tokens_that_a_model_excludes_are_not_shared() -> None:
    figures = figures_of([0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], top_k=4)
    assert figures["top_k_overlap"] == 0.25
    assert figures["overlap_advantage"] == 0
    assert figures["student_mass_on_teacher_top_k"] == pytest.approx(1)


def test_a_small_vocabulary_is_its_own_top_k_and_half_precision_is_widened() -> None:
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    figures = top_k_predictors(student, teacher)
    assert student.shape[-1] < TOP_K
    assert (figures["top_k_overlap"] == 1).all()
    assert all(values.dtype == torch.float32 and values.shape == (3,) for values in figures.values())
    p, q = torch.softmax(student.float(), -1), torch.softmax(teacher.float(), -1)
    torch.testing.assert_close(figures["overlap_advantage"], -(p * (p / q).log()).sum(-1) / 5)


def test_no_gradient_flows() -> None:
    logits = torch.zeros(4, requires_grad=True)
    assert not any(values.requires_grad for values in top_k_predictors(logits, torch.ones(4)).values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 0}, "`top_k` must be a positive integer"),
        ({"top_k": True}, "`top_k` must be a positive integer"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"teacher_logits": torch.zeros(3)}, "`teacher_logits` must have the shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, object], match: str) -> None:
    arguments: dict[str, object] = {"student_logits": torch.zeros(4), "teacher_logits": torch.zeros(4), **options}
    with pytest.raises(ValueError, match=match):
        top_k_predictors(**arguments)  # type: ignore[arg-type]
