"""The gate that acts on measurements: each class of tokens is weighted by what its teacher was measured to do there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.gates.class_evidence import (
    ALL_DEPTHS,
    WINDOWS,
    ClassEvidence,
    TokenClass,
    class_name,
    masks_by_class,
)
from odp_callbacks.gates.node_evidence import NODE_FIGURES, NodeEvidence
from odp_callbacks.gates.update_evidence import UpdateEvidence
from odp_callbacks.records import ProbeReport

FIGURES = (UpdateEvidence.figure, *NODE_FIGURES)
"""The figures that a gate can act on."""


def evidence_for(
    figure: str, probes: int = 4, windows: Sequence[int] | None = None, confidence: float = 0.95
) -> ClassEvidence:
    """Return what a gate collects of the probes to know a figure of each class.

    Args:
        figure: One of :data:`FIGURES`.
        probes: How many of the last probes count.
        windows: First depths of the depth windows; None for those of the method, or for a single one where the figure
            is known for all depths together.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If an argument is out of range, or windows are given for a figure that has none.
    """
    if figure not in FIGURES:
        raise ValueError(f"`figure` must be one of {list(FIGURES)}, but {figure!r} was given.")
    if figure != UpdateEvidence.figure:
        return NodeEvidence(figure, probes, WINDOWS if windows is None else windows, confidence)
    if windows is not None and tuple(windows) != (0,):
        raise ValueError(
            f"`windows` was given ({windows!r}), but 'update_gain' is known for all depths together; "
            f"leave `windows` out, or use a figure of single tokens: {list(NODE_FIGURES)}."
        )
    return UpdateEvidence(probes, confidence)


class AlignmentGate:
    """Distil where the teacher measurably helps, stop where it measurably harms, and do not act on noise.

    Each class of tokens (teacher, correct or incorrect rollout) has a switch, which is open at first. After each probe
    the switch *closes* if the whole interval of the class's figure lies below 0, and *opens* if the whole interval lies
    above 0; otherwise it stays as it is (hysteresis).

    The figure is the update gain: what a step along the distillation gradient of the class's rollouts adds to the
    success of other questions. It needs no continuations, so probes with ``budget=0`` will do. The figures of single
    tokens need continuations, and divide the classes by depth, too. A window whose own interval never excluded 0 then
    follows the switch of its side (correct or incorrect, all depths), which rests on more evidence. Of several windows,
    some interval excludes 0 by chance; a higher ``confidence`` makes this rarer.

    Closed classes have the weight ``floor``. Open classes have the weight 1, or, if ``proportional``, their figure
    divided by its mean over all classes that measurably help, limited to the range from ``floor`` to ``max_weight``; a
    class whose interval contains 0 has the weight 1 in any case.

    The gate learns from the probes of a :class:`~odp_callbacks.GradientAlignmentCallback`, which finds it as the
    LightningModule's ``gate``. The teachers must have the same names there.

    Args:
        figure: ``"update_gain"``, or one of single tokens: ``"predicted_gain"``, ``"gain_weighted_alignment"``.
        probes: How many of the last probes count.
        windows: First depths of the depth windows of a figure of single tokens; ``(0,)`` for a single window, None for
            those of the method.
        confidence: Level of the intervals, in (0, 1).
        floor: Weight of a closed class, in [0, 1]; above 0, no class is left out entirely.
        proportional: Weight open classes by their figure.
        max_weight: The largest weight of a class, at least 1.

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
        figure: str = "update_gain",
        *,
        probes: int = 4,
        windows: Sequence[int] | None = None,
        confidence: float = 0.95,
        floor: float = 0.0,
        proportional: bool = False,
        max_weight: float = 4.0,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"`floor` must lie in [0, 1], but {floor!r} was given.")
        if not 1 <= max_weight < float("inf"):
            raise ValueError(f"`max_weight` must be finite and at least 1, but {max_weight!r} was given.")
        self.figure, self.floor, self.proportional, self.max_weight = figure, floor, proportional, max_weight
        self.evidence = evidence_for(figure, probes, windows, confidence)
        # Switches that a probe has set: (teacher, class) -> open.
        self._switches: dict[tuple[str, TokenClass], bool] = {}
        self._weights: dict[tuple[str, TokenClass], float] = {}

    def observe(self, report: ProbeReport) -> None:
        """Learn from a probe.

        Raises:
            ValueError: If the probe did not measure what the gate's figure is computed from.
        """
        self.evidence.add(report)
        self._weights = {}
        classes = self.evidence.classes()
        for teacher in self.evidence.teachers:
            estimates = {token_class: self.evidence.estimate(token_class, teacher) for token_class in classes}
            self._set_switches(teacher, estimates)
            self._set_weights(teacher, estimates)

    def _set_switches(self, teacher: str, estimates: Mapping[TokenClass, Estimate]) -> None:
        for token_class, estimate in estimates.items():
            if estimate.high < 0:  # the ends are NaN if there is no interval, which changes nothing
                self._switches[teacher, token_class] = False
            elif estimate.low > 0:
                self._switches[teacher, token_class] = True

    def _set_weights(self, teacher: str, estimates: Mapping[TokenClass, Estimate]) -> None:
        # Those of all depths are the sums of their windows, if there are windows.
        finest = [token_class for token_class in estimates if token_class[1] != ALL_DEPTHS] or list(estimates)
        helpful = {
            token_class: estimates[token_class].value for token_class in finest if estimates[token_class].low > 0
        }
        mean_helpful = sum(helpful.values()) / len(helpful) if helpful else 1.0
        for token_class in estimates:
            weight = 1.0
            if not self.is_open(teacher, token_class):
                weight = self.floor
            elif self.proportional and token_class in helpful:
                weight = min(max(helpful[token_class] / mean_helpful, self.floor), self.max_weight)
            self._weights[teacher, token_class] = weight

    def is_open(self, teacher: str, token_class: TokenClass) -> bool:
        """Whether a class's switch is open; if no probe has set it, that of its side decides."""
        switch_of_side = self._switches.get((teacher, (token_class[0], ALL_DEPTHS)), True)
        return self._switches.get((teacher, token_class), switch_of_side)

    def weight(self, teacher: str, token_class: TokenClass) -> float:
        """Return the weight of a class; a class that occurred in no probe has the weight of its side."""
        weight_of_side = self._weights.get((teacher, (token_class[0], ALL_DEPTHS)), 1.0)
        return self._weights.get((teacher, token_class), weight_of_side)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Return the weights of ``N`` tokens, ``(N,)``.

        Raises:
            ValueError: If the probes do not measure a teacher of these tokens, or the rewards are not known.
        """
        teacher_indices = tokens.need("teacher")
        weights = torch.ones_like(tokens.counts)
        for teacher_index in teacher_indices.unique().tolist():
            teacher = tokens.teachers[teacher_index]
            self._check_measured(teacher)
            for class_mask, token_class in masks_by_class(tokens, self.evidence.windows):
                weights[class_mask & (teacher_indices == teacher_index)] = self.weight(teacher, token_class)
        return weights

    def _check_measured(self, teacher: str) -> None:
        measured = self.evidence.teachers
        if measured and teacher not in measured:
            raise ValueError(
                f"`gate` knows the teachers {list(measured)} from the probes, but the training distils from "
                f"{teacher!r}; use the same name in training, as in `teachers={{{measured[0]!r}: ...}}`."
            )

    def scalars(self) -> dict[str, float]:
        """Return each class's weight as it is logged: ``odp/gate/<teacher>/<class>``."""
        windows = self.evidence.windows
        return {
            f"odp/gate/{teacher}/{class_name(token_class, windows)}": self.weight(teacher, token_class)
            for teacher in self.evidence.teachers
            for token_class in self.evidence.classes()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python."""
        return {
            "evidence": {"figure": self.figure, **self.evidence.state_dict()},
            "switches": [
                (teacher, *token_class, is_open) for (teacher, token_class), is_open in self._switches.items()
            ],
            "weights": [(teacher, *token_class, weight) for (teacher, token_class), weight in self._weights.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept.

        Raises:
            ValueError: If the state is that of a gate with another figure.
        """
        if (figure := state["evidence"].get("figure")) != self.figure:
            raise ValueError(f"`state` is of a gate with the figure {figure!r}, but this one has {self.figure!r}.")
        self.evidence.load_state_dict(state["evidence"])
        self._switches = {
            (teacher, (correct, window_index)): is_open for teacher, correct, window_index, is_open in state["switches"]
        }
        self._weights = {
            (teacher, (correct, window_index)): weight for teacher, correct, window_index, weight in state["weights"]
        }
