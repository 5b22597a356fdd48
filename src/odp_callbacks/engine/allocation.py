"""Which branches get more continuations."""

import torch

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.nodes import Node
from odp_callbacks.engine.success import Outcomes


def spread_evenly(
    left: int, nodes: list[Node], outcomes: list[list[Outcomes]], config: ProbeConfig, chooser: torch.Generator
) -> list[list[int]]:
    """Spread continuations evenly over the branches that are not known exactly; ties are drawn.

    No more than ``left`` tokens even if every one of them runs to the length limit. As most end before it, another
    round follows.
    """
    open_ = [(n, b) for n, row in enumerate(outcomes) for b, outcome in enumerate(row) if not outcome.exact]
    open_ = [open_[i] for i in torch.randperm(len(open_), generator=chooser).tolist()]
    allocation = [[0] * len(row) for row in outcomes]
    for count in range(1, config.continuations):
        for n, b in open_:
            if len(outcomes[n][b].rewards) + allocation[n][b] == count:
                left -= config.max_new_tokens - nodes[n].depth - 1
                if left < 0:
                    return allocation
                allocation[n][b] += 1
    return allocation
