"""Classes of nodes that are summarised together: by correctness, depth, question or rollout."""

from collections.abc import Iterator
from typing import Any

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
        for window, chosen in depth_windows(evidence.depth):
            yield f"depth {window}", chosen
    elif by in ("question", "rollout"):
        labels = np.array([str(getattr(node, by)) for node in report.nodes])
        for label in dict.fromkeys(labels.tolist()):
            yield f"{by} {label}", labels == label
    else:
        raise ValueError(
            f"`by` must be 'correctness', 'depth', 'module', 'question' or 'rollout', but {by!r} was given."
        )


def depth_windows(depth: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield the name of each window of depth that has tokens, 0, 1, 2-3, 4-7 and so on, and the mask of its tokens.

    Args:
        depth: ``(N,)``, depth of each token.

    Examples:
        >>> [window for window, _ in depth_windows(np.array([0, 1, 2, 9]))]
        ['0', '1', '2-3', '8-15']
    """
    window_exponents = np.frexp(depth.astype(float))[1]  # of [0, 1), [1, 2), [2, 4), [4, 8), ...
    for exponent in np.unique(window_exponents):
        first_depth, last_depth = int(2.0 ** (exponent - 1)), int(2.0**exponent) - 1
        window = f"{first_depth}" if first_depth == last_depth else f"{first_depth}-{last_depth}"
        yield window, window_exponents == exponent


def _by_correctness(report: ProbeReport, evidence: Evidence) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield "all", np.ones(len(evidence.correct), bool)
    yield "correct", evidence.correct
    yield "incorrect", ~evidence.correct
