"""Success along depth: how likely the student still succeeds from a place in its own responses on."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from odp_callbacks.analysis.classes import depth_windows, node_classes
from odp_callbacks.analysis.estimators import token_mean
from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.jackknife import Estimate, jackknife
from odp_callbacks.analysis.node_estimates import student_success
from odp_callbacks.records import ProbeReport


def success_by_depth(report: ProbeReport, confidence: float = 0.95) -> Iterator[tuple[str, str, Estimate]]:
    """Yield the student's mean success at the nodes of each class and window of depth.

    The success ``V(u)`` of a node is measured by continuations from there. Where it falls to 0 along incorrect
    responses, their later tokens can no longer be saved: arXiv:2606.08432 calls this prefix failure.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1); they are clustered by question.

    Yields:
        The class, ``"all"``, ``"correct"`` or ``"incorrect"``; the window, such as ``"4-7"``; and the mean over tokens.

    Examples:
        >>> list(success_by_depth(ProbeReport(("base",), (), (), (), {}, 0, 0, {})))
        []
    """
    evidence = gather(report.nodes, teachers=len(report.teachers))
    success = np.array([student_success(node) for node in report.nodes])
    for split, of_class in node_classes(report, evidence, "correctness"):
        for window, in_window in depth_windows(evidence.depth):
            if (chosen := of_class & in_window).any():
                mean = replace(token_mean(evidence, success, chosen), bounds=(0.0, 1.0))
                yield split, window, jackknife(mean, confidence)
