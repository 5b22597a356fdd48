"""Probes as they were before update gain: nodes in exponential windows, thinned with equal probabilities.

`decide.py` compares with them. Use the option `nodes="exponential"` inside of :func:`uniform_thinning`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

from odp_callbacks.engine.tree import planning
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.nodes import Node


def thinned_uniformly(
    nodes: Sequence[Node], tree: ContinuationTree, costs: Sequence[float], budget: float, generator: torch.Generator
) -> list[Node]:
    """Keep prefixes with equal probabilities; the arguments are those of `planning.subsample_nodes`."""
    count = len(costs)
    kept_count = min(count, max(1, int(count * budget / sum(costs)))) if sum(costs) > 0 else count
    kept = set(torch.randperm(count, generator=generator)[:kept_count].tolist())
    return [
        replace(node, inclusion=node.inclusion * kept_count / count)
        for node, prefix in zip(nodes, tree.group_of_node, strict=True)
        if prefix in kept
    ]


@contextmanager
def uniform_thinning() -> Iterator[None]:
    """Thin the nodes of probes uniformly for a while."""
    with patch.object(planning, "subsample_nodes", thinned_uniformly):
        yield
