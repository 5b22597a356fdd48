"""How a probe measures: its one configuration."""

from dataclasses import dataclass, fields
from typing import Any

from odp_callbacks.engine.gradients.loss_directions import UserLoss
from odp_callbacks.engine.tree.allocation import TARGETS
from odp_callbacks.engine.tree.nodes import STRATEGIES, NodeSelector
from odp_callbacks.functional.divergences import Divergence, check_divergence

PLAIN = (str, int, float, tuple, type(None))


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe measures.

    Attributes:
        rollouts_per_question: Student responses to each question.
        max_new_tokens: Limit of a response, in tokens.
        temperature: Of sampling, and of both models in the loss.
        continuations: Targeted continuations of each branch, where neither ``budget`` nor ``seconds`` is given.
        budget: Tokens to spend on continuations, held to within 5 %: at first one continuation a branch, then more
            where they narrow the interval of ``target`` most. Too few for all nodes: some of them are drawn. 0: no
            continuations at all, the *free mode*: predicted gain from the rollouts themselves.
        seconds: The same in seconds; with both, whichever is reached first.
        target: The figure whose interval the budget narrows: ``"predicted_gain"``, ``"gain_weighted_alignment"`` or
            ``"alignment"``.
        half_width: Stop before the budget is spent when every teacher's 95 % interval of ``target``, over all nodes,
            is at most this wide to either side.
        step_alignment: Also measure the cosine of the summed gradients; one more backward for each rollout.
        nodes: Which positions are measured: ``"exponential"`` windows, ``"every"``, ``"uniform"``, ``"entropy"``, or a
            function of your own.
        branch_mass: Probability that the likely branches of a node hold together, in (0, 1].
        max_branches: The most likely branches of a node.
        tail_draws: Tokens drawn from the rest.
        projections: With ``nodes="every"``, gradients are projected on that many random directions wherever this is
            cheaper (long responses): a node's cosine then has a standard error of about one over its root, and modules
            are not told apart. None: never.
        divergence: Name of the distillation loss, or a function ``f(student_logits, teacher_logits)`` from
            ``(N, V)`` to ``(N,)``.
        beta: For ``"jsd"``.
        top_k: Restricts the loss to that many tokens.
        eos_token_ids: More tokens that end a response.
        success_threshold: Reward from which a rollout counts as correct.
        batch_size: The most sequences sampled at a time; fewer where memory is short.
        memory: The most bytes that continuations or pull-backs may take at a time, by an estimate; None: half of what
            is free.
        reward_seconds: The most that one call of the reward function may take; None for no limit.
    """

    rollouts_per_question: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    continuations: int = 4
    budget: int | None = None
    seconds: float | None = None
    target: str = "predicted_gain"
    half_width: float | None = None
    step_alignment: bool = True
    nodes: NodeSelector | str = "exponential"
    branch_mass: float = 0.95
    max_branches: int = 4
    tail_draws: int = 2
    projections: int | None = 256
    divergence: Divergence | UserLoss = "reverse_kl"
    beta: float | None = None
    top_k: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    success_threshold: float = 1.0
    batch_size: int = 256
    memory: float | None = None
    reward_seconds: float | None = 120.0

    def __post_init__(self) -> None:
        """Check every field."""
        whole = (
            "rollouts_per_question", "max_new_tokens", "continuations", "max_branches", "tail_draws", "batch_size"
        )  # fmt: skip
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {value!r} was given.")
        if self.projections is not None and (type(self.projections) is not int or self.projections < 2):
            raise ValueError(f"`projections` must be an integer above 1 or None, but {self.projections!r} was given.")
        if self.budget is not None and (type(self.budget) is not int or self.budget < 0):
            raise ValueError(
                f"`budget` must be a number of tokens, 0 for the free mode, or None, but {self.budget!r} was given."
            )
        for name in ("seconds", "half_width", "memory", "reward_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be a positive number or None, but {value!r} was given.")
        if self.half_width is not None and not self.adaptive:
            raise ValueError("`half_width` needs a `budget` or `seconds` to stop before, but neither was given.")
        if self.target not in TARGETS:
            raise ValueError(f"`target` must be one of {list(TARGETS)}, but {self.target!r} was given.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be a positive number, but {self.temperature!r} was given.")
        for name in ("branch_mass", "success_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], but {getattr(self, name)!r} was given.")
        if not callable(self.nodes) and self.nodes not in STRATEGIES:
            raise ValueError(f"`nodes` must be one of {list(STRATEGIES)} or a function, but got {self.nodes!r}.")
        if not callable(self.divergence):
            check_divergence(self.divergence, self.beta, self.top_k)

    @property
    def free(self) -> bool:
        """No continuations."""
        return self.budget == 0

    @property
    def adaptive(self) -> bool:
        """Continuations go where they help most, up to a limit."""
        return bool(self.budget) or (self.seconds is not None and not self.free)

    @property
    def selector(self) -> NodeSelector:
        """The node selector."""
        return STRATEGIES[self.nodes] if isinstance(self.nodes, str) else self.nodes

    def plain(self) -> dict[str, Any]:
        """The fields by name, functions by theirs: for the reader of a record."""
        return {
            key: value if isinstance(value, PLAIN) else getattr(value, "__qualname__", repr(value))
            for key, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }
