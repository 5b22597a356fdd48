"""Many nodes as arrays: what every figure is computed from, at once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.records import Floats, NodeRecord

NOISE = 16 * float(np.finfo(np.float64).eps)
"""Two means of the same rewards differ by rounding; no two successes differ by as little."""
MOST = 1e4
"""Continuations that a success known for certain counts as."""


@dataclass(frozen=True)
class Evidence:
    r"""``N`` nodes with ``A`` branches at the most and ``K`` teachers; missing branches count for nothing.

    The ideal gradient is linear in the successes :math:`Q` of the branches, so its squared norm is :math:`Q^\top H Q`
    and its inner product with a teacher's unit direction is :math:`b^\top Q`. Both vanish on a common constant.

    Attributes:
        question: ``(N,)``, a number for each question.
        token_weight: ``(N,)``, inverse inclusion probability.
        correct: ``(N,)`` bool, of the rollout.
        depth: ``(N,)``.
        norm_form: ``(N, A, A)``, :math:`H`.
        gain_form: ``(N, K, A)``, :math:`b`; 0 for a silent teacher, NaN for one that is infinitely far.
        teacher_norm: ``(N, K)``.
        real: ``(N, A)`` bool: the branch exists.
        count: ``(N, A)``, continuations scored; 1 where there is no branch.
        total: ``(N, A)``, sum of rewards.
        total_square: ``(N, A)``, sum of their squares.
        exact: ``(N, A)`` bool: success is known.
        certain: ``(N,)`` bool: every possible token was seen and its success is known.
    """

    question: NDArray[np.int64]
    token_weight: Floats
    correct: NDArray[np.bool_]
    depth: NDArray[np.int64]
    norm_form: Floats
    gain_form: Floats
    teacher_norm: Floats
    real: NDArray[np.bool_]
    count: Floats
    total: Floats
    total_square: Floats
    exact: NDArray[np.bool_]
    certain: NDArray[np.bool_]

    @cached_property
    def success(self) -> Floats:
        """Mean reward of each branch, ``(N, A)``."""
        mean: Floats = self.total / self.count
        return mean

    @cached_property
    def gain(self) -> Floats:
        """Predicted gain of each node and teacher, ``(N, K)``."""
        gain: Floats = np.einsum("nka,na->nk", self.gain_form, self.offset)
        return gain

    @cached_property
    def ideal_norm(self) -> Floats:
        """Norm of the estimated ideal gradient, ``(N,)``; noise lengthens it."""
        return norm(self.norm_form, self.offset)

    @cached_property
    def cosine(self) -> Floats:
        """Alignment of each node and teacher as it comes, ``(N, K)``; NaN where either gradient is zero."""
        there = (self.ideal_norm[:, None] > 0) & (self.teacher_norm > 0)
        ratio: Floats = np.divide(self.gain, self.ideal_norm[:, None], out=np.full(there.shape, np.nan), where=there)
        return ratio.clip(-1, 1)  # rounding only: a Gram matrix keeps the inequality of Cauchy and Schwarz

    @cached_property
    def variance(self) -> Floats:
        """Unbiased variance of each branch's mean, ``(N, A)``; 0 where it is known, NaN with one continuation."""
        n = self.count
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = (self.total_square - self.total**2 / n).clip(min=0) / (n - 1) / n
        return np.where(self.exact | ~self.real, 0.0, np.where(n > 1, spread, np.nan))

    @property
    def norm_square(self) -> Floats:
        r"""Unbiased estimate of the ideal gradient's squared norm, ``(N,)``; may be negative, NaN where ``n`` is 1.

        :math:`\hat Q^\top H \hat Q - \sum_a \hat v_a H_{aa}`.
        """
        plain: Floats = np.einsum("na,nab,nb->n", self.offset, self.norm_form, self.offset)
        curve = np.einsum("naa->na", self.norm_form)
        noise: Floats = np.where(curve > 0, self.variance * curve, 0).sum(axis=1)
        return plain - noise

    @cached_property
    def offset(self) -> Floats:
        """Successes less that of the first branch, ``(N, A)``: equal ones cancel exactly."""
        difference = self.success - self.success[:, :1]
        return np.where(self.real & (np.abs(difference) > NOISE), difference, 0)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Evidence":
        """The chosen nodes, a mask ``(N,)`` or indices."""
        return Evidence(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


def norm(form: Floats, success: Floats) -> Floats:
    """Norm of the ideal gradient for ``form`` ``(N, A, A)`` and ``success`` ``(N, ..., A)``: ``(N, ...)``."""
    square: Floats = np.einsum("n...a,nab,n...b->n...", success, form, success, optimize=True)
    length: Floats = np.sqrt(square.clip(min=0))  # a quadratic form can come out at -1e-20 where it is zero
    return length


def gather(nodes: Sequence[NodeRecord], module: int | None = None, logits: bool = False, teachers: int = 0) -> Evidence:
    """Put nodes into arrays.

    Neighbours help each other: what was measured behind the token that a rollout took counts for that token.

    Args:
        nodes: ``N`` records with the same teachers.
        module: Index of one LoRA module; None for all LoRA parameters together.
        logits: Take gradients on the logits instead.
        teachers: How many teachers there are, where no node says so.

    Examples:
        >>> gather([]).gain.shape
        (0, 0)
    """
    size = max((len(node.tokens) for node in nodes), default=1)
    teachers = len(nodes[0].teacher_tail) if nodes else teachers
    count = len(nodes)
    labels = {name: i for i, name in enumerate(dict.fromkeys(node.question for node in nodes))}
    form, gain = np.zeros((count, size, size)), np.zeros((count, teachers, size))
    norms = np.zeros((count, teachers))
    columns = {name: np.zeros((count, size)) for name in ("total", "total_square")}
    counts, exact, real = np.ones((count, size)), np.ones((count, size), bool), np.zeros((count, size), bool)
    certain = np.zeros(count, bool)
    for n, node in enumerate(nodes):
        arms = len(node.tokens)
        gram = node.logit_gram if logits else node.gram.sum(axis=0) if module is None else node.gram[module]
        # From the branches' directions to their successes: the first is the reference.
        lift = np.concatenate([-node.weight[1:, None], np.diag(node.weight[1:])], axis=1)
        form[n, :arms, :arms] = lift.T @ gram[: arms - 1, : arms - 1] @ lift
        norms[n] = np.sqrt(np.diagonal(gram)[arms - 1 :].clip(min=0))
        inner = (lift.T @ gram[: arms - 1, arms - 1 :]).T
        nothing = np.where(norms[n] == 0, 0.0, np.nan)[:, None] * np.ones(arms)
        gain[n, :, :arms] = np.divide(inner, norms[n][:, None], out=nothing, where=norms[n][:, None] > 0)
        columns["total"][n, :arms], columns["total_square"][n, :arms] = node.total, node.total_square
        counts[n, :arms], exact[n, :arms], real[n, :arms] = node.count, node.exact, True
        # A tail holds more than the tokens that were drawn from it.
        seen = np.isclose(node.weight[node.tail].sum(), node.probability[node.tail].sum(), rtol=1e-9, atol=0)
        certain[n] = bool(seen) and (arms == 1 or bool(node.exact.all()))
    _smooth(nodes, counts, columns, exact)
    return Evidence(
        question=np.array([labels[node.question] for node in nodes], dtype=np.int64),
        token_weight=np.array([1 / node.inclusion for node in nodes]),
        correct=np.array([node.correct for node in nodes], dtype=bool),
        depth=np.array([node.depth for node in nodes], dtype=np.int64),
        norm_form=form,
        gain_form=gain,
        teacher_norm=norms,
        real=real,
        count=counts,
        exact=exact,
        certain=certain,
        **columns,
    )


def _smooth(nodes: Sequence[NodeRecord], count: Floats, columns: dict[str, Floats], exact: NDArray[np.bool_]) -> None:
    """Let the next token's node say what it knows of the branch that leads there.

    The success of the token that a rollout took is that of the node behind it, whose branches were measured one by
    one. Both are unbiased; how they are weighted depends on their numbers of continuations alone, so the sum is too.
    """
    place = {(node.rollout, node.depth): n for n, node in enumerate(nodes)}
    added = []
    for n, node in enumerate(nodes):
        after = place.get((node.rollout, node.depth + 1))
        if after is None or exact[n, node.taken] or node.weight[0] == 0:  # 0: the free mode
            continue
        weight = nodes[after].weight
        size = len(weight)
        open_ = ~exact[after, :size]
        noise = float((weight[open_] ** 2 / count[after, :size][open_]).sum())
        # Known for certain, it counts as very many.
        worth = min(1 / noise, MOST) if noise > 0 else MOST
        value = weight @ (columns["total"][after, :size] / count[after, :size]) / weight.sum()
        added.append((n, node.taken, worth, worth * value))
    # All at once: no node passes on what it was told.
    for n, a, worth, total in added:
        count[n, a] += worth
        columns["total"][n, a] += total
        columns["total_square"][n, a] += total
