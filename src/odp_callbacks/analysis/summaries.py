"""All figures of a report, by teacher and class of nodes, each with its interval."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.alignment_intervals import alignment_intervals
from odp_callbacks.analysis.classes import node_classes
from odp_callbacks.analysis.contributions import Contribution, ReportInfluence, contributions, report_influence
from odp_callbacks.analysis.estimators import gradient_figures, token_mean
from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.jackknife import Estimate, Estimator, check_confidence, jackknife
from odp_callbacks.analysis.module_contributions import ModuleContributions, module_contributions
from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED, UNDETERMINED, statuses, teacher_advantage
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.analysis.predictors import BOUNDS, POLICY_PREDICTORS, PREDICTORS, node_predictor
from odp_callbacks.analysis.step_alignment import step_alignment
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.analysis.update_gain import update_alignment, update_contribution, update_gain
from odp_callbacks.records import Floats, ProbeReport

SPLITS = ("all", "correct", "incorrect")
"""Classes by correctness of the node's rollout: all nodes, those of correct rollouts, those of incorrect rollouts."""
INCORRECT_MINUS_CORRECT = "incorrect-correct"
"""Split of the summary that holds the differences between the classes ``incorrect`` and ``correct``."""
GEOMETRY_DEPENDENT = (
    "update_gain", "update_contribution", "update_alignment", "predicted_gain", "gain_weighted_alignment",
    "alignment", "step_alignment",
)  # fmt: skip
"""Figures that depend on the geometry of the parameters, Euclidean or preconditioned."""
NOISE_CORRECTED = ("alignment", "gain_weighted_alignment", "logit_alignment")
"""Figures that are corrected for noise and logged without the correction as well."""
UPDATE_FIGURES = ("update_gain", "update_contribution", "update_alignment")
"""Figures of the whole update, measured from rollouts alone; they come first where an update was measured."""
UPDATE_CLASSES = {"all": (1.0, 1.0), "correct": (1.0, 0.0), "incorrect": (0.0, 1.0)}
"""Weights of the directions of correct and of incorrect rollouts in the update of each split."""
FIGURES = (
    *UPDATE_FIGURES, "predicted_gain", "gain_weighted_alignment", "alignment", "step_alignment", "logit_alignment",
    "teacher_advantage", *POLICY_PREDICTORS,
)  # fmt: skip
"""Names of all figures, in the order in which summaries hold them."""


@dataclass(frozen=True)
class ClassSummary:
    """All figures of one teacher on one class of nodes, or all differences between two teachers or two classes.

    Attributes:
        teacher: Name of the teacher; ``"a - b"`` for the difference between two.
        split: Name of the class, such as ``"correct"`` or ``"depth 4-7"``; ``"incorrect-correct"`` for the difference
            between those two classes.
        figures: By name, those of :data:`FIGURES` that were measured.
        nodes: Number of nodes.
        undefined: Number of nodes whose alignment is undefined, because a gradient is zero for certain.
        undetermined: Number of nodes whose continuations cannot tell the alignment.
    """

    teacher: str
    split: str
    figures: dict[str, Estimate]
    nodes: int
    undefined: int
    undetermined: int


class Analysis:
    """Summaries of one report; computes once what they share.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """

    def __init__(self, report: ProbeReport, confidence: float = 0.95) -> None:
        self.report = report
        self.confidence = check_confidence(confidence)
        self.evidence = gather(report.nodes, teachers=len(report.teachers))
        self.model = fit_success_model(self.evidence)
        self.correction = correct_for_noise(self.evidence, self.model)
        self.status = statuses(self.evidence)
        self._logit_evidence = gather(report.nodes, logits=True, teachers=len(report.teachers))
        self._logit_correction = correct_for_noise(self._logit_evidence, self.model)
        advantages = [teacher_advantage(node) for node in report.nodes]
        self._advantage = np.stack(advantages) if advantages else np.zeros((0, len(report.teachers)))
        self._class_estimators: dict[tuple[int, str], dict[str, Estimator]] = {}
        self._summaries: dict[str, list[ClassSummary]] = {}

    def summaries(self, by: str = "correctness") -> list[ClassSummary]:
        """Figures of each teacher in each class.

        Args:
            by: What the nodes are split by: ``"correctness"`` of their rollout, ``"depth"``, ``"module"``,
                ``"question"`` or ``"rollout"``.

        Raises:
            ValueError: If ``by`` is none of these.
        """
        if by not in self._summaries:  # several pictures show the same summaries
            self._summaries[by] = self._summarise_modules() if by == "module" else self._summarise_classes(by)
        return list(self._summaries[by])

    def contrasts(self) -> list[ClassSummary]:
        """Differences between every two teachers, on the same nodes, in each class by correctness."""
        return list(self._contrasts)

    @cached_property
    def _contrasts(self) -> list[ClassSummary]:
        return [
            self._difference(
                f"{first} - {second}",
                split,
                self._estimators(first_index, split, chosen),
                self._estimators(second_index, split, chosen),
            )
            for (first_index, first), (second_index, second) in combinations(enumerate(self.report.teachers), 2)
            for split, chosen in node_classes(self.report, self.evidence, "correctness")
        ]

    def token_intervals(self) -> tuple[Floats, Floats]:
        """Lower and upper ends of the interval of each token's alignment with each teacher, ``(N, K)`` each.

        NaN where the alignment does not exist.
        """
        return self._token_interval_ends

    @cached_property
    def _token_interval_ends(self) -> tuple[Floats, Floats]:
        lower_ends, upper_ends = alignment_intervals(self.evidence, self.confidence)
        missing = self.status != DEFINED
        return np.where(missing, np.nan, lower_ends), np.where(missing, np.nan, upper_ends)

    @cached_property
    def _predictors(self) -> dict[str, Floats]:
        """Figures of the two policies at the nodes, ``(N, K)`` each; without those that no node's record has."""
        columns = {name: node_predictor(self.report, name) for name in POLICY_PREDICTORS}
        return {name: values for name, values in columns.items() if name in PREDICTORS or not np.isnan(values).all()}

    @cached_property
    def influence(self) -> ReportInfluence | None:
        """Influence of every response token with its interval; None if none was measured."""
        return report_influence(self.report, self.confidence)

    @cached_property
    def depth_contributions(self) -> list[Contribution]:
        """What each class and window of depth contributes to the update; empty if no influence was measured."""
        return [] if self.influence is None else contributions(self.report, self.influence, self.confidence)

    @cached_property
    def module_contributions(self) -> ModuleContributions | None:
        """What each layer and module contributes to the update; None if that was not measured."""
        return module_contributions(self.report, self.confidence)

    def contributions(self) -> Iterator[tuple[str, tuple[Estimate, ...]]]:
        """Yield the name of each part of the update, and its contribution for each teacher.

        Parts are ``"correct depth 4-7"``, ``"layer 3"``, ``"module q_proj"`` for a kind of module, and modules by their
        full names. Those of each sort add up to the contribution of the whole update.
        """
        for part in self.depth_contributions:
            yield f"{part.split} depth {part.window}", part.estimates
        for of_modules in self.module_contributions or ():
            yield of_modules.split, of_modules.estimates

    def token_alignment(self) -> Floats:
        """Alignment of each token with each teacher as pictures show it, ``(N, K)``: clipped to the token's interval.

        The estimate may lie outside of the interval, because only the interval uses the other branches and nodes.
        """
        lower_ends, upper_ends = self.token_intervals()
        cosine = self.evidence.cosine
        return np.where(np.isnan(lower_ends), cosine, cosine.clip(lower_ends, upper_ends))

    def significant_tokens(self) -> NDArray[np.bool_]:
        """Whether the interval of a token's alignment excludes 0, ``(N, K)``."""
        lower_ends, upper_ends = self.token_intervals()
        return (lower_ends > 0) | (upper_ends < 0)

    def significant_token_counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Number of tokens whose interval lies above 0 and number of those below, by class and teacher."""
        lower_ends, upper_ends = self.token_intervals()
        return {
            (split, teacher): (
                int((lower_ends[chosen, teacher_index] > 0).sum()),
                int((upper_ends[chosen, teacher_index] < 0).sum()),
            )
            for split, chosen in node_classes(self.report, self.evidence, "correctness")
            for teacher_index, teacher in enumerate(self.report.teachers)
        }

    def _summarise_classes(self, by: str) -> list[ClassSummary]:
        class_masks = dict(node_classes(self.report, self.evidence, by))
        summaries = []
        for teacher_index, teacher in enumerate(self.report.teachers):
            estimators = {
                split: self._estimators(teacher_index, split, chosen) for split, chosen in class_masks.items()
            }
            for split, chosen in class_masks.items():
                summaries.append(self._summary(teacher_index, split, chosen, estimators[split]))
            if by == "correctness":
                first, second = estimators["incorrect"], estimators["correct"]
                summaries.append(self._difference(teacher, INCORRECT_MINUS_CORRECT, first, second))
        return summaries

    def _summarise_modules(self) -> list[ClassSummary]:
        all_nodes = np.ones(len(self.evidence.correct), bool)
        summaries: dict[tuple[int, int], ClassSummary] = {}
        for module_index, module in enumerate(self.report.modules):
            evidence = gather(self.report.nodes, module=module_index, teachers=len(self.report.teachers))
            correction, status = correct_for_noise(evidence, self.model), statuses(evidence)
            for teacher_index in range(len(self.report.teachers)):
                estimators = gradient_figures(evidence, correction, teacher_index, all_nodes, status[:, teacher_index])
                summaries[teacher_index, module_index] = self._summary(teacher_index, module, all_nodes, estimators)
        return [summaries[key] for key in sorted(summaries)]

    def _summary(
        self, teacher_index: int, split: str, chosen: NDArray[np.bool_], estimators: dict[str, Estimator]
    ) -> ClassSummary:
        status = self.status[chosen, teacher_index]
        return ClassSummary(
            self.report.teachers[teacher_index],
            split,
            {figure: jackknife(estimator, self.confidence) for figure, estimator in estimators.items()},
            nodes=int(chosen.sum()),
            undefined=int((status == UNDEFINED).sum()),
            undetermined=int((status == UNDETERMINED).sum()),
        )

    def _difference(
        self, teacher: str, split: str, first: dict[str, Estimator], second: dict[str, Estimator]
    ) -> ClassSummary:
        figures = {figure: jackknife(first[figure] - second[figure], self.confidence) for figure in first}
        nodes = figures["predicted_gain"].nodes if "predicted_gain" in figures else 0
        return ClassSummary(teacher, split, figures, nodes, 0, 0)

    def _estimators(self, teacher_index: int, split: str, chosen: NDArray[np.bool_]) -> dict[str, Estimator]:
        """Every figure of a teacher on the nodes of a class, kept for the differences."""
        key = teacher_index, split
        if key not in self._class_estimators:
            updates = self._update_estimators(teacher_index, split)
            # Without any node there is nothing to say about single tokens, except where nothing else was measured.
            of_nodes = {} if updates and not self.report.nodes else self._build_estimators(teacher_index, chosen)
            self._class_estimators[key] = updates | of_nodes
        return self._class_estimators[key]

    def _update_estimators(self, teacher_index: int, split: str) -> dict[str, Estimator]:
        """Figures of the update; empty if none was measured, or for a class that is none of an update's."""
        if not self.report.updates or split not in UPDATE_CLASSES:
            return {}
        grams = [update.gram for update in self.report.updates]
        classes = UPDATE_CLASSES[split]
        return {
            "update_gain": update_gain(grams, teacher_index, classes),
            "update_contribution": update_contribution(grams, teacher_index, classes),
            "update_alignment": update_alignment(grams, teacher_index, classes),
        }

    def _build_estimators(self, teacher_index: int, chosen: NDArray[np.bool_]) -> dict[str, Estimator]:
        estimators = gradient_figures(
            self.evidence, self.correction, teacher_index, chosen, self.status[:, teacher_index]
        )
        logit_status = statuses(self._logit_evidence)[:, teacher_index]
        logit_figures = gradient_figures(
            self._logit_evidence, self._logit_correction, teacher_index, chosen, logit_status
        )
        estimators["step_alignment"] = step_alignment(self.report, self.evidence, teacher_index, chosen)
        estimators["logit_alignment"] = logit_figures["alignment"]
        estimators["teacher_advantage"] = token_mean(
            self.evidence, self._advantage[:, teacher_index], chosen, logit_figures["predicted_gain"].withheld
        )
        for predictor, values in self._predictors.items():
            mean = token_mean(self.evidence, values[:, teacher_index], chosen)
            estimators[predictor] = replace(mean, bounds=BOUNDS.get(predictor))
        return {figure: estimators[figure] for figure in FIGURES if figure in estimators}


def summarise(report: ProbeReport, confidence: float = 0.95, by: str = "correctness") -> list[ClassSummary]:
    """Summarise a report by teacher and class.

    Means are over tokens: each node counts with the inverse of its inclusion probability. :class:`Analysis` computes
    several summaries of one report faster.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
        by: What the nodes are split by, see :meth:`Analysis.summaries`.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1) or ``by`` is not one of the splits.
    """
    return Analysis(report, confidence).summaries(by)
