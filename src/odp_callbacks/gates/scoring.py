"""What any rule would have done, from a probe's records: no training, no model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import questions_of
from odp_callbacks.analysis.evidence import Evidence, gather, norm
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.gates.loss import weigh
from odp_callbacks.gates.rules import RULES, everything
from odp_callbacks.gates.tokens import Gate, Tokens
from odp_callbacks.records import Floats, ProbeReport


@dataclass(frozen=True)
class RuleScore:
    r"""What a rule with weights ``w`` keeps of a teacher's signal; sums over tokens ``u``, each with its interval.

    With :math:`g_u` the ideal gradient, :math:`\gamma_u = \langle g_u, d_u\rangle / \|d_u\|` the predicted gain, and
    weights scaled so that the largest is 1:

    Attributes:
        rule: Its name.
        teacher: Its name.
        token_share: Share of tokens that weigh more than 0.
        ideal_gain_kept: :math:`\sum w \|g\| / \sum \|g\|`: where success can be raised at all, how much is let through.
        help_kept: :math:`\sum w \gamma^+ / \sum \gamma^+`: of what the teacher does good.
        harm_removed: :math:`1 - \sum w \gamma^- / \sum \gamma^-`: of what it does harm.
        predicted_gain: :math:`\sum w \gamma / \sum w`: per weight spent; unbiased.
        gained: ``predicted_gain`` less that without a rule, on the same nodes.
    """

    rule: str
    teacher: str
    token_share: float
    ideal_gain_kept: Estimate
    help_kept: Estimate
    harm_removed: Estimate
    predicted_gain: Estimate
    gained: Estimate


def score_rules(
    report: ProbeReport, rules: Mapping[str, Gate] | None = None, confidence: float = 0.95
) -> list[RuleScore]:
    """Score rules for each teacher of a probe.

    Norm, help and harm are expectations under the success model fitted to the probe
    (:mod:`~odp_callbacks.analysis.success_model`): the positive part of a noisy gain would count noise as help, and as harm.
    A gate that learned from this very probe looks better here than it is; score it on a later one.

    Args:
        report: A probe's report, with continuations.
        rules: Gates by name; None for those of :data:`~odp_callbacks.gates.rules.RULES`.
        confidence: Level of the intervals, in (0, 1); clustered by question.

    Returns:
        One score for each rule and teacher, teacher by teacher.

    Raises:
        ValueError: If the report is of the free mode, or a rule gives no proper weights.
    """
    if report.free:
        raise ValueError("`report` must have continuations: in the free mode a token's gain is not known by itself.")
    rules = RULES if rules is None else rules
    evidence = gather(report.nodes, teachers=len(report.teachers))
    drawn = fit_success_model(evidence).draw(evidence)  # (N, S, A)
    offset = drawn - drawn[:, :, :1]
    ideal = norm(evidence.norm_form, offset).mean(axis=1)
    gains = np.einsum("nka,nsa->nks", np.nan_to_num(evidence.gain_form), offset)  # (N, K, S)
    help_, harm = gains.clip(min=0).mean(axis=2), (-gains).clip(min=0).mean(axis=2)
    found = []
    for k, teacher in enumerate(report.teachers):
        tokens = tokens_of_report(report, k)
        there = np.isfinite(evidence.gain[:, k])
        gain = np.nan_to_num(evidence.gain[:, k])
        seen = "" if (evidence.ideal_norm[there] > 0).any() or not there.any() else "no difference"

        def ratio(
            above: Floats, below: Floats, chosen: NDArray[np.bool_] = there, withheld: str = seen, flip: bool = False
        ) -> Estimator:
            return _ratio(evidence, above, below, chosen, withheld, flip)

        plain = weigh(everything, tokens).double().numpy()
        for name, rule in rules.items():
            w = weigh(rule, tokens).double().numpy()
            w = w / w.max() if w.size and w.max() > 0 else w
            of_rule = ratio(w * gain, w)
            figures = {
                "ideal_gain_kept": replace(ratio(w * ideal, ideal), ends=(0.0, 1.0)),
                "help_kept": replace(ratio(w * help_[:, k], help_[:, k]), ends=(0.0, 1.0)),
                "harm_removed": replace(ratio(w * harm[:, k], harm[:, k], flip=True), ends=(0.0, 1.0)),
                "predicted_gain": of_rule,
                "gained": of_rule - ratio(plain * gain, plain),
            }
            share = float(np.average(w[there] > 0, weights=evidence.token_weight[there])) if there.any() else np.nan
            found.append(
                RuleScore(name, teacher, share, **{key: jackknife(e, confidence) for key, e in figures.items()})
            )
    return found


def tokens_of_report(report: ProbeReport, teacher: int = 0) -> Tokens:
    """A probe's nodes as the tokens that a gate sees, taught by one of its teachers.

    Args:
        report: The report.
        teacher: Index of the teacher.
    """
    nodes, rollouts = report.nodes, report.rollouts
    passed: dict[str, list[bool]] = {}
    for r in rollouts:
        passed.setdefault(r.question, []).append(r.correct)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def log(values: list[float]) -> torch.Tensor:
        return column(values).log()

    index = [n.rollout for n in nodes]
    return Tokens(
        rollout=torch.tensor(index, dtype=torch.long),
        depth=torch.tensor([n.depth for n in nodes], dtype=torch.long),
        length=torch.tensor([len(rollouts[i].pieces) for i in index], dtype=torch.long),
        reward=column([rollouts[i].reward for i in index]),
        correct=torch.tensor([n.correct for n in nodes], dtype=torch.bool),
        pass_rate=column([float(np.mean(passed[n.question])) for n in nodes]),
        student_entropy=column([float(n.predictors["student_entropy"][teacher]) for n in nodes]),
        teacher_entropy=column([float(n.predictors["teacher_entropy"][teacher]) for n in nodes]),
        student_log_prob=log([float(n.probability[n.taken]) for n in nodes]),
        teacher_log_prob=log([float(n.teacher_probability[teacher, n.taken]) for n in nodes]),
        reverse_kl=column([float(n.predictors["reverse_kl"][teacher]) for n in nodes]),
        teacher=torch.full((len(nodes),), teacher, dtype=torch.long),
        teachers=report.teachers,
        weight=column([1 / n.inclusion for n in nodes]),
    )


def _ratio(
    evidence: Evidence, above: Floats, below: Floats, chosen: NDArray[np.bool_], withheld: str, flip: bool
) -> Estimator:
    """Token-weighted sum of ``above`` over that of ``below``, or 1 less it; ``(N,)`` each."""
    m = int(evidence.question.max(initial=-1)) + 1
    index, weight = evidence.question[chosen], evidence.token_weight[chosen]
    sums = np.stack([np.bincount(index, weight * x[chosen], minlength=m) for x in (above, below)], axis=1)

    def function(weights: Floats) -> Floats:
        total = weights @ sums
        value: Floats = total[..., 0] / total[..., 1]
        return 1 - value if flip else value

    heard = chosen & (below > 0)
    return Estimator(function, questions_of(evidence, heard), int(heard.sum()), withheld=withheld)
