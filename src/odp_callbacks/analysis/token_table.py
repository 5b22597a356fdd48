"""Every response token of a report as a row of a table, with its influence and what may predict it."""

from typing import Any

import numpy as np

from odp_callbacks.analysis.contributions import report_influence
from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.predictors import TOKEN_PREDICTORS, token_predictors
from odp_callbacks.records import ProbeReport

TOKEN_COLUMNS = ("question", "rollout", "depth", "text", "reward")
OF_STUDENT = ("repetition", "student_entropy")
"""Predictors that are the same for every teacher."""
OF_TEACHERS = tuple(name for name in TOKEN_PREDICTORS if name not in ("depth", *OF_STUDENT))


def token_columns(report: ProbeReport) -> list[str]:
    """Names of the columns: :data:`TOKEN_COLUMNS`, then influence and its interval for each teacher, then predictors.

    Predictors are those of the student alone, and those of each teacher.
    """
    return [
        *TOKEN_COLUMNS,
        *(f"influence_{teacher}{end}" for teacher in report.teachers for end in ("", "_low", "_high")),
        *OF_STUDENT,
        *(f"{name}_{teacher}" for teacher in report.teachers for name in OF_TEACHERS),
    ]


def token_rows(report: ProbeReport, confidence: float = 0.95) -> list[dict[str, Any]]:
    """One row for each response token, rollout by rollout.

    Args:
        report: A probe's report. Influences and figures of the two policies are NaN for rollouts whose update was not
            measured.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """
    check_confidence(confidence)
    influence = report_influence(report, confidence)
    columns = token_columns(report)[len(TOKEN_COLUMNS) :]
    token_count = sum(len(rollout.pieces) for rollout in report.rollouts)
    influences = np.full((token_count, 3 * len(report.teachers)), np.nan)
    if influence is not None:
        influences = np.stack([influence.value, influence.low, influence.high], axis=-1).reshape(influences.shape)
    predictors = token_predictors(report)
    of_student = [predictors[name][:, :1] for name in OF_STUDENT]
    of_teachers = [predictors[name][:, [k]] for k in range(len(report.teachers)) for name in OF_TEACHERS]
    of_tokens = iter(np.concatenate([influences, *of_student, *of_teachers], axis=1).tolist())
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
