"""What the page shows, as plain rows: computed by the library's own functions, and only put into order here."""

import math
from typing import Any

import numpy as np

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import NodeRecord
from odp_callbacks.text import cut, shown

LONGEST_PROMPT, LONGEST_RESPONSE = 2000, 4000
"""Characters of a prompt, and tokens of a response, that are shown; what is cut is said."""
Z = 1.959964
"""Of a 95 % interval."""


def page_data(analysis: Analysis) -> dict[str, Any]:
    """Rollouts and nodes as JSON can hold them; a number that does not exist is null.

    Tables, columns first: a node's ``p``, ``q`` and so on are lists over its branches.
    """
    report, evidence, status = analysis.report, analysis.evidence, analysis.status
    low, high = analysis.token_intervals()
    alignment = analysis.token_alignment()
    texts = report.token_text
    return {
        "teachers": [shown(name) for name in report.teachers],
        "free": report.free,
        "words": {str(k): shown(text) for k, text in texts.items()},
        "rollouts": [
            {
                "question": shown(r.question),
                "prompt": cut(r.prompt, LONGEST_PROMPT),
                "pieces": [shown(piece) for piece in r.pieces[:LONGEST_RESPONSE]],
                "more": max(0, len(r.pieces) - LONGEST_RESPONSE),
                "reward": number(r.reward),
                "correct": r.correct,
                "truncated": r.truncated,
            }
            for r in report.rollouts
        ],
        "nodes": [
            {
                "r": node.rollout,
                "d": node.depth,
                "k": node.tokens.tolist(),
                "t": int(node.taken),
                "p": numbers(node.probability),
                "q": [numbers(row) for row in node.teacher_probability],
                "s": [success(node, a) for a in range(len(node.tokens))],
                "a": numbers(alignment[n]),
                "l": numbers(low[n]),
                "h": numbers(high[n]),
                "g": numbers(evidence.gain[n]),
                "u": [str(kind) for kind in status[n]],
            }
            for n, node in enumerate(report.nodes)
            if node.depth < LONGEST_RESPONSE
        ],
    }


def success(node: NodeRecord, a: int) -> list[float | None]:
    """Of a branch: estimate, ends of its 95 % interval, and continuations (0: known exactly).

    The interval is Wilson's, with the rewards' mean for a share: for rewards between 0 and 1 it is at least as wide as
    need be.
    """
    n = float(node.count[a])
    if n == 0:
        return [None, None, None, 0]
    mean = float(node.total[a]) / n
    if node.exact[a]:
        return [number(mean), number(mean), number(mean), 0]
    centre, spread = mean + Z * Z / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    below = 1 + Z * Z / n
    return [number(mean), number((centre - spread) / below), number((centre + spread) / below), int(n)]


def number(value: float) -> float | None:
    """Four digits; None for what is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def numbers(values: Any) -> list[float | None]:
    """:func:`number` of each."""
    return [number(float(v)) for v in np.asarray(values).ravel()]
