"""The paper's oracle filter: what would be left if a teacher taught only tokens with a positive alignment."""

from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes


@dataclass(frozen=True)
class OracleFilter:
    """The filter of one teacher.

    Attributes:
        teacher: Its name, or ``"all"`` for the tokens of all teachers together.
        kept: Share of the tokens that the filter keeps.
        before: Mean of success-rate range times cosine over all tokens.
        after: The same over the tokens that are kept.
        tokens: Number of tokens with a score.
    """

    teacher: str
    kept: float
    before: float
    after: float
    tokens: int


def oracle_filter(nodes: ScoredNodes) -> list[OracleFilter]:
    """Keep the tokens with positive alignment, per teacher and for all teachers together.

    It is an oracle because alignment is what success rates say afterwards. The same noisy success rates choose and
    judge the tokens, so ``after`` is too large, and more so with fewer visits (ours; the paper does not say so).
    Source: arXiv:2605.10889.

    Args:
        nodes: Scored nodes.
    """
    products = nodes.success_range[:, None] * nodes.cosine  # (N, K)
    columns = {teacher: products[:, index] for index, teacher in enumerate(nodes.teachers)}
    columns["all"] = products.reshape(-1)
    filters = []
    for teacher, values in columns.items():
        defined = values[np.isfinite(values)]
        kept = defined[defined > 0]
        filters.append(
            OracleFilter(
                teacher,
                len(kept) / len(defined) if len(defined) else float("nan"),
                float(defined.mean()) if len(defined) else float("nan"),
                float(kept.mean()) if len(kept) else float("nan"),
                len(defined),
            )
        )
    return filters
