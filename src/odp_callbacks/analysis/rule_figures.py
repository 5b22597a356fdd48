r"""Update gain and contribution of a rule, which gives each token a weight in the distillation gradient.

With the weights :math:`w_t` a rule's direction is :math:`D_w = \sum_t w_t J_t^\top d_t`. Its update gain
:math:`\langle \nabla J, D_w \rangle / \|D_w\|` needs inner products of its own directions. What it contributes to the
update of all tokens, :math:`\langle \nabla J, D_w \rangle / \|D\|`, is a weighted sum of the influences of tokens, and
adds up over rules whose weights add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from odp_callbacks.analysis.fold_contributions import contribution_statistic
from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.records import Floats
from odp_callbacks.update_records import RuleProducts, TokenInfluence, UpdateGram, UpdateRecord

RULE = (1.0, 0.0)
"""Weights of the classes of :func:`rule_gram` that make the direction of the rule."""


@dataclass(frozen=True)
class WeightedInfluence:
    """Influences of the tokens of one measurement, and what a rule makes of them.

    Attributes:
        influence: Of ``N`` tokens.
        weights: ``(N,)``.
    """

    influence: TokenInfluence
    weights: Floats


def rule_gram(gram: UpdateGram, products: RuleProducts, rule: int) -> UpdateGram:
    """Inner products where the two classes are the rule's direction, and what it leaves out of the whole direction.

    So every figure of a class is a figure of the rule as well: the update gain of :data:`RULE`, for example, or its
    contribution to the update of all tokens.

    Args:
        gram: Of the same measurement, with the classes by correctness.
        products: Of ``R`` rules.
        rule: Index of the rule.
    """
    cross, own, whole = products.cross[rule], products.own[rule], products.whole[rule]  # (F, F, K) each
    transposed = whole.transpose(1, 0, 2)
    all_tokens = gram.directions.sum(axis=(3, 4))
    directions = np.empty((*own.shape, 2, 2))
    directions[..., 0, 0] = own
    directions[..., 0, 1] = whole - own
    directions[..., 1, 0] = transposed - own
    directions[..., 1, 1] = all_tokens - whole - transposed + own
    # Counts of tokens may differ from teacher to teacher; those of the first one stand for all.
    tokens = products.tokens[rule, :, 0]
    return replace(
        gram,
        tokens=np.stack([tokens, gram.tokens.sum(axis=1) - tokens], axis=1),
        cross=np.stack([cross, gram.cross.sum(axis=3) - cross], axis=3),
        directions=directions,
        modules=None,
    )


def measured_rule(records: Sequence[UpdateRecord], name: str, weights: Sequence[Floats]) -> list[UpdateGram]:
    """The inner products of a rule, one for each measurement; empty if they were not measured with these weights.

    Args:
        records: The measurements.
        name: Of the rule.
        weights: Of each measurement ``(K,)``, the sum of the weights of all tokens for each teacher.
    """
    grams = []
    for record, sums in zip(records, weights, strict=True):
        if record.rules is None or name not in record.rules.names:
            return []
        index = record.rules.names.index(name)
        if not np.allclose(record.rules.weight[index], sums, rtol=1e-3, atol=1e-6):
            return []
        grams.append(rule_gram(record.gram, record.rules, index))
    return grams


def influence_contribution(measured: Sequence[WeightedInfluence], teacher: int) -> Estimator:
    """What the weighted tokens contribute to the update of all tokens, from their influences.

    The jackknife leaves a fold out of both: of the success gradients, and of the tokens.

    Args:
        measured: One for each measurement.
        teacher: Index of the teacher.
    """
    return Estimator(
        contribution_statistic([one.influence for one in measured], [one.weights for one in measured], teacher),
        np.ones(sum(len(one.influence.fold_questions) for one in measured), bool),
        int(sum((one.weights > 0).sum() for one in measured)),
        pairs=True,
    )


def contribution_share(part: Estimator, whole: Estimator, withheld: str = "") -> Estimator:
    """A rule's share of the contribution of all tokens.

    Args:
        part: The rule's contribution.
        whole: That of all tokens, from the same measurements.
        withheld: Why the share is not reported.
    """
    return Estimator(
        lambda weights: part.statistic(weights) / whole.statistic(weights),
        part.questions,
        part.nodes,
        withheld=withheld,
        pairs=True,
    )
