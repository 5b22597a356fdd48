"""Evidence from single tokens: sums over the nodes of each class, by question."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.gates.class_evidence import ALL_DEPTHS, WINDOWS, ClassEvidence, TokenClass
from odp_callbacks.records import Floats, ProbeReport

NODE_FIGURES = ("predicted_gain", "gain_weighted_alignment")
"""The figures that are known for each class of nodes."""

SumsByClass = dict[TokenClass, dict[str, Floats]]
"""Class -> question -> ``(K, 4)`` sums of the token weight, of weight times gain, of weight times ideal norm, and of
the weight of the nodes at which success was seen to differ."""


class NodeEvidence(ClassEvidence):
    """What the nodes of the last probes say of each class.

    Of each probe it keeps, by class, question and teacher, the sums of the token weights and of their products with
    the predicted gain and with the noise-corrected norm of the ideal gradient; a few kilobytes in a checkpoint.

    Args:
        figure: One of :data:`NODE_FIGURES`.
        probes: How many of the last probes count.
        windows: First depths of the depth windows.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        figure: str = "predicted_gain",
        probes: int = 4,
        windows: Sequence[int] = WINDOWS,
        confidence: float = 0.95,
    ) -> None:
        super().__init__(probes, windows, confidence)
        self.figure = figure

    def _read(self, report: ProbeReport) -> SumsByClass | None:
        if not report.nodes and report.settings.get("budget") == 0:
            raise ValueError(
                f"`report` has no continuations (`budget=0`), but the gate's figure {self.figure!r} is computed from "
                "them; give the probes a budget, or use `figure='update_gain'`."
            )
        # A probe whose continuations were all left out says nothing about a class.
        return _sums_by_class(report, self.windows) if report.nodes else None

    def classes(self) -> list[TokenClass]:
        """Return the classes that occurred in any of the probes, those of all depths first."""
        classes = {token_class for sums in self._probes for token_class in sums}
        return sorted(classes, key=lambda token_class: (token_class[1], token_class[0]))

    def estimator(self, token_class: TokenClass, teacher: str) -> Estimator:
        """Return the estimator of a class's figure; a question that came in several probes counts as one question."""
        teacher_index = self.teachers.index(teacher)
        sums_by_question: dict[str, Floats] = {}
        for probe_sums in self._probes:
            for question, sums in probe_sums.get(token_class, {}).items():
                sums_by_question[question] = sums_by_question.get(question, 0) + sums[teacher_index]
        question_sums = np.array(list(sums_by_question.values())).reshape(-1, 4)
        denominator = question_sums[:, 2 if self.figure == "gain_weighted_alignment" else 0]

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
            bounds=(-1.0, 1.0) if self.figure == "gain_weighted_alignment" else None,
        )

    def _to_plain(self, measured: SumsByClass) -> list[Any]:
        return [
            (*token_class, {question: sums.tolist() for question, sums in by_question.items()})
            for token_class, by_question in measured.items()
        ]

    def _from_plain(self, plain: list[Any]) -> SumsByClass:
        return {
            (correct, window_index): {question: np.array(sums) for question, sums in by_question.items()}
            for correct, window_index, by_question in plain
        }


def _sums_by_class(report: ProbeReport, windows: Sequence[int]) -> SumsByClass:
    """The sums ``(K, 4)`` of a probe, by class and question."""
    evidence = gather(report.nodes, teachers=len(report.teachers))
    weight = evidence.token_weight[:, None] * np.isfinite(evidence.weighted_gain)
    ideal_norm, differs = correct_for_noise(evidence).norm[:, None], evidence.differs[:, None]
    columns = [weight, weight * np.nan_to_num(evidence.weighted_gain), weight * ideal_norm, weight * differs]
    node_terms = np.stack(columns, axis=-1)  # (N, K, 4)
    window_index = np.searchsorted(np.array(windows), evidence.depth, side="right") - 1
    sums_by_class: SumsByClass = {}
    for node_index, node in enumerate(report.nodes):
        for index in (ALL_DEPTHS, int(window_index[node_index])):
            by_question = sums_by_class.setdefault((bool(node.correct), index), {})
            by_question[node.question] = by_question.get(node.question, 0) + node_terms[node_index]
    return sums_by_class
