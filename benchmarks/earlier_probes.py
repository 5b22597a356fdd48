"""Probes as they were before update gain: nodes in exponential windows, thinned with equal probabilities.

`decide.py` compares with them. Use :data:`OPTIONS` inside of :func:`uniform_thinning`. Only what nodes, branches and
gradients are is as it was; `microscope.py` runs the whole library as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

from odp_callbacks.engine.tree import planning
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.nodes import Node

OPTIONS = {
    "nodes": "exponential",
    "teacher_branch_probability": None,
    "tail_roulette": None,
    "differing_gradients": 1.0,
    "agreeing_gradients": 1.0,
}
"""The options of such a probe."""


def thinned_uniformly(
    nodes: Sequence[Node],
    tree: ContinuationTree,
    costs: Sequence[float],
    budget: float,
    generator: torch.Generator,
    *,
    evenly: bool,
) -> list[Node]:
    """Keep prefixes with equal probabilities, evenly or not; the arguments are those of `planning.subsample_nodes`."""
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
