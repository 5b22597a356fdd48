"""Classes of tokens (teacher x correct or incorrect x depth window), and what the last probes measured of each."""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.jackknife import Estimate, Estimator, check_confidence, jackknife
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.gates.tokens import Tokens
from odp_callbacks.records import Floats, ProbeReport

WINDOWS = (0, *(2**i for i in range(31)))
"""First depths of the windows [0, 1), [1, 2), [2, 4), [4, 8), ... of the method."""
WHOLE = -1
"""In place of a window: the class of all depths."""
FIGURES = ("predicted_gain", "gain_weighted_alignment")

Class = tuple[bool, int]
"""Correct or not, and the window's number, or :data:`WHOLE`."""


def class_name(key: Class, windows: Sequence[int] = WINDOWS) -> str:
    """How a class is called in logs and tables.

    Examples:
        >>> class_name((False, 3)), class_name((True, WHOLE))
        ('incorrect depth 4-7', 'correct')
    """
    correct, window = key
    side = "correct" if correct else "incorrect"
    if window == WHOLE:
        return side
    first = windows[window]
    last = windows[window + 1] - 1 if window + 1 < len(windows) else None
    return f"{side} depth {first}+" if last is None else f"{side} depth {first}" + (f"-{last}" if last > first else "")


def window_of(depth: Tensor, windows: Sequence[int]) -> Tensor:
    """The window that each depth ``(N,)`` lies in, ``(N,)`` int64."""
    starts = torch.tensor(windows, device=depth.device)
    return torch.bucketize(depth, starts, right=True) - 1


def check_windows(windows: Sequence[int]) -> tuple[int, ...]:
    """The windows' first depths, as a tuple.

    Raises:
        ValueError: Unless they rise from 0.
    """
    starts = tuple(windows)
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        raise ValueError(f"`windows` must be depths that rise from 0, such as (0, 8, 32), but {windows!r} was given.")
    return starts


class ClassEvidence:
    """What the last probes measured of each class: sums by question, from which figures and intervals are taken.

    Nothing of a probe is kept but, for each class, question and teacher, the sums of token weights, of their products
    with the predicted gain, and with the ideal gradient's norm (corrected for noise); a few kilobytes in a checkpoint.

    Args:
        probes: How many of the last probes count: the student changes, and so does what helps it.
        windows: First depths of the depth windows.
        confidence: Level of the intervals.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, probes: int = 4, windows: Sequence[int] = WINDOWS, confidence: float = 0.95) -> None:
        if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
            raise ValueError(f"`probes` must be a positive integer, but {probes!r} was given.")
        self.confidence = check_confidence(confidence)
        self.windows = check_windows(windows)
        self.teachers: tuple[str, ...] = ()
        # Of each probe: class -> question -> (K, 4) sums of weight, weight x gain, weight x ideal norm, and of the
        # weight of nodes where success was seen to differ.
        self._kept: deque[dict[Class, dict[str, Floats]]] = deque(maxlen=probes)

    def add(self, report: ProbeReport) -> None:
        """Take in a probe; one without continuations says nothing of a class, and is passed over.

        Raises:
            ValueError: If its teachers are others than before.
        """
        if report.free or not report.nodes:
            return
        if self.teachers and report.teachers != self.teachers:
            raise ValueError(f"a gate has seen probes of {self.teachers}, and now one of {report.teachers}.")
        self.teachers = report.teachers
        self._kept.append(_sums(report, self.windows))

    def classes(self) -> list[Class]:
        """Those that any of the probes saw, those of all depths first."""
        return sorted({key for probe in self._kept for key in probe}, key=lambda c: (c[1], c[0]))

    def estimator(self, key: Class, teacher: str, figure: str) -> Estimator:
        """A class's figure before its interval; a question that came in several probes is one question."""
        k = self.teachers.index(teacher)
        group_by_question: dict[str, Floats] = {}
        for probe in self._kept:
            for question, sums in probe.get(key, {}).items():
                group_by_question[question] = group_by_question.get(question, 0) + sums[k]
        rows = np.array(list(group_by_question.values())).reshape(-1, 4)
        below = rows[:, 2 if figure == "gain_weighted_alignment" else 0]

        def ratio(weights: Floats) -> Floats:
            value: Floats = (weights @ rows[:, 1]) / (weights @ below)
            return value

        # Where success never differed, a gain of 0 with an interval of no width is no finding.
        blind = "" if (rows[:, 3] > 0).any() or not len(rows) else "no difference"
        ends = (-1.0, 1.0) if figure == "gain_weighted_alignment" else None
        return Estimator(ratio, below > 0, len(rows), withheld=blind, ends=ends)

    def figure(self, key: Class, teacher: str, figure: str = "predicted_gain") -> Estimate:
        """A class's figure with its interval.

        Args:
            key: The class.
            teacher: By name.
            figure: ``"predicted_gain"`` or ``"gain_weighted_alignment"``.
        """
        return jackknife(self.estimator(key, teacher, figure), self.confidence)

    def difference(self, key: Class, first: str, second: str, figure: str = "predicted_gain") -> Estimate:
        """How much more the first teacher helps in a class than the second, on the same nodes."""
        return jackknife(self.estimator(key, first, figure) - self.estimator(key, second, figure), self.confidence)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, in plain Python."""
        return {
            "teachers": list(self.teachers),
            "probes": [
                [(*key, {q: sums.tolist() for q, sums in found.items()}) for key, found in probe.items()]
                for probe in self._kept
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.teachers = tuple(state["teachers"])
        self._kept.clear()
        for probe in state["probes"]:
            self._kept.append({(c, w): {q: np.array(s) for q, s in found.items()} for c, w, found in probe})


def _sums(report: ProbeReport, windows: Sequence[int]) -> dict[Class, dict[str, Floats]]:
    evidence = gather(report.nodes, teachers=len(report.teachers))
    weight = evidence.token_weight[:, None] * np.isfinite(evidence.gain)
    norm, seen = correct(evidence).norm[:, None], (evidence.ideal_norm > 0)[:, None]
    rows = np.stack([weight, weight * np.nan_to_num(evidence.gain), weight * norm, weight * seen], axis=-1)  # (N, K, 4)
    window = np.searchsorted(np.array(windows), evidence.depth, side="right") - 1
    found: dict[Class, dict[str, Floats]] = {}
    for n, node in enumerate(report.nodes):
        for w in (WHOLE, int(window[n])):
            of_class = found.setdefault((bool(node.correct), w), {})
            of_class[node.question] = of_class.get(node.question, 0) + rows[n]
    return found


def of_tokens(tokens: Tokens, windows: Sequence[int]) -> list[tuple[Tensor, Class]]:
    """The classes that occur among tokens, each with its mask ``(N,)``."""
    correct, window = tokens.need("correct"), window_of(tokens.depth, windows)
    found = []
    for side in (False, True):
        for w in window[correct == side].unique().tolist():
            found.append(((correct == side) & (window == w), (side, int(w))))
    return found
