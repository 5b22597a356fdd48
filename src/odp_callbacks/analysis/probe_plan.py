"""The best numbers for the next probe at a given time, from what an earlier probe took and found."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.estimators import half_width
from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.nested_design import NestedDesign, UnitPrices, best_design
from odp_callbacks.analysis.variance_components import gain_components
from odp_callbacks.records import ProbeReport

STAGES_OF_ROLLOUTS = ("rollouts", "verifier", "branches", "teachers", "update", "step_gradients")
"""Stages whose time grows with the number of rollouts."""
SMALLEST_ROLLOUTS = 2
"""Update gain compares the rollouts of a question with each other."""


@dataclass(frozen=True)
class ProbePlan:
    """What the next probe should measure.

    Attributes:
        design: Numbers of questions, rollouts a question, nodes a rollout, and continuations a branch.
        seconds: What a probe of this design is expected to take.
        half_width: Expected half-width of the widest 95 % interval of predicted gain, over all nodes.
        budget: Expected number of tokens of its continuations.
    """

    design: NestedDesign
    seconds: float
    half_width: float
    budget: int

    def options(self) -> dict[str, int]:
        """The plan as options of a probe, which takes as many questions as the plan says.

        The continuations become a ``budget``, so that they go where they tell most.
        """
        return {
            "rollouts_per_question": self.design.rollouts,
            "nodes": self.design.nodes,
            "budget": self.budget,
        }

    def __str__(self) -> str:
        """Say the plan in one sentence."""
        design = self.design
        return (
            f"In {self.seconds:.0f} s: {design.questions} questions x {design.rollouts} rollouts x "
            f"{design.nodes} nodes x {design.continuations} continuations a branch; "
            f"the intervals of predicted gain would be about ±{self.half_width:.2g}."
        )


def plan_probe(
    report: ProbeReport, seconds: float, available_questions: int, fixed: Mapping[str, int] | None = None
) -> ProbePlan:
    """Plan the next probe: the numbers that make the intervals of predicted gain narrowest in the given time.

    The report gives the price of each rollout, node and continuation, and how much gain varies at each level
    (:mod:`~odp_callbacks.analysis.variance_components`). A plan from one probe does not bias the next one, whose
    rollouts and continuations are drawn anew. It assumes the same student, teachers, lengths and machine.

    Args:
        report: An earlier probe that measured nodes.
        seconds: What the next probe may take.
        available_questions: How many questions there are.
        fixed: Numbers that are to be kept, by the names ``"questions"``, ``"rollouts"``, ``"nodes"`` and
            ``"continuations"``.

    Raises:
        ValueError: If ``seconds`` is not positive, or the report is too small to tell how gain varies.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"`seconds` must be a positive number, but {seconds!r} was given.")
    components = gain_components(report) if report.nodes else None
    width = half_width(gather(report.nodes), "predicted_gain") if report.nodes else float("inf")
    if components is None or not np.isfinite(width):
        raise ValueError(
            "`report` is too small for a plan: it needs nodes of several questions, two rollouts of a question and an "
            "interval of predicted gain; measure with more questions or a larger `budget`."
        )
    prices = unit_prices(report)
    at_least = {} if fixed and "rollouts" in fixed else {"rollouts": SMALLEST_ROLLOUTS}
    design = best_design(prices, components, seconds, available_questions, fixed, at_least)
    scale = width / _realised_design(report).variance(components) ** 0.5
    tokens = report.generated_tokens.get("continuations", 0) / max(1, report.continuations)
    continuations = design.questions * design.rollouts * design.nodes * design.continuations * _mean_branches(report)
    return ProbePlan(
        design,
        design.price(prices),
        scale * design.variance(components) ** 0.5,
        max(1, round(continuations * tokens)),
    )


def unit_prices(report: ProbeReport) -> UnitPrices:
    """Compute what each rollout, node and continuation of a report took, in seconds.

    Args:
        report: A report with nodes.
    """
    stages = report.stage_seconds
    return UnitPrices(
        question=0.0,  # a prompt is read for its rollouts
        rollout=sum(max(0.0, stages.get(stage, 0.0)) for stage in STAGES_OF_ROLLOUTS) / len(report.rollouts),
        node=stages.get("gradients", 0.0) / len(report.nodes),
        continuation=stages.get("continuations", 0.0) * _mean_branches(report) / max(1, report.continuations),
    )


def _mean_branches(report: ProbeReport) -> float:
    """Mean number of branches of a node."""
    return float(np.mean([len(node.tokens) for node in report.nodes]))


def _realised_design(report: ProbeReport) -> NestedDesign:
    """The design that a report comes closest to, with mean numbers rounded and at least 1."""
    questions = len({rollout.question for rollout in report.rollouts})
    branch_count = sum(len(node.tokens) for node in report.nodes)
    numbers = (
        len(report.rollouts) / questions,
        len(report.nodes) / len(report.rollouts),
        report.continuations / branch_count,
    )
    return NestedDesign(questions, *(max(1, round(number)) for number in numbers))
