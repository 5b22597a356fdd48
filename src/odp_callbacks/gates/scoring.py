"""What any rule would have done, computed from a probe's records without training or a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.gates.node_scoring import NODE_FIGURES, NodeScoring
from odp_callbacks.gates.protocols import Gate
from odp_callbacks.gates.rules import RULES
from odp_callbacks.gates.update_scoring import UPDATE_FIGURES, UpdateScoring, unmeasured
from odp_callbacks.records import ProbeReport


@dataclass(frozen=True)
class RuleScore:
    r"""What a rule with weights ``w`` keeps of a teacher's signal, with intervals.

    The weights are scaled so that the largest is 1. Figures that were not measured are NaN, and their notes say why.

    Attributes:
        rule: Name of the rule.
        teacher: Name of the teacher.
        token_share: Share of tokens with a weight above 0.
        update_gain: Success gained per unit step along the rule's update, :math:`\sum w_t J_t^\top d_t` summed over all
            response tokens.
        update_gained: ``update_gain`` minus that of the update of all tokens, on the same questions.
        contribution: What the rule's tokens contribute to the update of all tokens, in success per unit step along that
            update. It adds up over rules whose weights add up.
        contribution_share: ``contribution`` divided by that of all tokens.
        ideal_gain_kept: :math:`\sum w \|g\| / \sum \|g\|` over nodes, with :math:`g` the ideal gradient: the share kept
            of all that could raise success.
        help_kept: :math:`\sum w \gamma^+ / \sum \gamma^+` with :math:`\gamma = \langle g, d\rangle / \|d\|` the
            predicted gain: the share kept of the teacher's help.
        harm_removed: :math:`1 - \sum w \gamma^- / \sum \gamma^-`: the share removed of the teacher's harm.
        predicted_gain: :math:`\sum w \gamma / \sum w`: the predicted gain per unit of weight; unbiased.
        gained: ``predicted_gain`` minus the predicted gain without a rule, on the same nodes.
    """

    rule: str
    teacher: str
    token_share: float
    update_gain: Estimate
    update_gained: Estimate
    contribution: Estimate
    contribution_share: Estimate
    ideal_gain_kept: Estimate
    help_kept: Estimate
    harm_removed: Estimate
    predicted_gain: Estimate
    gained: Estimate


def score_rules(
    report: ProbeReport, rules: Mapping[str, Gate] | None = None, confidence: float = 0.95
) -> list[RuleScore]:
    """Score rules for each teacher of a probe.

    The figures of the update need rollouts alone. A rule that weights by correctness alone always has them. The others
    have a contribution, which follows from the influences of tokens; for their update gain the probe must measure their
    directions: ``diagnose(..., rules=RULES)``, with the same rules by the same names.

    The other figures need nodes with continuations. Norm, help and harm are expectations under the success model that
    is fitted to the probe (:mod:`~odp_callbacks.analysis.success_model`): the positive part of a noisy gain would count
    noise as help and as harm. A gate that learned from this very probe looks better here than it is; score it on a
    later one.

    Args:
        report: A probe's report.
        rules: Gates by name; None for :data:`~odp_callbacks.gates.rules.RULES`.
        confidence: Level of the intervals, in (0, 1); they are clustered by question.

    Returns:
        One score for each rule and teacher, teacher by teacher.

    Raises:
        ValueError: If the report has neither nodes nor an update whose tokens' features are known, or a rule's weights
            are invalid.
    """
    has_features = bool(report.updates) and all(update.features is not None for update in report.updates)
    of_update = UpdateScoring(report) if has_features else None
    of_nodes = NodeScoring(report) if report.nodes else None
    if of_update is None and of_nodes is None:
        raise ValueError(
            "`report` must have nodes, or an update whose tokens' features are known; measure with continuations, or "
            "with `influence=True` or `rules=`."
        )
    chosen = RULES if rules is None else rules
    weights = {} if of_update is None else {name: of_update.weigh(rule) for name, rule in chosen.items()}
    scores = []
    for teacher_index, teacher in enumerate(report.teachers):
        for name, rule in chosen.items():
            token_share, figures = float("nan"), dict.fromkeys(NODE_FIGURES, unmeasured("no continuations"))
            if of_nodes is not None:
                token_share, figures = of_nodes.figures(rule, teacher_index, confidence)
            if of_update is None:
                figures |= dict.fromkeys(UPDATE_FIGURES, unmeasured("no update"))
            else:
                token_share = weights[name].token_share(teacher_index)
                figures |= of_update.figures(name, weights[name], teacher_index, confidence)
            scores.append(RuleScore(name, teacher, token_share, **figures))
    return scores
