"""What a measurement by the paper's protocol leaves behind; every figure is computed from it, without a model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from odp_callbacks.analysis.paper.prefix_tree import Integers, PrefixTree
from odp_callbacks.records import Floats

PREDICTORS = ("kl", "js", "l2", "policy_cosine")
"""Figures of the two policies at a node, over the whole vocabulary. ``kl`` is KL(student‖teacher), which the paper
calls "forward KL" and everybody else reverse KL; ``l2`` is the Euclidean distance of the probabilities."""


@dataclass(frozen=True)
class PathRecord:
    """One representative path of ``T`` tokens, with ``K`` teachers and ``C`` tokens that were visited at its nodes.

    Attributes:
        text: Its text.
        correct: Whether it ended in success.
        enriched: Depths of the nodes that were enriched because they rank high on this path.
        predictors: For each of :data:`PREDICTORS`, ``(K, T)``.
        depth: ``(C,)``, depth of the node of each visited token, as in
            :class:`~odp_callbacks.analysis.paper.prefix_tree.Children`.
        token: ``(C,)``.
        student: ``(C,)``, the student's log-probability of each visited token, in nats.
        teachers: ``(K, C)``, that of each teacher; -inf for a token beyond its vocabulary.
    """

    text: str
    correct: bool
    enriched: tuple[int, ...]
    predictors: Mapping[str, Floats]
    depth: Integers
    token: Integers
    student: Floats
    teachers: Floats


@dataclass(frozen=True)
class QuestionRecord:
    """One question.

    Attributes:
        id: Identifies the question.
        prompt: Text of the student's prompt.
        pass_rate: Share of the rollouts that were correct.
        tree: All responses; its paths are those of ``paths``.
        paths: ``P`` representative paths.
    """

    id: str
    prompt: str
    pass_rate: float
    tree: PrefixTree
    paths: tuple[PathRecord, ...]


@dataclass(frozen=True)
class PaperRecord:
    """A measurement by the protocol of arXiv:2605.10889.

    Attributes:
        teachers: Names of the ``K`` teachers, which share one tree.
        questions: The questions that were measured.
        settings: The options of the measurement.
        deviations: The options that differ from the paper's, as sentences.
        unpublished: What the paper does not publish, and what was done, as sentences.
        left_out: Number of questions, by the reason for which they were left out.
        generated_tokens: Number of sampled tokens of the ``rollouts`` and of the ``targeted`` rollouts.
        targeted_rollouts: Number of targeted rollouts that were sampled.
        stage_seconds: Time that each stage took.
    """

    teachers: tuple[str, ...]
    questions: tuple[QuestionRecord, ...]
    settings: Mapping[str, Any]
    deviations: tuple[str, ...] = ()
    unpublished: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    generated_tokens: Mapping[str, int] = field(default_factory=dict)
    targeted_rollouts: int = 0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


def merge_paper_records(parts: Sequence[PaperRecord]) -> PaperRecord:
    """Merge the parts of one measurement, whose questions several processes measured at the same time.

    Args:
        parts: At least one record, in the order of the questions; all with the same teachers and options.

    Returns:
        The record of all questions. A stage takes as long as in the slowest process.
    """
    first = parts[0]
    stages = {stage: None for part in parts for stage in part.stage_seconds}
    slowest = {stage: max(part.stage_seconds.get(stage, 0.0) for part in parts) for stage in stages}
    return replace(
        first,
        questions=tuple(question for part in parts for question in part.questions),
        left_out=_summed(part.left_out for part in parts),
        generated_tokens=_summed(part.generated_tokens for part in parts),
        targeted_rollouts=sum(part.targeted_rollouts for part in parts),
        stage_seconds=first.stage_seconds if len(parts) == 1 else slowest,
    )


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts by their names."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)
