"""The numbers of a probe that its user left open: how many questions, rollouts and nodes."""

from dataclasses import dataclass, replace

from odp_callbacks.analysis.probe_plan import plan_probe
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.records import ProbeReport

PLANNED_TARGET = "predicted_gain"
"""The figure whose variance at each level is known."""


@dataclass(frozen=True)
class ProbeDesign:
    """What a probe measures.

    Attributes:
        config: The configuration without open numbers.
        questions: How many questions are measured at most.
    """

    config: ProbeConfig
    questions: int


def design_probe(
    config: ProbeConfig, seconds: float | None, available_questions: int, earlier: ProbeReport | None
) -> ProbeDesign:
    """Choose the numbers that are open.

    With a limit of the seconds and an earlier probe, they are those that make the intervals of predicted gain narrowest
    in that time (:func:`~odp_callbacks.plan_probe`); otherwise the usual ones. What an earlier probe found does not
    bias this one, whose rollouts and continuations are drawn anew.

    Args:
        config: What the user set.
        seconds: What the probe may take; None for no limit.
        available_questions: How many questions there are.
        earlier: The report of the last probe of the same student and teachers; None if there was none.

    Returns:
        The design. Numbers that the user set are kept.

    Examples:
        >>> design_probe(ProbeConfig(nodes=3), None, 10, None).config.rollouts_per_question
        4
    """
    usual = ProbeDesign(config.with_numbers(), available_questions)
    is_planned = seconds is not None and config.measures_nodes and config.budget is None and config.has_open_numbers
    if not is_planned or earlier is None or config.target != PLANNED_TARGET:
        return usual
    fixed = {} if config.rollouts_per_question is None else {"rollouts": config.rollouts_per_question}
    fixed |= {"nodes": config.nodes} if isinstance(config.nodes, int) else {}
    fixed |= {} if config.adaptive else {"continuations": config.continuations}
    assert seconds is not None
    try:
        plan = plan_probe(earlier, seconds, available_questions, fixed)
    except ValueError:  # too little is known of how gain varies
        return usual
    numbers = plan.options()
    return ProbeDesign(
        config.with_numbers(rollouts_per_question=numbers["rollouts_per_question"], nodes=numbers["nodes"]),
        plan.design.questions,
    )


def without_unplanned(report: ProbeReport, unplanned: int) -> ProbeReport:
    """Note in a report the questions that the plan left out.

    Args:
        report: The report.
        unplanned: How many there are.
    """
    missing = report.left_out.get("unsampled_questions", 0) + unplanned
    return replace(report, left_out={**report.left_out, "unsampled_questions": missing}) if unplanned else report
