"""What a probe leaves behind: per node all that its figures are computed from, and nothing that needs a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RolloutRecord:
    """A rollout as a reader needs it.

    Attributes:
        question: Id of the question.
        prompt: What the student was shown, decoded.
        pieces: Text of each response token.
        text: The response as the verifier saw it.
        reward: In [0, 1].
        correct: Whether the reward reached the success threshold.
        truncated: Whether the length limit cut it.
    """

    question: str
    prompt: str
    pieces: tuple[str, ...]
    text: str
    reward: float
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class NodeRecord:
    """A node: ``A`` branches, ``K`` teachers, ``M`` LoRA modules, ``C = A - 1 + K`` directions.

    The ideal gradient is ``sum_a weight_a (Q_a - Q_0) u_a`` over the branches ``a = 1 .. A - 1``, where ``u_a`` is the
    direction ``(e_token - p) / temperature``. The Gram matrices are those of ``u_1 .. u_{A-1}`` and then of each
    teacher's distillation gradient.

    Attributes:
        rollout: Index of the rollout in its probe.
        question: Id of the question.
        depth: Response tokens before the node.
        inclusion: Probability that the node was selected.
        correct: Whether its rollout was correct.
        tokens: ``(A,)`` int64; the first is the student's most probable.
        probability: ``(A,)``, the student's.
        weight: ``(A,)``, see :class:`~odp_callbacks.engine.tree.branches.Branch`.
        tail: ``(A,)`` bool: drawn from the tail.
        taken: Which branch the rollout took.
        count: ``(A,)`` int64, continuations scored.
        total: ``(A,)``, sum of their rewards.
        total_square: ``(A,)``, sum of their squares.
        exact: ``(A,)`` bool: the branch ends the response, and its success is known.
        gram: ``(M, C, C)`` float64, on each module's LoRA parameters.
        logit_gram: ``(C, C)``, on the logits.
        teacher_probability: ``(K, A)``.
        teacher_tail: ``(K,)``: each teacher's mass outside the candidates.
        predictors: ``(K,)`` each: divergences, cosine, entropies (nats).
    """

    rollout: int
    question: str
    depth: int
    inclusion: float
    correct: bool
    tokens: NDArray[np.int64]
    probability: Floats
    weight: Floats
    tail: NDArray[np.bool_]
    taken: int
    count: NDArray[np.int64]
    total: Floats
    total_square: Floats
    exact: NDArray[np.bool_]
    gram: Floats
    logit_gram: Floats
    teacher_probability: Floats
    teacher_tail: Floats
    predictors: Mapping[str, Floats]


@dataclass(frozen=True)
class StepSums:
    """Summed gradients, as inner products: what the step alignment is computed from.

    One group for each question and correctness. Its ``2 + K`` vectors are the ideal gradient from two disjoint halves
    of the continuations, and each teacher's distillation gradient, summed over the group's nodes with their token
    weights.

    Attributes:
        question: ``(G,)`` ids.
        correct: ``(G,)``.
        gram: ``(G, 2 + K, G, 2 + K)`` float64, on all LoRA parameters.
        vectors: ``(G, 2 + K, L)`` float32, the sums themselves or sketches of them, so that the parts of a probe can be
            put together; no file keeps them.
    """

    question: tuple[str, ...]
    correct: tuple[bool, ...]
    gram: Floats
    vectors: NDArray[np.float32] | None = field(default=None, repr=False)


def step_sums(question: tuple[str, ...], correct: tuple[bool, ...], vectors: NDArray[np.float32]) -> StepSums:
    """Summed gradients ``(G, 2 + K, L)`` with their inner products."""
    rows = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    return StepSums(question, correct, (rows @ rows.T).reshape(*vectors.shape[:2], *vectors.shape[:2]), vectors)


@dataclass(frozen=True)
class ProbeReport:
    """All that one probe measured.

    Attributes:
        teachers: Names, in the order of every ``K`` axis.
        modules: LoRA modules, in the order of every ``M`` axis.
        rollouts: One record for each rollout.
        nodes: One record for each node.
        generated_tokens: By stage: ``rollouts``, ``continuations``.
        continuations: How many were sampled.
        truncated: How many of the rollouts and continuations the length limit cut.
        seconds: By stage.
        settings: The probe's configuration, for the reader.
        step: Of the summed gradients; None where they were not measured.
        free: No continuations were spent: each node's success is its rollout's own reward against its siblings', so
            only predicted gain exists, and not split by correctness.
        token_text: Text of every token that is a branch somewhere, by its id.
        preconditioned: The same nodes and continuations with gradients measured in another geometry
            (:class:`~odp_callbacks.engine.gradients.preconditioner.Preconditioner`), named in its settings; None where none was asked for.
    """

    teachers: tuple[str, ...]
    modules: tuple[str, ...]
    rollouts: tuple[RolloutRecord, ...]
    nodes: tuple[NodeRecord, ...]
    generated_tokens: Mapping[str, int]
    continuations: int
    truncated: int
    seconds: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: StepSums | None = None
    free: bool = False
    token_text: Mapping[int, str] = field(default_factory=dict)
    preconditioned: "ProbeReport | None" = None
