"""The tokens that a gate sees."""

import pytest
import torch

from odp_callbacks.gates import Tokens, policy_features, tokens_of

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])


def test_tokens_come_row_by_row_with_depth_and_length() -> None:
    tokens = tokens_of(MASK)
    assert tokens.rollout.tolist() == [0, 0, 0, 1, 3, 3]
    assert tokens.depth.tolist() == [0, 1, 2, 0, 0, 1]
    assert tokens.length.tolist() == [3, 3, 3, 1, 2, 2]
    assert tokens.correct is None


def test_left_padded_rows_count_their_depth_from_their_own_first_token() -> None:
    assert tokens_of(torch.tensor([[0, 1, 1], [1, 1, 1]])).depth.tolist() == [0, 1, 0, 1, 2]


def test_pass_rates_are_shares_of_correct_siblings() -> None:
    tokens = tokens_of(MASK, [1.0, 0.4, 0.0, 0.5], ["a", "a", "b", "b"], success_threshold=0.5)
    assert tokens.correct.tolist() == [True] * 3 + [False] + [True] * 2
    assert tokens.pass_rate.tolist() == [0.5] * 6
    without_questions = tokens_of(MASK, [1.0, 0.4, 0.0, 0.5])
    assert without_questions.pass_rate.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rewards": [1.0]}, "`rewards` must have one entry for each of the 4 rollouts, but has 1"),
        ({"rewards": [1.0] * 4, "questions": ["a"]}, "`questions` must have one entry"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokens_of(MASK, **options)  # type: ignore[arg-type]


def test_policy_features_against_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    student_logits, teacher_logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(7, (5,), generator=generator)
    student, teacher = (
        torch.distributions.Categorical(logits=logits / 0.7) for logits in (student_logits, teacher_logits)
    )
    features = policy_features(student_logits, teacher_logits, token_ids, 0.7)
    expected = {
        "student_entropy": student.entropy(),
        "teacher_entropy": teacher.entropy(),
        "student_log_prob": student.log_prob(token_ids),
        "teacher_log_prob": teacher.log_prob(token_ids),
        "reverse_kl": torch.distributions.kl_divergence(student, teacher),
    }
    for name, value in expected.items():
        torch.testing.assert_close(features[name], value, rtol=1e-12, atol=1e-12)


def test_tokens_that_a_policy_excludes_cause_no_nan() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    features = policy_features(logits, logits, torch.tensor([0]))
    assert all(bool(torch.isfinite(value).all()) for value in features.values())
    assert float(features["reverse_kl"]) == 0


def test_features_carry_no_gradient() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    tokens = tokens_of(torch.ones(1, 2)).with_policies(logits, logits, torch.tensor([0, 1]))
    assert not tokens.need("student_entropy").requires_grad


def test_the_error_for_a_missing_feature_says_what_to_give() -> None:
    tokens: Tokens = tokens_of(MASK)
    with pytest.raises(ValueError, match=r"'pass_rate'.*give rewards"):
        tokens.need("pass_rate")
    with pytest.raises(ValueError, match=r"'teacher_entropy'.*logits"):
        tokens.need("teacher_entropy")
