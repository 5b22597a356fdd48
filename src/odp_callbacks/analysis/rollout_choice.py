"""On which rollouts to distil with a teacher: on all, on one class of them, or by a rule that was measured."""

import math
from dataclasses import dataclass

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.questions_needed import growth_to_decide
from odp_callbacks.analysis.rule_figures import RULE, contribution_share, rule_gram
from odp_callbacks.analysis.summaries import UPDATE_CLASSES, Analysis
from odp_callbacks.analysis.update_gain import ALL_CLASSES, update_contribution, update_gain
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import displayable
from odp_callbacks.update_records import CLASSES

OTHER_CLASS = {"correct": "incorrect", "incorrect": "correct"}
UNDECIDED_CLASSES = "whether to leave out correct or incorrect rollouts is undecided"
UNDECIDED_WHOLE = "whole update undecided"
"""Why a class has no share of the gain: that of the whole update cannot be told from 0."""


@dataclass(frozen=True)
class RolloutChoice:
    """On which rollouts to distil, and why.

    Attributes:
        where: Such as ``"on all rollouts"`` or ``"with the rule “prefix”"``.
        reason: What closing the others would do, as a clause; empty where nothing is known.
        growth: How many times as many questions would tell what the reason leaves open; 1 if it leaves nothing open.
    """

    where: str
    reason: str = ""
    growth: float = 1.0


def choose_rollouts(analysis: Analysis, teacher: str) -> RolloutChoice:
    """Choose the rollouts to distil on with a teacher that helps.

    All rollouts are chosen unless an interval says otherwise: if the update of one class or of a measured rule gains
    more than that of all tokens, it is chosen, and if a class takes away from the gain, the other one is. Intervals of
    the comparisons are widened to hold together (Bonferroni).

    Args:
        analysis: Analysis of a report.
        teacher: Name of the teacher.
    """
    if not analysis.report.updates:
        return _by_single_tokens(analysis, teacher)
    teacher_index = analysis.report.teachers.index(teacher)
    alternatives = _alternatives(analysis.report, teacher_index)
    all_tokens = update_gain([update.gram for update in analysis.report.updates], teacher_index)
    joint_confidence = 1 - (1 - analysis.confidence) / len(alternatives)
    gained = {name: jackknife(gain - all_tokens, joint_confidence) for name, gain in alternatives.items()}
    better = [name for name, estimate in gained.items() if estimate.low > 0]
    if better:
        best = max(better, key=lambda name: gained[name].value)
        more = f"a step of the same length gains {_with_interval(gained[best])} more there"
        return RolloutChoice(_place(best), more)
    choice = _by_shares(analysis, teacher_index)
    measured_rules = len(_rule_names(analysis.report))
    if measured_rules:
        of_rules = "the measured rule does not gain" if measured_rules == 1 else "no measured rule gains"
        reasons = [reason for reason in (choice.reason, f"{of_rules} measurably more") if reason]
        choice = RolloutChoice(choice.where, "; ".join(reasons), choice.growth)
    return choice


def class_shares(analysis: Analysis, teacher_index: int) -> dict[str, Estimate]:
    """Each class's share of the gain of a teacher's update; the two add up to 1.

    Args:
        analysis: Analysis of a report with an update.
        teacher_index: Index of the teacher.

    Returns:
        Shares by class; NaN where the gain of the whole update is not told from 0.
    """
    grams = [update.gram for update in analysis.report.updates]
    all_tokens = update_contribution(grams, teacher_index, ALL_CLASSES)
    estimate = jackknife(all_tokens, analysis.confidence)
    withheld = estimate.note or ("" if estimate.low > 0 or estimate.high < 0 else UNDECIDED_WHOLE)
    parts = {split: update_contribution(grams, teacher_index, UPDATE_CLASSES[split]) for split in CLASSES}
    return {
        split: jackknife(contribution_share(part, all_tokens, withheld or part.withheld), analysis.confidence)
        for split, part in parts.items()
    }


def _alternatives(report: ProbeReport, teacher_index: int) -> dict[str, Estimator]:
    """Update gain of each class and of each rule that all measurements have."""
    grams = [update.gram for update in report.updates]
    gains = {split: update_gain(grams, teacher_index, UPDATE_CLASSES[split]) for split in CLASSES}
    for name in _rule_names(report):
        of_rule = [
            rule_gram(update.gram, update.rules, update.rules.names.index(name))
            for update in report.updates
            if update.rules is not None
        ]
        gains[name] = update_gain(of_rule, teacher_index, RULE)
    return gains


def _rule_names(report: ProbeReport) -> list[str]:
    """Rules that all measurements have."""
    of_updates = [() if update.rules is None else update.rules.names for update in report.updates]
    return [name for name in of_updates[0] if all(name in names for names in of_updates)] if of_updates else []


def _place(alternative: str) -> str:
    if alternative in CLASSES:
        return f"on {alternative} rollouts only"
    return f"with the rule “{displayable(alternative)}”"


def _by_shares(analysis: Analysis, teacher_index: int) -> RolloutChoice:
    """All rollouts, unless a class takes away from the gain; the class of the smaller share is told about."""
    every = class_shares(analysis, teacher_index)
    shares = {split: share for split, share in every.items() if not math.isnan(share.low)}
    if not shares:
        undecided = any(share.note == UNDECIDED_WHOLE for share in every.values())
        return RolloutChoice("on all rollouts", UNDECIDED_CLASSES if undecided else "")
    split = min(shares, key=lambda name: shares[name].value)
    share = shares[split]
    if share.high < 0:
        return RolloutChoice(
            f"on {OTHER_CLASS[split]} rollouts only",
            f"{split} ones take away {-share.value:.0%} of the gain ({-share.high:.0%} to {-share.low:.0%})",
        )
    interval = f"{share.low:.0%} to {share.high:.0%}"
    if share.low > 0:
        reason = f"leaving out {split} rollouts would lose {share.value:.0%} of the gain ({interval})"
        return RolloutChoice("on all rollouts", reason)
    reason = f"whether leaving out {split} rollouts would lose anything is undecided ({interval} of the gain)"
    return RolloutChoice("on all rollouts", reason, growth_to_decide(share, analysis.confidence))


def _by_single_tokens(analysis: Analysis, teacher: str) -> RolloutChoice:
    """The class that does not harm, judged by the predicted gain of nodes."""
    gains = {
        summary.split: summary.figures["predicted_gain"]
        for summary in analysis.summaries()
        if summary.teacher == teacher and summary.split in CLASSES
    }
    for split, gain in gains.items():
        if gain.high < 0:
            return RolloutChoice(f"on {OTHER_CLASS[split]} rollouts only", f"it harms on {split} ones")
    return RolloutChoice("on all rollouts")


def _with_interval(estimate: Estimate) -> str:
    assert not math.isnan(estimate.low)
    return f"{estimate.value:.2g} ({estimate.low:.2g} to {estimate.high:.2g})"
