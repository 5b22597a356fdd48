"""The scores of all nodes of a record, as a table of columns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.paper.node_score import (
    gkd_gradient,
    ideal_gradient,
    logit_cosine,
    renormalised,
    teacher_advantage,
)
from odp_callbacks.analysis.paper.prefix_tree import Ancestors, Children, Integers, OwnPath
from odp_callbacks.analysis.paper.records import PREDICTORS, PaperRecord, PathRecord
from odp_callbacks.records import Floats

MINIMUM_CHILDREN = 2
SuccessRates = Callable[[int, int, Children], Floats]
"""From the index of a question, that of one of its paths and the tokens visited there to their success rates."""


@dataclass(frozen=True)
class ScoredNodes:
    """The scored nodes of a record: ``N`` nodes of paths, ``K`` teachers.

    A node that lies on two paths counts on each of them.

    Attributes:
        teachers: Names of the teachers.
        question: ``(N,)``, index of the question in the record.
        path: ``(N,)``, a number for each path of the record.
        correct: ``(N,)``, whether the path was correct.
        pass_rate: ``(N,)``, pass rate of the question.
        depth: ``(N,)``.
        children: ``(N,)``, number of tokens in S_u.
        success_range: ``(N,)``, largest minus smallest success rate in S_u.
        cosine: ``(N, K)``, the paper's score; NaN where the teacher agrees with the student on S_u.
        advantage: ``(N, K)``, the paper's teacher advantage.
        predictors: By name, ``(N, K)`` each, over the whole vocabulary.
    """

    teachers: tuple[str, ...]
    question: Integers
    path: Integers
    correct: NDArray[np.bool_]
    pass_rate: Floats
    depth: Integers
    children: Integers
    success_range: Floats
    cosine: Floats
    advantage: Floats
    predictors: Mapping[str, Floats]

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.depth)

    def select(self, chosen: NDArray[Any]) -> "ScoredNodes":
        """The chosen nodes.

        Args:
            chosen: ``(N,)`` bool, or indices.
        """
        columns = {
            f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name not in ("teachers", "predictors")
        }
        return replace(self, **columns, predictors={name: column[chosen] for name, column in self.predictors.items()})


def score_nodes(
    record: PaperRecord,
    *,
    minimum_visits: int | None = None,
    own_path: OwnPath | None = None,
    ancestors: Ancestors | None = None,
    renormalise: bool | None = None,
    success_rates: SuccessRates | None = None,
) -> ScoredNodes:
    """Score every node of the record's paths that has enough visited tokens and a success-rate range above 0.

    Args:
        record: A measurement.
        minimum_visits: Visits that a token needs to belong to S_u; the paper's is 20, or 40 on AIME. None for the
            record's own setting, here and below.
        own_path: Whether the path's own rollout is among its visits, see
            :meth:`~odp_callbacks.analysis.paper.prefix_tree.PrefixTree.children`.
        ancestors: Whether targeted rollouts count at nodes before their forced token, see there.
        renormalise: Whether the student's probabilities are renormalised over S_u before the gradients are taken.
        success_rates: Other success rates of the tokens, ``(C,)`` for each path, such as the true ones of an
            enumerated world. None for successes over visits.

    Raises:
        ValueError: If an option is unknown.
    """
    settings = record.settings
    minimum_visits = settings["minimum_visits"] if minimum_visits is None else minimum_visits
    own_path = settings["own_path"] if own_path is None else own_path
    ancestors = settings["ancestors"] if ancestors is None else ancestors
    renormalise = settings["renormalise"] if renormalise is None else renormalise
    rows: list[dict[str, Any]] = []
    path_number = 0
    for question_index, question in enumerate(record.questions):
        for place, path in enumerate(question.paths):
            children = question.tree.children(place, own_path, ancestors)
            frequent = children.visits >= minimum_visits
            all_rates = (
                children.successes / children.visits
                if success_rates is None
                else success_rates(question_index, place, children)
            )
            depths, rates = children.depth[frequent], all_rates[frequent]
            columns = _columns(path, depths, children.token[frequent])
            first_of_depth = np.flatnonzero(np.diff(depths, prepend=-1))
            for chosen in np.split(np.arange(len(depths)), first_of_depth[1:]):
                if len(chosen) < MINIMUM_CHILDREN or np.ptp(rates[chosen]) == 0:
                    continue
                places = columns[chosen]
                rows.append(
                    {
                        **_score(path.student[places], path.teachers[:, places], rates[chosen], renormalise),
                        "question": question_index,
                        "path": path_number,
                        "correct": path.correct,
                        "pass_rate": question.pass_rate,
                        "depth": depths[chosen[0]],
                        **{name: path.predictors[name][:, depths[chosen[0]]] for name in PREDICTORS},
                    }
                )
            path_number += 1
    return _table(record.teachers, rows)


def _columns(path: PathRecord, depths: Integers, tokens: Integers) -> Integers:
    """The places of visited tokens among those whose probabilities the record holds."""
    index_of = {pair: place for place, pair in enumerate(zip(path.depth.tolist(), path.token.tolist(), strict=True))}
    return np.array([index_of[pair] for pair in zip(depths.tolist(), tokens.tolist(), strict=True)], dtype=np.int64)


def _score(student: Floats, teachers: Floats, success: Floats, renormalise: bool) -> dict[str, Any]:
    """The figures of one node, from log-probabilities ``(A,)`` and ``(K, A)`` and success rates ``(A,)``."""
    policy, log_ratio = np.exp(renormalised(student) if renormalise else student), student - teachers
    ideal = ideal_gradient(policy, success)
    # A teacher that excludes a token (-inf) has no finite gradient, and no cosine.
    defined = np.asarray(np.isfinite(log_ratio).all(axis=-1))
    distillation = gkd_gradient(policy, np.where(defined[:, None], log_ratio, 0.0))
    advantage = teacher_advantage(np.exp(renormalised(student)), np.exp(renormalised(teachers)), success)
    return {
        "children": len(success),
        "success_range": np.ptp(success),
        "cosine": logit_cosine(ideal, distillation),
        "advantage": advantage,
    }


def _table(teachers: tuple[str, ...], rows: list[dict[str, Any]]) -> ScoredNodes:
    """The columns of rows."""

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array([row[name] for row in rows], dtype=dtype)

    def of_teachers(name: str) -> Floats:
        return column(name, float).reshape(len(rows), len(teachers))

    return ScoredNodes(
        teachers,
        question=column("question", np.int64),
        path=column("path", np.int64),
        correct=column("correct", bool),
        pass_rate=column("pass_rate", float),
        depth=column("depth", np.int64),
        children=column("children", np.int64),
        success_range=column("success_range", float),
        cosine=of_teachers("cosine"),
        advantage=of_teachers("advantage"),
        predictors={name: of_teachers(name) for name in PREDICTORS},
    )
