"""Evidence from whole updates: the Gram matrices of the last probes, which need rollouts alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.analysis.update_gain import update_gain
from odp_callbacks.gates.class_evidence import ALL_DEPTHS, ClassEvidence, TokenClass
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.update_records import CLASSES, UpdateGram


@dataclass(frozen=True)
class MeasuredUpdate:
    """What is kept of one measurement of an update.

    Attributes:
        gram: Inner products of its success gradients and distillation gradients.
        questions: For each of the ``F`` groups, the names of its questions; empty if they are not known.
    """

    gram: UpdateGram
    questions: tuple[tuple[str, ...], ...]


class UpdateEvidence(ClassEvidence):
    """What the updates of the last probes say of the correct and of the incorrect rollouts.

    The figure is the update gain of a class: what a step along the distillation gradient of this class's rollouts
    adds to the success of other questions. It is known for all depths together. The influences of tokens would divide
    it by depth, but they are measured along the success gradients of four parts of the questions only. An interval
    that rests on four parts is too wide to decide a single window.

    Of each probe it keeps the Gram matrices, ``groups² · teachers · (teachers + 6)`` numbers: some forty kilobytes for
    16 questions and two teachers.

    Args:
        probes: How many of the last probes count.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    figure = "update_gain"

    def __init__(self, probes: int = 4, confidence: float = 0.95) -> None:
        super().__init__(probes, (0,), confidence)

    def _read(self, report: ProbeReport) -> list[MeasuredUpdate]:
        if not report.updates:
            raise ValueError(
                "`report` has no update (`update=False`), but the gate's figure 'update_gain' is computed from it; "
                "measure with `update=True`, or use `figure='predicted_gain'`."
            )
        return list(_measured_updates(report))

    @property
    def _measured(self) -> list[MeasuredUpdate]:
        return [measured for probe in self._probes for measured in probe]

    def classes(self) -> list[TokenClass]:
        """Return the classes that occurred in any of the probes: incorrect and correct rollouts, of all depths."""
        tokens = sum((measured.gram.tokens.sum(axis=0) for measured in self._measured), np.zeros(len(CLASSES)))
        return [
            (correct, ALL_DEPTHS)
            for correct in (False, True)
            if tokens[CLASSES.index("correct" if correct else "incorrect")] > 0
        ]

    def estimator(self, token_class: TokenClass, teacher: str) -> Estimator:
        """Return the estimator of a class's update gain.

        A question that came in several probes is left out of all of them at once, so that it counts as one question.
        """
        classes = [float((name == "correct") == token_class[0]) for name in CLASSES]
        grams = [measured.gram for measured in self._measured]
        by_group = update_gain(grams, self.teachers.index(teacher), classes)
        cluster_of_group = _clusters(self._measured)

        def statistic(weights: Floats) -> Floats:
            return by_group.statistic(weights[..., cluster_of_group])

        has_gradient = [np.diag(gram.success) > 0 for gram in grams]
        has_rollouts = [gram.tokens @ classes > 0 for gram in grams]
        return replace(
            by_group,
            statistic=statistic,
            questions=np.ones(len(np.unique(cluster_of_group)), bool),
            # As in a single probe: the fewer of those with a success gradient and those with rollouts of the class.
            informative=min(
                len(np.unique(cluster_of_group[np.concatenate(marks)])) for marks in (has_gradient, has_rollouts)
            ),
        )

    def _to_plain(self, measured: list[MeasuredUpdate]) -> list[Any]:
        return [
            {
                "gram": {name: values.tolist() for name, values in vars(one.gram).items() if values is not None},
                "questions": [list(names) for names in one.questions],
            }
            for one in measured
        ]

    def _from_plain(self, plain: list[Any]) -> list[MeasuredUpdate]:
        return [
            MeasuredUpdate(
                UpdateGram(**{name: np.array(values, float) for name, values in one["gram"].items()}, modules=None),
                tuple(tuple(names) for names in one["questions"]),
            )
            for one in plain
        ]


def _measured_updates(report: ProbeReport) -> Iterator[MeasuredUpdate]:
    """The measurements of a report, each with the questions of its groups.

    A measurement has its questions in the order of the report's rollouts, and shares them out to its groups in that
    order.
    """
    names = list(dict.fromkeys(rollout.question for rollout in report.rollouts))
    counts = [update.gram.questions.astype(int) for update in report.updates]
    # Rows with the same id are several questions in one measurement; then it is not known which is which.
    known = sum(int(count.sum()) for count in counts) == len(names)
    first = 0
    for update, count in zip(report.updates, counts, strict=True):
        edges = first + np.concatenate([[0], np.cumsum(count)])
        groups = tuple(tuple(names[low:high]) for low, high in pairwise(edges))
        # The products by module would make checkpoints larger, and no gate looks at them.
        yield MeasuredUpdate(replace(update.gram, modules=None), groups if known else ())
        first = int(edges[-1])


def _clusters(measured: list[MeasuredUpdate]) -> NDArray[np.int64]:
    """The cluster of each group of all measurements: groups that share a question are in the same one."""
    parent: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    group_of_question: dict[str, int] = {}
    for one in measured:
        for group in range(one.gram.groups):
            parent.append(len(parent))
            for name in one.questions[group] if one.questions else ():
                earlier = group_of_question.setdefault(name, len(parent) - 1)
                parent[root(len(parent) - 1)] = root(earlier)
    roots = [root(index) for index in range(len(parent))]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)
