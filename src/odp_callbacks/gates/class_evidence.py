"""Classes of tokens (teacher, correct or incorrect, depth window), and what the last probes measured of each class."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from odp_callbacks.analysis.jackknife import Estimate, Estimator, check_confidence, jackknife
from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.records import ProbeReport

WINDOWS = (0, *(2**exponent for exponent in range(31)))
"""First depths of the windows [0, 1), [1, 2), [2, 4), [4, 8), ... of the method."""
ALL_DEPTHS = -1
"""Takes the place of a window's index in the class of all depths."""
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


class ClassEvidence(ABC):
    """What the last probes measured of each class, from which a gate computes figures and intervals.

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
        self._probes: deque[Any] = deque(maxlen=probes)

    def add(self, report: ProbeReport) -> None:
        """Add a probe.

        Raises:
            ValueError: If the probe measured other teachers than those before, or not what this evidence consists of.
        """
        measured = self._read(report)
        if measured is None:
            return
        if self.teachers and report.teachers != self.teachers:
            raise ValueError(
                f"`report` measures the teachers {report.teachers}, but the probes before measured {self.teachers}; "
                "use a new gate."
            )
        self.teachers = report.teachers
        self._probes.append(measured)

    @abstractmethod
    def _read(self, report: ProbeReport) -> Any:
        """Take from a probe what is kept; None if it says nothing about any class."""

    @abstractmethod
    def classes(self) -> list[TokenClass]:
        """Return the classes that occurred in any of the probes, those of all depths first."""

    @abstractmethod
    def estimator(self, token_class: TokenClass, teacher: str) -> Estimator:
        """Return the estimator of a class's figure; a question that came in several probes counts as one question."""

    def estimate(self, token_class: TokenClass, teacher: str) -> Estimate:
        """Return a class's figure with its interval.

        Args:
            token_class: The class.
            teacher: Name of the teacher.
        """
        return jackknife(self.estimator(token_class, teacher), self.confidence)

    def difference(self, token_class: TokenClass, first: str, second: str) -> Estimate:
        """Return how much more the first teacher helps in a class than the second, on the same questions."""
        return jackknife(self.estimator(token_class, first) - self.estimator(token_class, second), self.confidence)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python."""
        return {"teachers": list(self.teachers), "probes": [self._to_plain(measured) for measured in self._probes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        probes = [self._from_plain(plain) for plain in state["probes"]]
        self.teachers = tuple(state["teachers"])
        self._probes.clear()
        self._probes.extend(probes)

    @abstractmethod
    def _to_plain(self, measured: Any) -> Any:
        """What was kept of a probe, in plain Python."""

    @abstractmethod
    def _from_plain(self, plain: Any) -> Any:
        """Inverse of :meth:`_to_plain`."""
