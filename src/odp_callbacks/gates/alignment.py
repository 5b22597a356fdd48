"""The gate that acts on what was measured: each class of tokens weighs by what its teacher was seen to do there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.gates.classes import (
    FIGURES,
    WHOLE,
    WINDOWS,
    Class,
    ClassEvidence,
    class_name,
    of_tokens,
)
from odp_callbacks.gates.tokens import Tokens
from odp_callbacks.records import ProbeReport


class AlignmentGate:
    """Distil where the teacher measurably helps; stop where it measurably harms; do nothing on noise.

    After each probe every class (teacher x correct or incorrect x depth window) is looked at. Its switch *closes* when
    the whole interval of its figure lies below 0, and *opens* when the whole interval lies above 0; in between it stays
    as it was (hysteresis), and it starts open. A window whose own interval never excluded 0 follows the switch of its
    side (correct or incorrect, all depths), which has more evidence. With several windows some interval excludes 0 by
    chance: a higher ``confidence`` guards against it.

    Closed classes weigh ``floor``. Open ones weigh 1, or, if ``proportional``, their figure in units of the mean over
    all classes that measurably help, between ``floor`` and ``most``; a class whose interval holds 0 weighs 1 in any
    case.

    It learns from the probes of a :class:`~odp_callbacks.GradientAlignmentCallback`, which finds it as the
    LightningModule's ``gate``; the teachers must have the same names there.

    Args:
        figure: ``"predicted_gain"`` or ``"gain_weighted_alignment"``.
        probes: How many of the last probes count.
        windows: First depths of the depth windows; ``(0,)`` for none.
        confidence: Level of the intervals, in (0, 1).
        floor: Weight of a closed class, in [0, 1]; above 0 it keeps a little of everything.
        proportional: Weigh open classes by their figure.
        most: Weight of a class at most, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import tokens_of
        >>> gate = AlignmentGate(floor=0.1)
        >>> gate(tokens_of(torch.ones(1, 3), rewards=[0.0])).tolist()  # nothing measured yet
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        figure: str = "predicted_gain",
        *,
        probes: int = 4,
        windows: Sequence[int] = WINDOWS,
        confidence: float = 0.95,
        floor: float = 0.0,
        proportional: bool = False,
        most: float = 4.0,
    ) -> None:
        if figure not in FIGURES:
            raise ValueError(f"`figure` must be one of {list(FIGURES)}, but {figure!r} was given.")
        if not 0 <= floor <= 1:
            raise ValueError(f"`floor` must lie in [0, 1], but {floor!r} was given.")
        if not 1 <= most < float("inf"):
            raise ValueError(f"`most` must be at least 1, but {most!r} was given.")
        self.figure, self.floor, self.proportional, self.most = figure, floor, proportional, most
        self.evidence = ClassEvidence(probes, windows, confidence)
        # Switches that were ever thrown: (teacher, class) -> open.
        self._open: dict[tuple[str, Class], bool] = {}
        self._weights: dict[tuple[str, Class], float] = {}

    def observe(self, report: ProbeReport) -> None:
        """Learn from a probe."""
        self.evidence.add(report)
        self._weights = {}
        for teacher in self.evidence.teachers:
            figures = {key: self.evidence.figure(key, teacher, self.figure) for key in self.evidence.classes()}
            for key, figure in figures.items():
                if figure.high < 0:  # NaN where there is no interval: no action
                    self._open[teacher, key] = False
                elif figure.low > 0:
                    self._open[teacher, key] = True
            helping = {key: f.value for key, f in figures.items() if key[1] != WHOLE and f.low > 0}
            mean = sum(helping.values()) / len(helping) if helping else 1.0
            for key in figures:
                if not self.open(teacher, key):
                    self._weights[teacher, key] = self.floor
                elif self.proportional and key in helping:
                    self._weights[teacher, key] = min(max(helping[key] / mean, self.floor), self.most)
                else:
                    self._weights[teacher, key] = 1.0

    def open(self, teacher: str, key: Class) -> bool:
        """Whether a class's switch is open: its own, or that of its side, or as all of them start."""
        return self._open.get((teacher, key), self._open.get((teacher, (key[0], WHOLE)), True))

    def weight(self, teacher: str, key: Class) -> float:
        """Weight of a class; one that no probe has seen follows its side."""
        seen = self._weights.get((teacher, key))
        return seen if seen is not None else self._weights.get((teacher, (key[0], WHOLE)), 1.0)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Weights ``(N,)``.

        Raises:
            ValueError: If no probe measures a teacher of these tokens, or rewards are not known.
        """
        teacher = tokens.need("teacher")
        weights = torch.ones_like(tokens.counts)
        for k in teacher.unique().tolist():
            name = self._known(tokens.teachers[k])
            for mask, key in of_tokens(tokens, self.evidence.windows):
                weights[mask & (teacher == k)] = self.weight(name, key)
        return weights

    def _known(self, name: str) -> str:
        measured = self.evidence.teachers
        if measured and name not in measured:
            raise ValueError(
                f"`gate` knows the teachers {list(measured)} from the probes, but {name!r} teaches; give it that name "
                f"where you train, as in `teacher={{{measured[0]!r}: ...}}`."
            )
        return name

    def scalars(self) -> dict[str, float]:
        """Each class's weight as it is logged: ``odp/gate/<teacher>/<class>``."""
        windows = self.evidence.windows
        return {
            f"odp/gate/{teacher}/{class_name(key, windows)}": self.weight(teacher, key)
            for teacher in self.evidence.teachers
            for key in self.evidence.classes()
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, in plain Python."""
        return {
            "evidence": self.evidence.state_dict(),
            "open": [(teacher, *key, open_) for (teacher, key), open_ in self._open.items()],
            "weights": [(teacher, *key, weight) for (teacher, key), weight in self._weights.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.evidence.load_state_dict(state["evidence"])
        self._open = {(teacher, (c, w)): open_ for teacher, c, w, open_ in state["open"]}
        self._weights = {(teacher, (c, w)): weight for teacher, c, w, weight in state["weights"]}
