"""What any rule would have done, computed from a probe's records without training or a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import questions_of
from odp_callbacks.analysis.evidence import Evidence, gather, norm
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.gates.loss import checked_weights
from odp_callbacks.gates.protocols import Gate
from odp_callbacks.gates.rules import RULES, everything
from odp_callbacks.gates.tokens import Tokens
from odp_callbacks.records import Floats, ProbeReport


@dataclass(frozen=True)
class RuleScore:
    r"""What a rule with weights ``w`` keeps of a teacher's signal, with intervals.

    The sums are over tokens, :math:`g` is the ideal gradient, :math:`\gamma = \langle g, d\rangle / \|d\|` the
    predicted gain, and the weights are scaled so that the largest is 1:

    Attributes:
        rule: Name of the rule.
        teacher: Name of the teacher.
        token_share: Share of tokens with a weight above 0.
        ideal_gain_kept: :math:`\sum w \|g\| / \sum \|g\|`: the share kept of all that could raise success.
        help_kept: :math:`\sum w \gamma^+ / \sum \gamma^+`: the share kept of the teacher's help.
        harm_removed: :math:`1 - \sum w \gamma^- / \sum \gamma^-`: the share removed of the teacher's harm.
        predicted_gain: :math:`\sum w \gamma / \sum w`: the predicted gain per unit of weight; unbiased.
        gained: ``predicted_gain`` minus the predicted gain without a rule, on the same nodes.
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

    Norm, help and harm are expectations under the success model that is fitted to the probe
    (:mod:`~odp_callbacks.analysis.success_model`): the positive part of a noisy gain would count noise as help and as
    harm. A gate that learned from this very probe looks better here than it is; score it on a later one.

    Args:
        report: A probe's report, with continuations.
        rules: Gates by name; None for :data:`~odp_callbacks.gates.rules.RULES`.
        confidence: Level of the intervals, in (0, 1); they are clustered by question.

    Returns:
        One score for each rule and teacher, teacher by teacher.

    Raises:
        ValueError: If the report has no continuations, or a rule's weights are invalid.
    """
    if not report.nodes:
        raise ValueError("`report` must have nodes: without continuations the gain of a single token is not known.")
    evidence = gather(report.nodes, teachers=len(report.teachers))
    sampled_success = fit_success_model(evidence).draw(evidence)  # (N, S, A)
    sampled_offset = sampled_success - sampled_success[:, :, :1]
    ideal_norm = norm(evidence.norm_form, sampled_offset).mean(axis=1)
    sampled_gain = np.einsum("nka,nsa->nks", np.nan_to_num(evidence.gain_form), sampled_offset)  # (N, K, S)
    expected_help = sampled_gain.clip(min=0).mean(axis=2)
    expected_harm = (-sampled_gain).clip(min=0).mean(axis=2)
    scores = []
    for teacher_index, teacher in enumerate(report.teachers):
        scoring = _TeacherScoring(
            evidence,
            np.isfinite(evidence.gain[:, teacher_index]),
            np.nan_to_num(evidence.gain[:, teacher_index]),
            ideal_norm,
            expected_help[:, teacher_index],
            expected_harm[:, teacher_index],
        )
        tokens = tokens_of_report(report, teacher_index)
        for name, rule in (RULES if rules is None else rules).items():
            token_share, estimators = scoring.score(_scaled_weights(rule, tokens), _weights(everything, tokens))
            estimates = {figure: jackknife(estimator, confidence) for figure, estimator in estimators.items()}
            scores.append(RuleScore(name, teacher, token_share, **estimates))
    return scores


@dataclass(frozen=True)
class _TeacherScoring:
    """One teacher's nodes ``(N,)``, on which rules are scored.

    Attributes:
        evidence: Of all nodes.
        defined: Whether the gain is defined at the node.
        gain: The estimated predicted gain, 0 where it is not defined.
        ideal_norm: Expected norm of the ideal gradient.
        expected_help: Expected positive part of the gain.
        expected_harm: Expected negative part of the gain, as a positive number.
    """

    evidence: Evidence
    defined: NDArray[np.bool_]
    gain: Floats
    ideal_norm: Floats
    expected_help: Floats
    expected_harm: Floats

    def score(self, weights: Floats, plain_weights: Floats) -> tuple[float, dict[str, Estimator]]:
        """Return the share of tokens that have a weight, and the estimators of a score's figures.

        Args:
            weights: The rule's weights ``(N,)``.
            plain_weights: The weights without a rule, ``(N,)``.
        """
        gain_per_weight = self._ratio(weights * self.gain, weights)
        estimators = {
            "ideal_gain_kept": self._share(weights, self.ideal_norm),
            "help_kept": self._share(weights, self.expected_help),
            "harm_removed": self._share(weights, self.expected_harm, complement=True),
            "predicted_gain": gain_per_weight,
            "gained": gain_per_weight - self._ratio(plain_weights * self.gain, plain_weights),
        }
        has_weight, token_weight = weights[self.defined] > 0, self.evidence.token_weight[self.defined]
        token_share = float(np.average(has_weight, weights=token_weight)) if self.defined.any() else float("nan")
        return token_share, estimators

    def _share(self, weights: Floats, values: Floats, complement: bool = False) -> Estimator:
        return replace(self._ratio(weights * values, values, complement), bounds=(0.0, 1.0))

    def _ratio(self, numerator: Floats, denominator: Floats, complement: bool = False) -> Estimator:
        """The token-weighted sum of ``numerator`` divided by that of ``denominator``, or 1 minus the ratio."""
        question_count = int(self.evidence.question.max(initial=-1)) + 1
        question, token_weight = self.evidence.question[self.defined], self.evidence.token_weight[self.defined]
        question_sums = np.stack(
            [
                np.bincount(question, token_weight * terms[self.defined], minlength=question_count)
                for terms in (numerator, denominator)
            ],
            axis=1,
        )

        def ratio(question_weights: Floats) -> Floats:
            total = question_weights @ question_sums
            value: Floats = total[..., 0] / total[..., 1]
            return 1 - value if complement else value

        informative = (self.evidence.ideal_norm[self.defined] > 0).any() or not self.defined.any()
        used = self.defined & (denominator > 0)
        return Estimator(
            ratio,
            questions_of(self.evidence, used),
            int(used.sum()),
            withheld="" if informative else "no difference",
        )


def _weights(rule: Gate, tokens: Tokens) -> Floats:
    weights: Floats = checked_weights(rule, tokens).double().numpy()
    return weights


def _scaled_weights(rule: Gate, tokens: Tokens) -> Floats:
    """A rule's weights, scaled so that the largest is 1."""
    weights = _weights(rule, tokens)
    return weights / weights.max() if weights.size and weights.max() > 0 else weights


def tokens_of_report(report: ProbeReport, teacher_index: int = 0) -> Tokens:
    """Return a probe's nodes as the tokens that a gate sees, all of them with the same teacher.

    Args:
        report: The report.
        teacher_index: Index of the teacher.
    """
    nodes, rollouts = report.nodes, report.rollouts
    correct_by_question: dict[str, list[bool]] = {}
    for rollout in rollouts:
        correct_by_question.setdefault(rollout.question, []).append(rollout.correct)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def predictor(name: str) -> torch.Tensor:
        return column([float(node.predictors[name][teacher_index]) for node in nodes])

    teacher_probabilities = [float(node.teacher_probability[teacher_index, node.taken]) for node in nodes]
    rollout_index = [node.rollout for node in nodes]
    return Tokens(
        rollout=torch.tensor(rollout_index, dtype=torch.long),
        depth=torch.tensor([node.depth for node in nodes], dtype=torch.long),
        length=torch.tensor([len(rollouts[index].pieces) for index in rollout_index], dtype=torch.long),
        reward=column([rollouts[index].reward for index in rollout_index]),
        correct=torch.tensor([node.correct for node in nodes], dtype=torch.bool),
        pass_rate=column([float(np.mean(correct_by_question[node.question])) for node in nodes]),
        student_entropy=predictor("student_entropy"),
        teacher_entropy=predictor("teacher_entropy"),
        student_log_prob=column([float(node.probability[node.taken]) for node in nodes]).log(),
        teacher_log_prob=column(teacher_probabilities).log(),
        reverse_kl=predictor("reverse_kl"),
        teacher=torch.full((len(nodes),), teacher_index, dtype=torch.long),
        teachers=report.teachers,
        weight=column([1 / node.inclusion for node in nodes]),
    )
