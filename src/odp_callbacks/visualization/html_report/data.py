"""The data behind the page's interactive part, as plain values that JSON can hold."""

import math
from base64 import b64encode
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.contributions import ReportInfluence
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import Floats, NodeRecord, RolloutRecord
from odp_callbacks.text import displayable, keep_end
from odp_callbacks.visualization.wording import level

MAXIMUM_PROMPT_LENGTH = 2000
"""Characters of a prompt that are kept; the page marks where one was cut."""
MAXIMUM_RESPONSE_LENGTH = 4000
"""Tokens of a response that are kept; the page says how many were left out."""


def page_data(analysis: Analysis) -> dict[str, Any]:
    """Collect what the page's script needs; a number that does not exist is None.

    Args:
        analysis: Analysis of a report.

    Returns:
        ``teachers``, names; ``level``, the confidence level in words;
        ``words``, the texts of candidate tokens by id; ``pieces``, see :func:`_piece_data`; ``rollouts`` and ``nodes``,
        see :func:`_rollout_data` and :func:`_node_data`; ``influence``, see :func:`_influence_data`, or None if no
        influence was measured.
    """
    report, alignment = analysis.report, analysis.token_alignment()
    lower_ends, upper_ends = analysis.token_intervals()
    return {
        "teachers": [displayable(teacher_name) for teacher_name in report.teachers],
        "level": level(analysis.confidence),
        "words": {str(token_id): displayable(token_text) for token_id, token_text in report.token_text.items()},
        "pieces": _piece_data(report.rollouts),
        "rollouts": [_rollout_data(rollout) for rollout in report.rollouts],
        "nodes": [
            _node_data(analysis, node_index, alignment[node_index], (lower_ends[node_index], upper_ends[node_index]))
            for node_index, node in enumerate(report.nodes)
            if node.depth < MAXIMUM_RESPONSE_LENGTH
        ],
        "influence": None if analysis.influence is None else _influence_data(analysis.influence),
    }


def _piece_data(rollouts: Sequence[RolloutRecord]) -> dict[str, Any]:
    """Collect the texts of all tokens that the page shows, rollout after rollout.

    ``texts`` are those that differ; ``ids`` is base64 of little-endian uint32, the place of each token's text.
    """
    places: dict[str, int] = {}
    ids = [
        places.setdefault(displayable(piece), len(places))
        for rollout in rollouts
        for piece in rollout.pieces[:MAXIMUM_RESPONSE_LENGTH]
    ]
    return {"texts": list(places), "ids": _base64(np.array(ids, "<u4"))}


def _influence_data(influence: ReportInfluence) -> dict[str, Any]:
    """Collect the influences of all tokens that the page shows, rollout after rollout.

    ``value`` and ``half``, the half-width of the interval, are base64 of little-endian float16, ``(T, K)``, in units of
    ``scale``, the influence of the strongest colour: of 50,000 tokens JSON would be many times as large, and slow to
    parse.
    """
    shown = influence.depth < MAXIMUM_RESPONSE_LENGTH
    value, half_width = influence.value[shown], (influence.high - influence.low)[shown] / 2
    short_value, short_half = (numbers / influence.scale for numbers in (value, half_width))
    short_value, short_half = short_value.astype("<f2"), short_half.astype("<f2")
    # Rounding must not change which tokens are significant.
    flipped = (np.abs(short_value) > short_half) != influence.significant[shown]
    flipped &= np.isfinite(short_value) & np.isfinite(short_half)
    towards = np.where(influence.significant[shown], np.float16(-np.inf), np.float16(np.inf))
    short_half[flipped] = np.nextafter(np.abs(short_value), towards)[flipped]
    return {"value": _base64(short_value), "half": _base64(short_half), "scale": influence.scale}


def _base64(values: NDArray[Any]) -> str:
    return b64encode(values.tobytes()).decode("ascii")


def _rollout_data(rollout: RolloutRecord) -> dict[str, Any]:
    return {
        "question": displayable(rollout.question),
        "prompt": keep_end(rollout.prompt, MAXIMUM_PROMPT_LENGTH),
        "length": min(len(rollout.pieces), MAXIMUM_RESPONSE_LENGTH),
        "omitted": max(0, len(rollout.pieces) - MAXIMUM_RESPONSE_LENGTH),
        "reward": json_number(rollout.reward),
        "correct": rollout.correct,
        "truncated": rollout.truncated,
    }


def _node_data(
    analysis: Analysis, node_index: int, alignment: Floats, interval: tuple[Floats, Floats]
) -> dict[str, Any]:
    """Collect the data of a node: lists over its ``A`` branches or over the ``K`` teachers.

    ``tokens``, ``student`` and ``success`` are lists over branches; ``teachers`` is a list over teachers of lists over
    branches; ``alignment``, its interval ``low`` to ``high``, ``gain`` and ``status`` are lists over teachers.
    """
    node = analysis.report.nodes[node_index]
    return {
        "rollout": node.rollout,
        "depth": node.depth,
        "tokens": node.tokens.tolist(),
        "taken": int(node.taken),
        "student": json_numbers(node.probability),
        "teachers": [json_numbers(probabilities) for probabilities in node.teacher_probability],
        "success": [
            success_with_interval(node, branch_index, analysis.confidence) for branch_index in range(len(node.tokens))
        ],
        "alignment": json_numbers(alignment),
        "low": json_numbers(interval[0]),
        "high": json_numbers(interval[1]),
        "gain": json_numbers(analysis.evidence.gain[node_index]),
        "status": [str(status) for status in analysis.status[node_index]],
    }


def success_with_interval(node: NodeRecord, branch_index: int, confidence: float = 0.95) -> list[float | None]:
    """Estimate a branch's success, with Wilson's interval.

    The interval treats the mean reward as a share of successes. For rewards between 0 and 1 it is therefore at least as
    wide as necessary.

    Args:
        node: A node's record.
        branch_index: Index of the branch.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The estimate, the ends of its interval, and the number of continuations, which is 0 if the success is known
        exactly. Without continuations, the first three are None.
    """
    continuation_count = float(node.count[branch_index])
    if continuation_count == 0:
        return [None, None, None, 0]
    mean_reward = float(node.total[branch_index]) / continuation_count
    if node.exact[branch_index]:
        return [json_number(mean_reward), json_number(mean_reward), json_number(mean_reward), 0]
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    interval_centre = mean_reward + quantile * quantile / (2 * continuation_count)
    interval_spread = quantile * math.sqrt(
        mean_reward * (1 - mean_reward) / continuation_count
        + quantile * quantile / (4 * continuation_count * continuation_count)
    )
    denominator = 1 + quantile * quantile / continuation_count
    return [
        json_number(mean_reward),
        json_number((interval_centre - interval_spread) / denominator),
        json_number((interval_centre + interval_spread) / denominator),
        int(continuation_count),
    ]


def json_number(value: float) -> float | None:
    """Round to four significant digits; None for a value that is not finite.

    Examples:
        >>> json_number(0.123456), json_number(float("nan"))
        (0.1235, None)
    """
    return float(f"{value:.4g}") if math.isfinite(value) else None


def json_numbers(values: Floats) -> list[float | None]:
    """Apply :func:`json_number` to each value."""
    return [json_number(float(value)) for value in np.ravel(values)]
