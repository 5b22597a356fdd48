"""Combine reports: of several probes, of the parts of one probe, and of the same nodes measured several times."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from odp_callbacks.analysis.teacher_coverage import COVERAGE_SETTING, joined_setting
from odp_callbacks.analysis.time_shortage import response_limit
from odp_callbacks.records import NodeRecord, ProbeReport, StepSums, step_sums
from odp_callbacks.update_records import UpdateRecord


def concatenate(reports: Sequence[ProbeReport]) -> ProbeReport:
    """Combine reports of several probes into one, which can be summarised like any other.

    Questions with the same id count as the same question, so intervals treat their nodes as dependent. The result has
    no step sums unless there is only one report, because a step's gradients belong to one student at one moment.

    Args:
        reports: At least one report; all with the same teachers, modules, geometry and mode.

    Raises:
        ValueError: If ``reports`` is empty or the reports differ in one of these.
    """
    first = _first_of(reports)
    for other in reports[1:]:
        if _compatibility(other) != _compatibility(first):
            raise ValueError(
                f"`reports` must have the same teachers, modules, geometry and mode, but teachers are {first.teachers} "
                f"and {other.teachers}, with {len(first.modules)} and {len(other.modules)} modules."
            )
    nodes: list[NodeRecord] = []
    updates: list[UpdateRecord] = []
    rollout_offset = 0
    for report in reports:
        nodes += [replace(node, rollout=node.rollout + rollout_offset) for node in report.nodes]
        updates += [update.with_rollout_offset(rollout_offset) for update in report.updates]
        rollout_offset += len(report.rollouts)
    settings = dict(first.settings)
    if limits := [limit for report in reports if (limit := response_limit(report)) is not None]:
        settings["response_limit"] = min(limits)
    if coverage := joined_setting(reports):
        settings[COVERAGE_SETTING] = coverage
    return replace(
        first,
        settings=settings,
        rollouts=tuple(rollout for report in reports for rollout in report.rollouts),
        nodes=tuple(nodes),
        updates=tuple(updates),
        generated_tokens=_sum_by_stage(report.generated_tokens for report in reports),
        continuations=sum(report.continuations for report in reports),
        truncated=sum(report.truncated for report in reports),
        stage_seconds=_sum_by_stage(report.stage_seconds for report in reports),
        token_text={token: text for report in reports for token, text in report.token_text.items()},
        left_out=_sum_by_stage(report.left_out for report in reports),
        slot_steps=_sum_by_stage(report.slot_steps for report in reports),
        teacher_responses=tuple(response for report in reports for response in report.teacher_responses),
        step=first.step if len(reports) == 1 else None,
        preconditioned=_combine_preconditioned(reports, concatenate),
    )


def merge(parts: Sequence[ProbeReport]) -> ProbeReport:
    """Merge the parts of one probe, whose questions several processes measured at the same time.

    In contrast to :func:`concatenate`, a stage takes as long as in the slowest process, and step sums are merged where
    their vectors are at hand. If a process projected its gradients, so that its modules cannot be told apart, the
    others' modules are summed.

    Args:
        parts: At least one report, in the order of the questions.

    Raises:
        ValueError: If ``parts`` is empty or the parts differ in teachers, geometry or mode.
    """
    fewest_modules = min((part.modules for part in parts), key=len, default=())
    if any(len(part.modules) != len(fewest_modules) for part in parts):
        parts = [part if part.modules == fewest_modules else _sum_modules(part, fewest_modules) for part in parts]
    merged = concatenate(parts)
    slowest = {stage: max(part.stage_seconds.get(stage, 0.0) for part in parts) for stage in merged.stage_seconds}
    preconditioned = None
    if merged.preconditioned is not None:
        preconditioned = merge([part.preconditioned for part in parts if part.preconditioned is not None])
    step = _merge_steps([part.step for part in parts])
    return replace(merged, stage_seconds=slowest, step=step, preconditioned=preconditioned)


def pool(reports: Sequence[ProbeReport]) -> ProbeReport:
    """Add up the continuations of several probes of the same nodes and branches.

    Args:
        reports: At least one report; all with the same rollouts, nodes and branches.

    Raises:
        ValueError: If ``reports`` is empty or their nodes or branches differ.
    """
    first = _first_of(reports)
    identities = [_node_identity(node) for node in first.nodes]
    if any([_node_identity(node) for node in other.nodes] != identities for other in reports[1:]):
        raise ValueError("`reports` must have the same nodes and branches; `concatenate` takes different ones.")
    continuation_tokens = sum(report.generated_tokens.get("continuations", 0) for report in reports)
    # Every report counts the same truncated rollouts; they are to count once.
    repeated_rollouts = (len(reports) - 1) * sum(rollout.truncated for rollout in first.rollouts)
    return replace(
        first,
        nodes=tuple(_pool_nodes(same_node) for same_node in zip(*(report.nodes for report in reports), strict=True)),
        generated_tokens={**first.generated_tokens, "continuations": continuation_tokens},
        continuations=sum(report.continuations for report in reports),
        truncated=sum(report.truncated for report in reports) - repeated_rollouts,
        stage_seconds=_sum_by_stage(report.stage_seconds for report in reports),
        slot_steps=_sum_by_stage(report.slot_steps for report in reports),
        step=first.step if len(reports) == 1 else None,
        preconditioned=_combine_preconditioned(reports, pool),
    )


def with_updates_of(report: ProbeReport, update: ProbeReport) -> ProbeReport:
    """A report of nodes with the updates of another report on the same rollouts.

    Rollouts are the same if they are the n-th of the same question with the same text; influences of rollouts that the
    first report does not have are dropped.

    Args:
        report: With nodes.
        update: Without nodes.
    """
    index_of = {key: index for index, key in enumerate(_rollout_identities(report))}
    new_index = np.array([index_of.get(key, -1) for key in _rollout_identities(update)], dtype=np.int64)
    preconditioned = report.preconditioned
    if preconditioned is not None and update.preconditioned is not None:
        preconditioned = replace(preconditioned, updates=update.preconditioned.updates)
    updates = tuple(record.with_rollouts(new_index) for record in update.updates)
    return replace(report, updates=updates, preconditioned=preconditioned)


def _rollout_identities(report: ProbeReport) -> list[tuple[str, int, str]]:
    """Question, place among the rollouts of the question, and text of each rollout."""
    seen: Counter[str] = Counter()
    identities = []
    for rollout in report.rollouts:
        identities.append((rollout.question, seen[rollout.question], rollout.text))
        seen[rollout.question] += 1
    return identities


def _first_of(reports: Sequence[ProbeReport]) -> ProbeReport:
    if not reports:
        raise ValueError("`reports` is empty; give at least one.")
    return reports[0]


def _compatibility(report: ProbeReport) -> tuple[object, ...]:
    """What reports must have in common to be concatenated."""
    return report.teachers, report.modules, report.settings.get("geometry")


def _node_identity(node: NodeRecord) -> tuple[object, ...]:
    """What makes two records those of the same node with the same branches."""
    return node.rollout, node.question, node.depth, tuple(node.tokens.tolist()), tuple(node.weight.tolist())


def _sum_by_stage(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    for count in counts:
        for stage, value in count.items():
            totals[stage] = totals.get(stage, 0) + value
    return totals


def _combine_preconditioned(
    reports: Sequence[ProbeReport], combine: Callable[[Sequence[ProbeReport]], ProbeReport]
) -> ProbeReport | None:
    """Combine the reports in the other geometry; None unless all reports have one."""
    preconditioned = [report.preconditioned for report in reports if report.preconditioned is not None]
    return combine(preconditioned) if len(preconditioned) == len(reports) else None


def _sum_modules(part: ProbeReport, modules: tuple[str, ...]) -> ProbeReport:
    """The same part with the Gram matrices of all its modules added up, under the names ``modules``."""
    nodes = tuple(replace(node, gram=node.gram.sum(axis=0, keepdims=True)) for node in part.nodes)
    preconditioned = part.preconditioned and _sum_modules(part.preconditioned, modules)
    return replace(part, modules=modules, nodes=nodes, preconditioned=preconditioned)


def _merge_steps(steps: Sequence[StepSums | None]) -> StepSums | None:
    """Merge summed gradients; None if a part lacks the vectors, which products between parts need."""
    complete = [step for step in steps if step is not None and step.vectors is not None]
    if len(complete) < len(steps):
        return None
    return step_sums(
        tuple(question for step in complete for question in step.question),
        tuple(correct for step in complete for correct in step.correct),
        np.concatenate([step.vectors for step in complete if step.vectors is not None]),
    )


def _pool_nodes(same_node: Sequence[NodeRecord]) -> NodeRecord:
    """Add up the continuations of one node; branches whose success is known stay as they are."""
    first = same_node[0]
    totals = {
        attribute: np.where(
            first.exact, getattr(first, attribute), sum(getattr(record, attribute) for record in same_node)
        )
        for attribute in ("count", "total", "total_square")
    }
    return replace(first, **totals)
