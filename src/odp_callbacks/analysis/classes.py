"""Classes of nodes that are summarised together: by correctness, depth, question or rollout."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.records import ProbeReport


def node_classes(report: ProbeReport, evidence: Evidence, by: str) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield the name of each class and the mask ``(N,)`` of its nodes.

    Args:
        report: A probe's report.
        evidence: Of the report's nodes.
        by: ``"correctness"``, ``"depth"``, ``"question"`` or ``"rollout"``.

    Raises:
        ValueError: If ``by`` is none of these.
    """
    if by == "correctness":
        yield from _by_correctness(report, evidence)
    elif by == "depth":
        window_exponents = np.frexp(evidence.depth.astype(float))[1]  # of [0, 1), [1, 2), [2, 4), [4, 8), ...
        for exponent in np.unique(window_exponents):
            first_depth, last_depth = int(2.0 ** (exponent - 1)), int(2.0**exponent) - 1
            yield (
                (f"depth {first_depth}" if first_depth == last_depth else f"depth {first_depth}-{last_depth}"),
                window_exponents == exponent,
            )
    elif by in ("question", "rollout"):
        labels = np.array([str(getattr(node, by)) for node in report.nodes])
        for label in dict.fromkeys(labels.tolist()):
            yield f"{by} {label}", labels == label
    else:
        raise ValueError(
            f"`by` must be 'correctness', 'depth', 'module', 'question' or 'rollout', but {by!r} was given."
        )


def _by_correctness(report: ProbeReport, evidence: Evidence) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield "all", np.ones(len(evidence.correct), bool)
    # In the free mode a rollout's own reward is the only evidence. It also decided whether the rollout is correct, so
    # the figures of a class would follow from the split alone; both classes stay empty.
    usable = np.full(len(evidence.correct), not report.free)
    yield "correct", evidence.correct & usable
    yield "incorrect", ~evidence.correct & usable
