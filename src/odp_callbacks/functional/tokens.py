"""The tokens of a batch of rollouts, with everything that a gate may know about each of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """``N`` response tokens; features that are not known are None, and :meth:`need` raises an error for them.

    Attributes:
        rollout: ``(N,)`` int64, index of the token's rollout.
        depth: ``(N,)`` int64, number of response tokens before the token.
        length: ``(N,)`` int64, number of tokens in the response.
        reward: ``(N,)``, reward of the rollout, in [0, 1]; NaN if it has none.
        correct: ``(N,)`` bool, whether the reward reaches the success threshold.
        pass_rate: ``(N,)``, share of correct rollouts among those of the same question.
        student_entropy: ``(N,)``, entropy of the student's policy at the token, in nats.
        teacher_entropy: ``(N,)``, entropy of the teacher's policy at the token, in nats.
        student_log_prob: ``(N,)``, log probability that the student gives the token, in nats.
        teacher_log_prob: ``(N,)``, log probability that the teacher gives the token, in nats.
        reverse_kl: ``(N,)``, divergence ``KL(student || teacher)`` at the token, in nats.
        teacher: ``(N,)`` int64, index of the token's teacher in :attr:`teachers`.
        teachers: Names of the teachers.
        weight: ``(N,)``, how many tokens each one stands for; None in training, where it is 1, and the inverse
            inclusion probability in records.
    """

    rollout: Tensor
    depth: Tensor
    length: Tensor
    reward: Tensor | None = None
    correct: Tensor | None = None
    pass_rate: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    student_log_prob: Tensor | None = None
    teacher_log_prob: Tensor | None = None
    reverse_kl: Tensor | None = None
    teacher: Tensor | None = None
    teachers: tuple[str, ...] = ()
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollout)

    def need(self, feature: str) -> Tensor:
        """Return a feature that a gate cannot do without.

        Args:
            feature: Name of the attribute.

        Raises:
            ValueError: If the feature is not known; the message says how to make it known.
        """
        value: Tensor | None = getattr(self, feature)
        if value is None:
            remedy = {
                "reward": "give rewards (a `reward` function)",
                "correct": "give rewards (a `reward` function)",
                "pass_rate": "give rewards (a `reward` function)",
                "teacher": "name the teachers",
            }.get(feature, "give the student's and the teacher's logits")
            raise ValueError(f"`gate` needs {feature!r} of every token, which is not known here; {remedy}.")
        return value

    def take(self, chosen: Tensor) -> "Tokens":
        """Return some of the tokens.

        Args:
            chosen: ``(N,)`` bool, or the indices of the tokens, int64.
        """
        features = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen_features: dict[str, Any] = {
            name: value[chosen] for name, value in features.items() if isinstance(value, Tensor)
        }
        return replace(self, **chosen_features)

    @property
    def counts(self) -> Tensor:
        """How many tokens each one stands for, ``(N,)``: :attr:`weight`, or ones."""
        if self.weight is not None:
            return self.weight
        return torch.ones(len(self), dtype=torch.float32, device=self.rollout.device)

    def with_policies(
        self, student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float = 1.0
    ) -> "Tokens":
        """Return the same tokens with the features of both policies, which carry no gradient.

        Args:
            student_logits: ``(N, V)``.
            teacher_logits: ``(N, V)``.
            token_ids: ``(N,)`` int64, the tokens themselves.
            temperature: Temperature of both policies.
        """
        features: dict[str, Any] = {**policy_features(student_logits, teacher_logits, token_ids, temperature)}
        return replace(self, **features)


def tokens_of(
    mask: Tensor,
    rewards: Sequence[float] | Tensor | None = None,
    questions: Sequence[Hashable] | None = None,
    *,
    success_threshold: float = 1.0,
    teachers: Sequence[str] = ("teacher",),
) -> Tokens:
    """Collect the tokens of a padded batch of ``B`` rollouts, row by row.

    Args:
        mask: ``(B, T)``, 1 where there is a response token and 0 elsewhere.
        rewards: ``(B,)``, in [0, 1], and NaN for a rollout without a reward; None if they are not known.
        questions: ``B`` labels that are equal for rollouts of the same question; None if each rollout has a question of
            its own.
        success_threshold: Reward from which a rollout counts as correct.
        teachers: Names of the teachers. All tokens have the first one until a router assigns others.

    Returns:
        The tokens, in the order of ``losses[mask]`` for losses ``(B, T)``.

    Raises:
        ValueError: If the number of rewards or questions is not that of the rollouts.

    Examples:
        >>> import torch
        >>> tokens = tokens_of(torch.tensor([[1, 1], [1, 0]]), rewards=[1.0, 0.0], questions=["a", "a"])
        >>> tokens.depth.tolist(), tokens.correct.tolist(), tokens.pass_rate.tolist()
        ([0, 1, 0], [True, True, False], [0.5, 0.5, 0.5])
    """
    mask = mask.bool()
    rollout, _ = mask.nonzero(as_tuple=True)
    tokens = Tokens(
        rollout=rollout,
        depth=(mask.cumsum(dim=1) - 1)[mask],
        length=mask.sum(dim=1)[rollout],
        teacher=torch.zeros_like(rollout),
        teachers=tuple(teachers),
    )
    if rewards is None:
        return tokens
    reward = torch.as_tensor(rewards, dtype=torch.float32, device=mask.device)
    labels = list(range(len(mask))) if questions is None else list(questions)
    for name, size in (("rewards", len(reward)), ("questions", len(labels))):
        if size != len(mask):
            raise ValueError(f"`{name}` must have one entry for each of the {len(mask)} rollouts, but has {size}.")
    correct = reward >= success_threshold
    is_scored = ~reward.isnan()
    index_of_label = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    question_index = torch.tensor([index_of_label[label] for label in labels], device=mask.device)
    # Lightning's "bf16-true" makes bfloat16 the default dtype, in which shares would have only two digits.
    correct_count = torch.zeros(len(index_of_label), dtype=torch.float32, device=mask.device)
    correct_count.index_add_(0, question_index, correct.float())
    pass_rate = correct_count / torch.bincount(question_index[is_scored], minlength=len(index_of_label))
    return replace(
        tokens, reward=reward[rollout], correct=correct[rollout], pass_rate=pass_rate[question_index][rollout]
    )


@torch.no_grad()
def policy_features(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Compute the features of both policies at ``N`` tokens: entropies, log probabilities and divergence.

    Args:
        student_logits: ``(N, V)``.
        teacher_logits: ``(N, V)``.
        token_ids: ``(N,)`` int64, the tokens themselves.
        temperature: Temperature of both policies.

    Returns:
        By the names of the attributes of :class:`Tokens`, ``(N,)`` each, float32 at least.

    Examples:
        >>> import torch
        >>> features = policy_features(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([2]))
        >>> round(float(features["student_entropy"]), 4), float(features["reverse_kl"])
        (1.3863, 0.0)
    """
    student_log_probs, teacher_log_probs = (
        torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, dim=-1)
        for logits in (student_logits.detach(), teacher_logits.detach())
    )
    student_probs = student_log_probs.exp()
    # A token that the student excludes adds nothing; without this, infinity minus infinity would make it NaN.
    log_ratio = torch.where(
        student_probs > 0, student_log_probs - teacher_log_probs, torch.zeros_like(student_log_probs)
    )
    return {
        "student_entropy": torch.special.entr(student_probs).sum(dim=-1),
        "teacher_entropy": torch.special.entr(teacher_log_probs.exp()).sum(dim=-1),
        "student_log_prob": student_log_probs.gather(-1, token_ids[:, None])[:, 0],
        "teacher_log_prob": teacher_log_probs.gather(-1, token_ids[:, None])[:, 0],
        "reverse_kl": (student_probs * log_ratio).sum(dim=-1),
    }
