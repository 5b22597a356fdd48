"""Many nodes as arrays, from which every figure is computed for all nodes at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.records import Floats, NodeRecord

ROUNDING_ERROR = 16 * float(np.finfo(np.float64).eps)
"""Two means of the same rewards may differ by this much; a smaller difference in success counts as none."""
MAXIMUM_POOLED_CONTINUATIONS = 1e4
"""How many continuations a success counts as where pooling finds it known for certain."""


@dataclass(frozen=True)
class Evidence:
    r"""``N`` nodes with up to ``A`` branches and ``K`` teachers; branches that a node lacks have no weight.

    The ideal gradient is linear in the successes :math:`Q` of the branches, so its squared norm is :math:`Q^\top H Q`
    and its inner product with a teacher's unit direction is :math:`b^\top Q`. Both are 0 if all successes are equal.

    Gradients are computed at a sample of the nodes only. At the others, the forms are those of the gradients on the
    logits, which only tell teachers without a gradient from others. Sums over nodes of what needs gradients are sums
    over the sample with :attr:`gradient_weight`. Where all outcomes agree, the gain is 0 whatever the gradients are.

    Attributes:
        question: ``(N,)`` int64, a number for each question.
        token_weight: ``(N,)``, inverse inclusion probability.
        correct: ``(N,)`` bool, whether the node's rollout was correct.
        depth: ``(N,)`` int64, response tokens before the node.
        norm_form: ``(N, A, A)``, the quadratic form :math:`H`.
        gain_form: ``(N, K, A)``, the linear form :math:`b`; 0 where the teacher's gradient is 0, NaN where it is
            infinite.
        teacher_norm: ``(N, K)``, norm of the distillation gradient.
        real: ``(N, A)`` bool: the branch exists.
        count: ``(N, A)``, continuations scored; 1 where there is no branch.
        total: ``(N, A)``, sum of rewards.
        total_square: ``(N, A)``, sum of squared rewards.
        exact: ``(N, A)`` bool: success is known, because the branch ends the response.
        certain: ``(N,)`` bool: every possible token is a branch whose success is known.
        gradient_weight: ``(N,)``, inverse probability with which the gradients were computed; 0 where they were not,
            NaN where they could not be.
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
    gradient_weight: Floats

    @cached_property
    def success(self) -> Floats:
        """Mean reward of each branch, ``(N, A)``."""
        mean_reward: Floats = self.total / self.count
        return mean_reward

    @cached_property
    def gain(self) -> Floats:
        """Predicted gain of each node and teacher, ``(N, K)``; NaN where it needs gradients that were not computed."""
        gain: Floats = np.einsum("nka,na->nk", self.gain_form, self.offset)
        unknown = self._lacks_gradients[:, None] & (self.teacher_norm != 0)  # a zero gradient gains nothing
        return np.where(unknown, np.nan, gain)

    @cached_property
    def ideal_norm(self) -> Floats:
        """Norm of the estimated ideal gradient, ``(N,)``; noise in the successes makes it too large on average."""
        return np.where(self._lacks_gradients, np.nan, norm(self.norm_form, self.offset))

    @cached_property
    def weighted_gain(self) -> Floats:
        """Gains by which sums over all nodes are estimated, ``(N, K)``; 0 at nodes that others stand for."""
        # Nothing stands for a node whose gradients were wanted and failed.
        of_lacking = np.where(np.isnan(self.gradient_weight), np.nan, 0.0)[:, None]
        weighted: Floats = np.where(self._lacks_gradients[:, None], of_lacking, self.gain)
        return np.where(self.gradient_weight[:, None] > 0, weighted * self.gradient_weight[:, None], weighted)

    @cached_property
    def weighted_norm(self) -> Floats:
        """Norms of estimated ideal gradients by which sums over all nodes are estimated, ``(N,)``."""
        return np.where(self.gradient_weight > 0, self.ideal_norm, 0) * self.gradient_weight

    @property
    def differs(self) -> NDArray[np.bool_]:
        """Whether the branches of a node differ in their mean rewards, ``(N,)``."""
        return np.asarray((self.offset != 0).any(axis=1))

    @property
    def _lacks_gradients(self) -> NDArray[np.bool_]:
        """Whether outcomes differ at a node without gradients, ``(N,)``."""
        return np.asarray(~(self.gradient_weight > 0) & self.differs)

    @cached_property
    def cosine(self) -> Floats:
        """Alignment of each node and teacher without a correction for noise, ``(N, K)``; NaN if a gradient is zero."""
        nonzero = (self.ideal_norm[:, None] > 0) & (self.teacher_norm > 0)
        blank = np.full(nonzero.shape, np.nan)
        ratio: Floats = np.divide(self.gain, self.ideal_norm[:, None], out=blank, where=nonzero)
        return ratio.clip(-1, 1)  # only rounding can leave [-1, 1]: a Gram matrix keeps the Cauchy-Schwarz inequality

    @cached_property
    def variance(self) -> Floats:
        """Unbiased variance of each branch's mean, ``(N, A)``; 0 where it is known, NaN with one continuation."""
        count = self.count
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_variance = (self.total_square - self.total**2 / count).clip(min=0) / (count - 1) / count
        return np.where(self.exact | ~self.real, 0.0, np.where(count > 1, mean_variance, np.nan))

    @property
    def norm_square(self) -> Floats:
        r"""Unbiased estimate of the ideal gradient's squared norm, ``(N,)``; it may be negative.

        :math:`\hat Q^\top H \hat Q - \sum_a \hat v_a H_{aa}`; NaN where a branch has a single continuation, or the
        gradients were not computed.
        """
        plain_square: Floats = np.einsum("na,nab,nb->n", self.offset, self.norm_form, self.offset)
        diagonal = np.einsum("naa->na", self.norm_form)
        noise_square: Floats = np.where(diagonal > 0, self.variance * diagonal, 0).sum(axis=1)
        return np.where(self.gradient_weight > 0, plain_square - noise_square, np.nan)

    @cached_property
    def offset(self) -> Floats:
        """Success of each branch minus that of the first, ``(N, A)``; exactly 0 where they are equal."""
        difference = self.success - self.success[:, :1]
        return np.where(self.real & (np.abs(difference) > ROUNDING_ERROR), difference, 0)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Evidence":
        """Select nodes by a mask ``(N,)`` or by indices."""
        return Evidence(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


def norm(form: Floats, success: Floats) -> Floats:
    """Compute the norm of the ideal gradient.

    Args:
        form: ``(N, A, A)``, see :attr:`Evidence.norm_form`.
        success: ``(N, ..., A)``, of the branches.

    Returns:
        ``(N, ...)``.
    """
    square: Floats = np.einsum("n...a,nab,n...b->n...", success, form, success, optimize=True)
    length: Floats = np.sqrt(square.clip(min=0))  # rounding can make a quadratic form -1e-20 where it is zero
    return length


def gather(nodes: Sequence[NodeRecord], module: int | None = None, logits: bool = False, teachers: int = 0) -> Evidence:
    """Turn node records into arrays, as recorded (:func:`stack`), and then pool neighbours (:func:`pool_neighbours`).

    Args:
        nodes: ``N`` records with the same teachers.
        module: Index of one LoRA module; None for all LoRA parameters together.
        logits: Use the gradients on the logits instead of those on the parameters.
        teachers: Number of teachers, used only if ``nodes`` is empty.

    Examples:
        >>> gather([]).gain.shape
        (0, 0)
    """
    return pool_neighbours(stack(nodes, module, logits, teachers), nodes)


def stack(nodes: Sequence[NodeRecord], module: int | None = None, logits: bool = False, teachers: int = 0) -> Evidence:
    """Turn node records into arrays, with the continuations exactly as recorded.

    Args:
        nodes: ``N`` records with the same teachers.
        module: Index of one LoRA module; None for all LoRA parameters together.
        logits: Use the gradients on the logits instead of those on the parameters.
        teachers: Number of teachers, used only if ``nodes`` is empty.

    Examples:
        >>> stack([], teachers=2).gain.shape
        (0, 2)
    """
    teachers = len(nodes[0].teacher_tail) if nodes else teachers
    shape = len(nodes), max((len(node.tokens) for node in nodes), default=1)
    norm_form, gain_form = np.zeros((*shape, shape[1])), np.zeros((shape[0], teachers, shape[1]))
    teacher_norm = np.zeros((shape[0], teachers))
    count, total, total_square = np.ones(shape), np.zeros(shape), np.zeros(shape)
    exact, exists = np.ones(shape, bool), np.zeros(shape, bool)
    gradient_weight = np.ones(shape[0])
    for node_index, node in enumerate(nodes):
        branches = len(node.tokens)
        if logits or not node.has_gradients:
            gram = node.logit_gram
            failed = not logits and np.isnan(node.gradient_inclusion)
            gradient_weight[node_index] = np.nan if failed else float(logits)
        else:
            gram = node.gram.sum(axis=0) if module is None else node.gram[module]
            gradient_weight[node_index] = 1 / node.gradient_inclusion
        node_norm_form, node_gain_form, teacher_norm[node_index] = _forms_in_success(node, gram)
        norm_form[node_index, :branches, :branches] = node_norm_form
        gain_form[node_index, :, :branches] = node_gain_form
        count[node_index, :branches], exact[node_index, :branches] = node.count, node.exact
        total[node_index, :branches], total_square[node_index, :branches] = node.total, node.total_square
        exists[node_index, :branches] = True
    question_numbers = {name: number for number, name in enumerate(dict.fromkeys(node.question for node in nodes))}
    return Evidence(
        question=np.array([question_numbers[node.question] for node in nodes], dtype=np.int64),
        token_weight=np.array([1 / node.inclusion for node in nodes]),
        correct=np.array([node.correct for node in nodes], dtype=bool),
        depth=np.array([node.depth for node in nodes], dtype=np.int64),
        norm_form=norm_form,
        gain_form=gain_form,
        teacher_norm=teacher_norm,
        real=exists,
        count=count,
        total=total,
        total_square=total_square,
        exact=exact,
        certain=np.array([_is_certain(node) for node in nodes], dtype=bool),
        gradient_weight=gradient_weight,
    )


def pool_neighbours(evidence: Evidence, nodes: Sequence[NodeRecord]) -> Evidence:
    """Add what the next token's node measured to the branch that leads to it.

    Where a rollout has nodes at two consecutive tokens, the success of the token that it took at the first is the
    success of the second node, whose branches were measured one by one. That estimate is added to the branch as
    continuations. Both estimates are unbiased and their weights depend only on numbers of continuations, so the pooled
    one is unbiased too. Every node passes on its own continuations only, not what it received.

    Args:
        evidence: ``N`` nodes as :func:`stack` gives them.
        nodes: Their records.
    """
    index_of = {(node.rollout, node.depth): node_index for node_index, node in enumerate(nodes)}
    count, total, total_square = evidence.count.copy(), evidence.total.copy(), evidence.total_square.copy()
    for node_index, node in enumerate(nodes):
        next_index = index_of.get((node.rollout, node.depth + 1))
        if next_index is None or evidence.exact[node_index, node.taken]:
            continue
        next_success, next_variance = _success_of(
            nodes[next_index], evidence.count[next_index], evidence.total[next_index], evidence.exact[next_index]
        )
        # The number of continuations of this branch that would have had the same variance.
        equivalent_count = (
            min(1 / next_variance, MAXIMUM_POOLED_CONTINUATIONS) if next_variance > 0 else MAXIMUM_POOLED_CONTINUATIONS
        )
        count[node_index, node.taken] += equivalent_count
        total[node_index, node.taken] += equivalent_count * next_success
        total_square[node_index, node.taken] += equivalent_count * next_success
    return replace(evidence, count=count, total=total, total_square=total_square)


def _success_of(node: NodeRecord, count: Floats, total: Floats, exact: NDArray[np.bool_]) -> tuple[float, float]:
    """Unbiased estimate of the student's success at a node, and its variance in units of that of one reward.

    The variance depends on numbers of continuations only. Where the tail is drawn from with a probability below 1, it
    is the same whether that happened or not: a weight that depended on it would bias what is pooled with the estimate.
    """
    branches = len(node.weight)
    success = total[:branches] / count[:branches]
    tail_mass = max(0.0, 1 - float(node.probability[~node.tail].sum()))
    has_usual_weight = ~node.tail | np.isclose(node.weight[node.tail].sum(), tail_mass)
    sampled = has_usual_weight & ~exact[:branches]
    variance = float((node.weight[sampled] ** 2 / count[:branches][sampled]).sum())
    if not (node.tail & has_usual_weight).any():
        variance += tail_mass**2
    return float(success[0] + node.weight[1:] @ (success[1:] - success[0])), variance


def _forms_in_success(node: NodeRecord, gram: Floats) -> tuple[Floats, Floats, Floats]:
    """Norm form ``(A, A)``, gain form ``(K, A)`` and norms of the teachers' gradients ``(K,)`` of one node.

    Args:
        node: With ``A`` branches.
        gram: ``(C, C)``, of the branches' directions and then of the teachers' gradients.
    """
    branches = len(node.tokens)
    directions = branches - 1
    # The ideal gradient weights direction a by weight_a (Q_a - Q_0): (A - 1, A) maps successes to those weights.
    lift = np.concatenate([-node.weight[1:, None], np.diag(node.weight[1:])], axis=1)
    norm_form = lift.T @ gram[:directions, :directions] @ lift
    teacher_norm = np.sqrt(np.diagonal(gram)[directions:].clip(min=0))
    inner_product = (lift.T @ gram[:directions, directions:]).T
    # A zero gradient gains nothing; the gain along an infinite one is undefined.
    gain_form = np.where(teacher_norm == 0, 0.0, np.nan)[:, None] * np.ones(branches)
    np.divide(inner_product, teacher_norm[:, None], out=gain_form, where=teacher_norm[:, None] > 0)
    return norm_form, gain_form, teacher_norm


def _is_certain(node: NodeRecord) -> bool:
    """Whether every possible token is a branch whose success is known."""
    # A tail may hold more tokens than those drawn from it.
    tail_mass = 1 - node.probability[~node.tail].sum()
    tail_is_complete = np.isclose(node.probability[node.tail].sum(), tail_mass, rtol=1e-9, atol=1e-12)
    return bool(tail_is_complete) and (len(node.tokens) == 1 or bool(node.exact.all()))
