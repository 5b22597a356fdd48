"""Every response token of a report as a row of a table, with its influence on the success of other questions."""

from typing import Any

import numpy as np

from odp_callbacks.analysis.contributions import report_influence
from odp_callbacks.analysis.jackknife import check_confidence
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
    influence = report_influence(report, confidence)
    columns = token_columns(report)[len(TOKEN_COLUMNS) :]
    token_count = sum(len(rollout.pieces) for rollout in report.rollouts)
    values = np.full((token_count, len(columns)), np.nan)
    if influence is not None:
        values = np.stack([influence.value, influence.low, influence.high], axis=-1).reshape(values.shape)
    of_tokens = iter(values.tolist())
    return [
        {
            "question": rollout.question,
            "rollout": rollout_index,
            "depth": depth,
            "text": piece,
            "reward": rollout.reward,
            **dict(zip(columns, next(of_tokens), strict=True)),
        }
        for rollout_index, rollout in enumerate(report.rollouts)
        for depth, piece in enumerate(rollout.pieces)
    ]
