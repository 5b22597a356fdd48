"""What a gate sees: the tokens of a batch of rollouts, and what is known of each when the loss is taken."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from odp_callbacks.records import ProbeReport


@dataclass(frozen=True)
class Tokens:
    """``N`` response tokens. Whatever could not be known is None; :meth:`need` says so where a gate asks for it.

    Attributes:
        rollout: ``(N,)`` int64, the rollout that each belongs to.
        depth: ``(N,)`` int64, response tokens before it.
        length: ``(N,)`` int64, tokens of its response.
        reward: ``(N,)`` of its rollout, in [0, 1].
        correct: ``(N,)`` bool, whether that reward reached the success threshold.
        pass_rate: ``(N,)``, share of correct ones among the rollouts of its question.
        student_entropy: ``(N,)`` in nats, of the policy that chose it.
        teacher_entropy: ``(N,)`` in nats.
        student_log_prob: ``(N,)`` in nats, of the token that was taken.
        teacher_log_prob: ``(N,)`` in nats, of the same token.
        reverse_kl: ``(N,)`` in nats, from student to teacher.
        teacher: ``(N,)`` int64, which of :attr:`teachers` teaches it.
        teachers: Names.
        weight: ``(N,)``, how many tokens each stands for: 1 in training, the inverse inclusion probability in records.
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
        """A feature that a gate cannot do without.

        Raises:
            ValueError: If it is not known, saying what would make it known.
        """
        value: Tensor | None = getattr(self, feature)
        if value is None:
            cure = {
                "reward": "give rewards (a `reward` function)",
                "correct": "give rewards (a `reward` function)",
                "pass_rate": "give rewards (a `reward` function)",
                "teacher": "name the teachers",
            }.get(feature, "give the student's and the teacher's logits")
            raise ValueError(f"`gate` needs {feature!r} of every token, which is not known here; {cure}.")
        return value

    @property
    def counts(self) -> Tensor:
        """:attr:`weight`, or ones."""
        return (
            torch.ones(len(self), dtype=torch.float32, device=self.rollout.device)
            if self.weight is None
            else self.weight
        )

    def with_policies(
        self, student_logits: Tensor, teacher_logits: Tensor, taken: Tensor, temperature: float = 1.0
    ) -> "Tokens":
        """The same tokens with what the two policies say there; no gradient passes.

        Args:
            student_logits: ``(N, V)``.
            teacher_logits: ``(N, V)``.
            taken: ``(N,)`` int64, the tokens themselves.
            temperature: Of both policies.
        """
        found: dict[str, Any] = {**policy_features(student_logits, teacher_logits, taken, temperature)}
        return replace(self, **found)


Gate = Callable[[Tokens], Tensor]
"""From ``N`` tokens to their weights in the loss, ``(N,)``, finite and not negative."""


@runtime_checkable
class Learner(Protocol):
    """A gate that learns from every probe."""

    def observe(self, report: ProbeReport) -> None:
        """Learn from a probe."""


@runtime_checkable
class Router(Protocol):
    """A gate that chooses the teacher of each token."""

    def route(self, tokens: Tokens) -> Tensor:
        """Which of ``tokens.teachers``, ``(N,)`` int64."""


@runtime_checkable
class Stateful(Protocol):
    """A gate that a checkpoint must keep."""

    def state_dict(self) -> dict[str, Any]:
        """What to keep."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""


def tokens_of(
    mask: Tensor,
    rewards: Sequence[float] | Tensor | None = None,
    questions: Sequence[Hashable] | None = None,
    *,
    success_threshold: float = 1.0,
    teachers: Sequence[str] = ("teacher",),
) -> Tokens:
    """The tokens of a padded batch, row by row.

    Args:
        mask: ``(B, T)``: which places hold a response token; elsewhere 0.
        rewards: ``(B,)`` in [0, 1].
        questions: ``B`` labels, equal ones for rollouts of one question; by default each rollout has its own.
        success_threshold: Reward from which a rollout counts as correct.
        teachers: Names of the teachers; the first teaches all tokens until a router says otherwise.

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
    value = torch.as_tensor(rewards, dtype=torch.float32, device=mask.device)
    labels = list(range(len(mask))) if questions is None else list(questions)
    for name, size in (("rewards", len(value)), ("questions", len(labels))):
        if size != len(mask):
            raise ValueError(f"`{name}` must have one entry for each of the {len(mask)} rollouts, but has {size}.")
    correct = value >= success_threshold
    place = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    group = torch.tensor([place[label] for label in labels], device=mask.device)
    # Lightning's "bf16-true" makes bfloat16 the default: said each time, or shares would have two digits.
    passed = torch.zeros(len(place), dtype=torch.float32, device=mask.device).index_add_(0, group, correct.float())
    rate = passed / torch.bincount(group, minlength=len(place))
    return replace(tokens, reward=value[rollout], correct=correct[rollout], pass_rate=rate[group][rollout])


@torch.no_grad()
def policy_features(
    student_logits: Tensor, teacher_logits: Tensor, taken: Tensor, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Entropies, log probabilities and divergence of ``N`` tokens, ``(N,)`` each, float32 at least.

    Args:
        student_logits: ``(N, V)``.
        teacher_logits: ``(N, V)``.
        taken: ``(N,)`` int64.
        temperature: Of both policies.

    Examples:
        >>> import torch
        >>> found = policy_features(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([2]))
        >>> round(float(found["student_entropy"]), 4), float(found["reverse_kl"])
        (1.3863, 0.0)
    """
    student, teacher = (
        torch.log_softmax((z if z.dtype == torch.float64 else z.float()) / temperature, dim=-1)
        for z in (student_logits.detach(), teacher_logits.detach())
    )
    p = student.exp()
    # A token that one of them excludes adds nothing to its own entropy.
    gap = torch.where(p > 0, student - teacher, torch.zeros_like(student))
    return {
        "student_entropy": torch.special.entr(p).sum(dim=-1),
        "teacher_entropy": torch.special.entr(teacher.exp()).sum(dim=-1),
        "student_log_prob": student.gather(-1, taken[:, None])[:, 0],
        "teacher_log_prob": teacher.gather(-1, taken[:, None])[:, 0],
        "reverse_kl": (p * gap).sum(dim=-1),
    }
