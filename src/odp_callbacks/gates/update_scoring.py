"""What rules would do to a whole update: their update gain, and what they contribute to the update of all tokens."""

from dataclasses import dataclass, replace

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.rule_figures import (
    RULE,
    WeightedInfluence,
    contribution_share,
    influence_contribution,
    measured_rule,
)
from odp_callbacks.analysis.update_gain import update_contribution, update_gain, withheld_because
from odp_callbacks.engine.update.response_tokens import ResponseRewards, class_weights, response_tokens
from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.gates.loss import checked_weights
from odp_callbacks.gates.protocols import Gate
from odp_callbacks.gates.rules import everything
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.update_records import TokenFeatures

NOT_MEASURED, NO_WEIGHT = "needs `rules=`", "no token has a weight"
"""Why a rule has no update gain: only its contribution follows from the influences of tokens, or it leaves all out."""
UNDECIDED_WHOLE = "whole update undecided"
"""Why a contribution has no share: that of the whole update cannot be told from 0."""
UPDATE_FIGURES = ("update_gain", "update_gained", "contribution", "contribution_share")


def unmeasured(note: str) -> Estimate:
    """A figure that was not measured."""
    return Estimate(np.nan, np.nan, np.nan, 0, 0, note=note)


@dataclass(frozen=True)
class _Weights:
    """Weights of a rule on the tokens of each measurement.

    Attributes:
        of_tokens: For each measurement ``(K, N)``, scaled so that the largest of a teacher is 1.
        scale: ``(K,)``, what they were divided by.
        sums: For each measurement ``(K,)``, sum of the weights before they were scaled.
        by_class: For each teacher, the scaled weights of correct and of incorrect rollouts; None if the rule does not
            weight by correctness alone.
    """

    of_tokens: list[Floats]
    scale: Floats
    sums: list[Floats]
    by_class: list[tuple[float, float] | None]

    def token_share(self, teacher: int) -> float:
        """Share of the tokens that have a weight above 0."""
        return float(np.mean(np.concatenate([weights[teacher] > 0 for weights in self.of_tokens])))


class UpdateScoring:
    """Scores rules on the updates of a report.

    Args:
        report: A probe's report; the features of the tokens of all its updates are known.
    """

    def __init__(self, report: ProbeReport) -> None:
        self.report = report
        self.grams = [update.gram for update in report.updates]
        self.features = [update.features for update in report.updates if update.features is not None]
        rollouts = report.rollouts
        self._rewards = ResponseRewards(
            [len(rollout.pieces) for rollout in rollouts],
            [rollout.reward for rollout in rollouts],
            [rollout.correct for rollout in rollouts],
            [rollout.question for rollout in rollouts],
        )
        self._correct = np.array([rollout.correct for rollout in rollouts], bool)
        self._everything = self.weigh(everything)

    def weigh(self, rule: Gate) -> _Weights:
        """Ask a rule for the weights of all tokens."""
        raw: list[Floats] = []
        for features in self.features:
            tokens = [self.tokens(features, teacher) for teacher in range(len(self.report.teachers))]
            raw.append(np.stack([checked_weights(rule, of_teacher).double().numpy() for of_teacher in tokens]))
        largest = np.max([weights.max(axis=1, initial=0.0) for weights in raw], axis=0)
        scale = np.where(largest > 0, largest, 1.0)
        scaled = [weights / scale[:, None] for weights in raw]
        correct = np.concatenate([self._correct[features.rollout] for features in self.features])
        by_class = [class_weights(row, correct) for row in np.concatenate(scaled, axis=1)]
        return _Weights(scaled, scale, [weights.sum(axis=1) for weights in raw], by_class)

    def tokens(self, features: TokenFeatures, teacher: int) -> Tokens:
        """The tokens of one measurement as a gate sees them."""
        return response_tokens(features, self._rewards, self.report.teachers, teacher)

    def figures(self, name: str, weights: _Weights, teacher: int, confidence: float) -> dict[str, Estimate]:
        """Return the figures of a rule by their names, :data:`UPDATE_FIGURES`.

        Args:
            name: Of the rule.
            weights: Of the rule.
            teacher: Index of the teacher.
            confidence: Level of the intervals.
        """
        gain, of_all = self._gain(name, weights, teacher), update_gain(self.grams, teacher)
        of_rule = self._contribution(name, weights, teacher)
        of_everything = self._contribution(name, self._everything, teacher)
        if not weights.token_share(teacher):
            return dict.fromkeys(UPDATE_FIGURES, unmeasured(NO_WEIGHT))
        figures = dict.fromkeys(UPDATE_FIGURES, unmeasured(NOT_MEASURED))
        if gain is not None:
            figures["update_gain"] = jackknife(gain, confidence)
            figures["update_gained"] = jackknife(gain - of_all, confidence)
        if of_rule is not None and of_everything is not None:
            all_tokens = jackknife(of_everything, confidence)
            decided = all_tokens.low > 0 or all_tokens.high < 0
            share = contribution_share(of_rule, of_everything, all_tokens.note or ("" if decided else UNDECIDED_WHOLE))
            figures["contribution"] = self._with_questions(jackknife(of_rule, confidence))
            figures["contribution_share"] = self._with_questions(jackknife(share, confidence))
        return figures

    def _with_questions(self, estimate: Estimate) -> Estimate:
        """The estimate with the number of questions in place of that of their folds."""
        return replace(estimate, questions=int(sum(gram.questions.sum() for gram in self.grams)))

    def _gain(self, name: str, weights: _Weights, teacher: int) -> Estimator | None:
        """Update gain of a rule; None if its directions were not measured."""
        by_class = weights.by_class[teacher]
        if by_class is not None:
            return update_gain(self.grams, teacher, by_class)
        measured = measured_rule(self.report.updates, name, weights.sums)
        return update_gain(measured, teacher, RULE) if measured else None

    def _contribution(self, name: str, weights: _Weights, teacher: int) -> Estimator | None:
        """Contribution of weighted tokens, from influences if they were measured; None if it is not known."""
        parts = [
            WeightedInfluence(update.influence, of_update[teacher])
            for update, of_update in zip(self.report.updates, weights.of_tokens, strict=True)
            if update.influence is not None
        ]
        if len(parts) == len(self.grams):
            estimator = influence_contribution(parts, teacher)
            return replace(estimator, withheld=withheld_because(self.grams, teacher))
        by_class = weights.by_class[teacher]
        if by_class is not None:
            return update_contribution(self.grams, teacher, by_class)
        measured = measured_rule(self.report.updates, name, weights.sums)
        if not measured:
            return None
        unscaled, scale = update_contribution(measured, teacher, RULE), weights.scale[teacher]
        return replace(unscaled, statistic=lambda chosen: unscaled.statistic(chosen) / scale)
