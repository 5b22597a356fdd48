"""Every response token of a report as a row of a table, with its influence on the success of other questions."""

from typing import Any

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.token_influence import influence_intervals
from odp_callbacks.records import ProbeReport

TOKEN_COLUMNS = ("question", "rollout", "depth", "text", "reward")


def token_columns(report: ProbeReport) -> list[str]:
    """Names of the columns: :data:`TOKEN_COLUMNS`, then influence and its interval for each teacher."""
    return [
        *TOKEN_COLUMNS,
        *(f"influence_{teacher}{end}" for teacher in report.teachers for end in ("", "_low", "_high")),
    ]


def token_rows(report: ProbeReport, confidence: float = 0.95) -> list[dict[str, Any]]:
    """One row for each response token, rollout by rollout.

    Args:
        report: A probe's report. Influences are NaN for rollouts whose update was not measured.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """
    check_confidence(confidence)
    influences: dict[tuple[int, int], dict[str, float]] = {}
    for update in report.updates:
        if update.influence is None:
            continue
        intervals = influence_intervals(update.influence, confidence)
        for place, key in enumerate(zip(update.influence.rollout.tolist(), update.influence.depth.tolist())):
            influences[key] = {
                f"influence_{teacher}{end}": float(values[place, teacher_index])
                for teacher_index, teacher in enumerate(report.teachers)
                for end, values in zip(("", "_low", "_high"), intervals, strict=True)
            }
    missing = dict.fromkeys(token_columns(report)[len(TOKEN_COLUMNS) :], float("nan"))
    return [
        {
            "question": rollout.question,
            "rollout": rollout_index,
            "depth": depth,
            "text": piece,
            "reward": rollout.reward,
            **influences.get((rollout_index, depth), missing),
        }
        for rollout_index, rollout in enumerate(report.rollouts)
        for depth, piece in enumerate(rollout.pieces)
    ]
