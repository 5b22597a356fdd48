"""What rules would have done at the nodes of a probe, by the success of their branches."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import questions_of
from odp_callbacks.analysis.evidence import Evidence, gather, norm
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.gates.loss import checked_weights
from odp_callbacks.gates.protocols import Gate
from odp_callbacks.gates.rules import everything
from odp_callbacks.records import Floats, ProbeReport

NODE_FIGURES = ("ideal_gain_kept", "help_kept", "harm_removed", "predicted_gain", "gained")


class NodeScoring:
    """Scores rules on the nodes of a report.

    Args:
        report: A probe's report, with nodes.
    """

    def __init__(self, report: ProbeReport) -> None:
        self.report = report
        evidence = gather(report.nodes, teachers=len(report.teachers))
        sampled_success = fit_success_model(evidence).draw(evidence)  # (N, S, A)
        sampled_offset = sampled_success - sampled_success[:, :, :1]
        # Nodes with gradients stand for those without.
        gradient_weight = np.nan_to_num(evidence.gradient_weight)  # nothing is known of nodes whose gradients failed
        ideal_norm = norm(evidence.norm_form, sampled_offset).mean(axis=1) * gradient_weight
        sampled_gain = np.einsum("nka,nsa->nks", np.nan_to_num(evidence.gain_form), sampled_offset)  # (N, K, S)
        expected_help = sampled_gain.clip(min=0).mean(axis=2) * gradient_weight[:, None]
        expected_harm = (-sampled_gain).clip(min=0).mean(axis=2) * gradient_weight[:, None]
        self._by_teacher = [
            _TeacherScoring(
                evidence,
                np.isfinite(evidence.weighted_gain[:, index]),
                np.nan_to_num(evidence.weighted_gain[:, index]),
                ideal_norm,
                expected_help[:, index],
                expected_harm[:, index],
            )
            for index in range(len(report.teachers))
        ]
        self._tokens = [tokens_of_report(report, index) for index in range(len(report.teachers))]

    def figures(self, rule: Gate, teacher: int, confidence: float) -> tuple[float, dict[str, Estimate]]:
        """Return the share of tokens that have a weight, and a rule's figures by their names, :data:`NODE_FIGURES`.

        Args:
            rule: The rule.
            teacher: Index of the teacher.
            confidence: Level of the intervals.
        """
        tokens = self._tokens[teacher]
        weights, plain_weights = _scaled_weights(rule, tokens), _weights(everything, tokens)
        token_share, estimators = self._by_teacher[teacher].score(weights, plain_weights)
        return token_share, {figure: jackknife(estimator, confidence) for figure, estimator in estimators.items()}


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

        informative = self.evidence.differs[self.defined].any() or not self.defined.any()
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
