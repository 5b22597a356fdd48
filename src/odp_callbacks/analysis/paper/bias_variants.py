"""The same nodes scored with and without each of the two biases, from the tree of one record."""

from collections.abc import Mapping
from itertools import product

import numpy as np

from odp_callbacks.analysis.paper.prefix_tree import ANCESTORS, OWN_PATH, Ancestors, Children, OwnPath
from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes, SuccessRates, score_nodes
from odp_callbacks.records import Floats

Variant = tuple[OwnPath, Ancestors]
"""How visits are counted: the path's own rollout, and targeted rollouts at ancestors."""
PAPER: Variant = ("counted", "counted")
UNBIASED: Variant = ("left out", "own policy only")
VARIANTS: tuple[Variant, ...] = tuple(product(OWN_PATH, ANCESTORS))


def bias_variants(
    record: PaperRecord,
    minimum_visits: int | None = None,
    others: Mapping[str, SuccessRates] | None = None,
    *,
    same_nodes: bool = False,
) -> dict[Variant | str, ScoredNodes]:
    """Score the nodes of a record, over the same tokens, under each way of counting visits.

    S_u holds the tokens with enough visits that neither bias touches. Only success rates then differ between the
    variants, and which of them have a range above 0: a path's own success makes a node scored where no other response
    succeeds.

    Args:
        record: A measurement.
        minimum_visits: Visits that a token needs, without the path's own rollout and without forced ones at ancestors.
            None for the record's own setting.
        others: Further success rates by name, such as the true ones of an enumerated world.
        same_nodes: Keep only the nodes that are scored in all variants, so that all have the same rows.

    Returns:
        Scored nodes by (``own_path``, ``ancestors``) and by the names of ``others``.
    """
    rates: dict[Variant | str, SuccessRates] = {variant: _counted(record, variant) for variant in VARIANTS}
    rates.update(others or {})
    own_path, ancestors = UNBIASED
    scored = {
        name: score_nodes(
            record,
            minimum_visits=minimum_visits,
            own_path=own_path,
            ancestors=ancestors,
            success_rates=success_rates,
        )
        for name, success_rates in rates.items()
    }
    if not same_nodes:
        return scored
    keys = {name: list(zip(nodes.path.tolist(), nodes.depth.tolist(), strict=True)) for name, nodes in scored.items()}
    common = set.intersection(*(set(of_variant) for of_variant in keys.values()))
    return {
        name: nodes.select(np.array([key in common for key in keys[name]], dtype=bool))
        for name, nodes in scored.items()
    }


def _counted(record: PaperRecord, variant: Variant) -> SuccessRates:
    """Success rates under a way of counting that counts at least the visits of the unbiased one."""

    def success_rates(question: int, path: int, children: Children) -> Floats:
        counted = record.questions[question].tree.children(path, *variant)
        rates = dict(
            zip(
                zip(counted.depth.tolist(), counted.token.tolist(), strict=True),
                (counted.successes / counted.visits).tolist(),
                strict=True,
            )
        )
        return np.array(
            [rates[pair] for pair in zip(children.depth.tolist(), children.token.tolist(), strict=True)], dtype=float
        )

    return success_rates
