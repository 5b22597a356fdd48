"""Classes of tokens (teacher, correct or incorrect, depth window), and what the last probes measured of each class."""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.jackknife import Estimate, Estimator, check_confidence, jackknife
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.gates.tokens import Tokens
from odp_callbacks.records import Floats, ProbeReport

WINDOWS = (0, *(2**exponent for exponent in range(31)))
"""First depths of the windows [0, 1), [1, 2), [2, 4), [4, 8), ... of the method."""
ALL_DEPTHS = -1
"""Takes the place of a window's index in the class of all depths."""
FIGURES = ("predicted_gain", "gain_weighted_alignment")
"""The figures that are known for each class."""

TokenClass: TypeAlias = tuple[bool, int]
"""Whether the rollout is correct, and the index of the depth window or :data:`ALL_DEPTHS`."""


def class_name(token_class: TokenClass, windows: Sequence[int] = WINDOWS) -> str:
    """Return the name of a class in logs and tables.

    Examples:
        >>> class_name((False, 3)), class_name((True, ALL_DEPTHS))
        ('incorrect depth 4-7', 'correct')
    """
    correct, window_index = token_class
    side = "correct" if correct else "incorrect"
    if window_index == ALL_DEPTHS:
        return side
    first_depth = windows[window_index]
    if window_index + 1 == len(windows):
        return f"{side} depth {first_depth}+"
    last_depth = windows[window_index + 1] - 1
    return f"{side} depth {first_depth}" + (f"-{last_depth}" if last_depth > first_depth else "")


def window_indices(depth: Tensor, windows: Sequence[int]) -> Tensor:
    """Return the index ``(N,)``, int64, of the window that contains each depth ``(N,)``."""
    first_depths = torch.tensor(windows, device=depth.device)
    return torch.bucketize(depth, first_depths, right=True) - 1


def check_windows(windows: Sequence[int]) -> tuple[int, ...]:
    """Return the windows' first depths as a tuple.

    Raises:
        ValueError: Unless they increase from 0.
    """
    first_depths = tuple(windows)
    if not first_depths or first_depths[0] != 0 or any(after <= before for before, after in pairwise(first_depths)):
        raise ValueError(f"`windows` must be depths that rise from 0, such as (0, 8, 32), but {windows!r} was given.")
    return first_depths


def masks_by_class(tokens: Tokens, windows: Sequence[int]) -> list[tuple[Tensor, TokenClass]]:
    """Return the mask ``(N,)`` of each class that occurs among the tokens, with the class.

    Raises:
        ValueError: If it is not known which tokens belong to correct rollouts.
    """
    correct, window_index = tokens.need("correct"), window_indices(tokens.depth, windows)
    return [
        ((correct == side) & (window_index == index), (side, int(index)))
        for side in (False, True)
        for index in window_index[correct == side].unique().tolist()
    ]


class ClassEvidence:
    """What the last probes measured of each class: sums by question, from which figures and intervals are computed.

    Of each probe it keeps, by class, question and teacher, the sums of the token weights and of their products with
    the predicted gain and with the noise-corrected norm of the ideal gradient; a few kilobytes in a checkpoint.

    Args:
        probes: How many of the last probes count. The student changes, and so does what helps it.
        windows: First depths of the depth windows.
        confidence: Level of the intervals, in (0, 1).

    Attributes:
        teachers: Names of the teachers that the probes measure; empty before the first probe.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, probes: int = 4, windows: Sequence[int] = WINDOWS, confidence: float = 0.95) -> None:
        if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
            raise ValueError(f"`probes` must be a positive integer, but {probes!r} was given.")
        self.confidence = check_confidence(confidence)
        self.windows = check_windows(windows)
        self.teachers: tuple[str, ...] = ()
        # One item for each probe: class -> question -> (K, 4) sums of the token weight, of weight times gain, of weight
        # times ideal norm, and of the weight of the nodes at which success was seen to differ.
        self._sums_of_probes: deque[dict[TokenClass, dict[str, Floats]]] = deque(maxlen=probes)

    def add(self, report: ProbeReport) -> None:
        """Add a probe; one without continuations is ignored, because it says nothing about a class.

        Raises:
            ValueError: If the probe measured other teachers than those before.
        """
        if not report.nodes:
            return
        if self.teachers and report.teachers != self.teachers:
            raise ValueError(
                f"`report` measures the teachers {report.teachers}, but the probes before measured {self.teachers}; "
                "use a new gate."
            )
        self.teachers = report.teachers
        self._sums_of_probes.append(_sums_by_class(report, self.windows))

    def classes(self) -> list[TokenClass]:
        """Return the classes that occurred in any of the probes, those of all depths first."""
        classes = {token_class for sums in self._sums_of_probes for token_class in sums}
        return sorted(classes, key=lambda token_class: (token_class[1], token_class[0]))

    def estimator(self, token_class: TokenClass, teacher: str, figure: str) -> Estimator:
        """Return the estimator of a class's figure; a question that came in several probes counts as one question."""
        teacher_index = self.teachers.index(teacher)
        sums_by_question: dict[str, Floats] = {}
        for probe_sums in self._sums_of_probes:
            for question, sums in probe_sums.get(token_class, {}).items():
                sums_by_question[question] = sums_by_question.get(question, 0) + sums[teacher_index]
        question_sums = np.array(list(sums_by_question.values())).reshape(-1, 4)
        denominator = question_sums[:, 2 if figure == "gain_weighted_alignment" else 0]

        def ratio(question_weights: Floats) -> Floats:
            value: Floats = (question_weights @ question_sums[:, 1]) / (question_weights @ denominator)
            return value

        # If success never differed, a gain of 0 with an interval of width 0 would not be a finding.
        informative = (question_sums[:, 3] > 0).any() or not len(question_sums)
        return Estimator(
            ratio,
            denominator > 0,
            len(question_sums),
            withheld="" if informative else "no difference",
            bounds=(-1.0, 1.0) if figure == "gain_weighted_alignment" else None,
        )

    def estimate(self, token_class: TokenClass, teacher: str, figure: str = "predicted_gain") -> Estimate:
        """Return a class's figure with its interval.

        Args:
            token_class: The class.
            teacher: Name of the teacher.
            figure: ``"predicted_gain"`` or ``"gain_weighted_alignment"``.
        """
        return jackknife(self.estimator(token_class, teacher, figure), self.confidence)

    def difference(self, token_class: TokenClass, first: str, second: str, figure: str = "predicted_gain") -> Estimate:
        """Return how much more the first teacher helps in a class than the second, on the same nodes."""
        first_estimator = self.estimator(token_class, first, figure)
        return jackknife(first_estimator - self.estimator(token_class, second, figure), self.confidence)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python."""
        return {
            "teachers": list(self.teachers),
            "probes": [
                [
                    (*token_class, {question: sums.tolist() for question, sums in by_question.items()})
                    for token_class, by_question in probe_sums.items()
                ]
                for probe_sums in self._sums_of_probes
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        self.teachers = tuple(state["teachers"])
        self._sums_of_probes.clear()
        for probe_sums in state["probes"]:
            self._sums_of_probes.append(
                {
                    (correct, window_index): {question: np.array(sums) for question, sums in by_question.items()}
                    for correct, window_index, by_question in probe_sums
                }
            )


def _sums_by_class(report: ProbeReport, windows: Sequence[int]) -> dict[TokenClass, dict[str, Floats]]:
    """The sums ``(K, 4)`` of a probe, by class and question."""
    evidence = gather(report.nodes, teachers=len(report.teachers))
    weight = evidence.token_weight[:, None] * np.isfinite(evidence.gain)
    ideal_norm, differs = correct_for_noise(evidence).norm[:, None], (evidence.ideal_norm > 0)[:, None]
    columns = [weight, weight * np.nan_to_num(evidence.gain), weight * ideal_norm, weight * differs]
    node_terms = np.stack(columns, axis=-1)  # (N, K, 4)
    window_index = np.searchsorted(np.array(windows), evidence.depth, side="right") - 1
    sums_by_class: dict[TokenClass, dict[str, Floats]] = {}
    for node_index, node in enumerate(report.nodes):
        for index in (ALL_DEPTHS, int(window_index[node_index])):
            by_question = sums_by_class.setdefault((bool(node.correct), index), {})
            by_question[node.question] = by_question.get(node.question, 0) + node_terms[node_index]
    return sums_by_class
