"""How a probe measures: its one configuration."""

from dataclasses import asdict, dataclass
from typing import Any

from odp_callbacks.engine.directions import UserLoss
from odp_callbacks.engine.nodes import NodeSelector, exponential_windows
from odp_callbacks.functional.divergences import Divergence, check_divergence


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe measures.

    Attributes:
        rollouts_per_question: Student responses to each question.
        max_new_tokens: Limit of a response, in tokens.
        temperature: Of sampling, and of both models in the loss.
        continuations: Targeted continuations of each branch.
        budget: The most tokens to spend on continuations; each branch gets at least one. None: no limit. How many a
            branch gets then depends a little on how long earlier ones were: with a handful of branches, and rewards
            that go with length, that is a bias.
        nodes: Which positions are measured.
        branch_mass: Probability that the likely branches of a node hold together, in (0, 1].
        max_branches: The most likely branches of a node.
        tail_draws: Tokens drawn from the rest.
        divergence: Name of the distillation loss, or a function ``f(student_logits, teacher_logits)`` from
            ``(N, V)`` to ``(N,)``.
        beta: For ``"jsd"``.
        top_k: Restricts the loss to that many tokens.
        eos_token_ids: More tokens that end a response.
        success_threshold: Reward from which a rollout counts as correct.
        batch_size: The most sequences sampled at a time.
    """

    rollouts_per_question: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    continuations: int = 4
    budget: int | None = None
    nodes: NodeSelector = exponential_windows
    branch_mass: float = 0.95
    max_branches: int = 4
    tail_draws: int = 2
    divergence: Divergence | UserLoss = "reverse_kl"
    beta: float | None = None
    top_k: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    success_threshold: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check every field."""
        whole = (
            "rollouts_per_question", "max_new_tokens", "continuations", "max_branches", "tail_draws", "batch_size"
        )  # fmt: skip
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {value!r} was given.")
        if self.budget is not None and (type(self.budget) is not int or self.budget < 1):
            raise ValueError(f"`budget` must be a positive number of tokens or None, but {self.budget!r} was given.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be a positive number, but {self.temperature!r} was given.")
        for name in ("branch_mass", "success_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], but {getattr(self, name)!r} was given.")
        if not callable(self.nodes):
            raise ValueError(f"`nodes` must be a function such as `exponential_windows`, but got {self.nodes!r}.")
        if not callable(self.divergence):
            check_divergence(self.divergence, self.beta, self.top_k)

    def plain(self) -> dict[str, Any]:
        """The fields by name, functions by theirs: for the reader of a record."""
        return {key: getattr(value, "__qualname__", value) for key, value in asdict(self).items()}
