"""Do the intervals of the rank correlations of influence with a predictor hold, where the truth is known?

Tokens have directions in a space of parameters; questions have success gradients with a common mean and noise of their
own. The predictor of a token is its direction times a fixed vector, plus noise. The truth is the rank correlation of
predictor and influence along the mean success gradient, without any noise of measurement. "Questions" is the plain
alternative: each question's tokens are left out in turn, and influences stay as they are.

Run: python benchmarks/predictor_intervals.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sizes import parse_sizes

from odp_callbacks.analysis.contributions import report_influence
from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.records import Floats, ProbeReport, RolloutRecord
from odp_callbacks.update_records import TokenFeatures, TokenInfluence, UpdateRecord, gram_of_rows

PARAMETERS, TOKENS, FOLDS = 20, 10, 4
PREDICTOR_NOISE = 0.5
USUAL = {"measurements": 400, "questions": [8, 24], "noise": [0.5, 2.0, 6.0], "cosine": [0.0, 0.5], "seed": 0}
SMOKE = {"measurements": 3, "questions": [8], "noise": [0.5], "cosine": [0.5]}


@dataclass(frozen=True)
class World:
    """The mean success gradient is the first unit vector; ``cosine`` is that of the predictor's vector with it."""

    cosine: float

    def tokens(self, questions: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Directions ``(N, P)`` and predictors ``(N,)`` of the tokens; those of a question have a part in common."""
        common = 0.5 * rng.normal(size=(questions, 1, PARAMETERS))
        directions = (rng.normal(size=(questions, TOKENS, PARAMETERS)) + common).reshape(-1, PARAMETERS)
        signal = self.cosine * directions[:, 0] + np.sqrt(1 - self.cosine**2) * directions[:, 1]
        return directions, signal + PREDICTOR_NOISE * rng.normal(size=len(directions))

    def truth(self) -> float:
        """The correlation without noise of measurement, from a large sample."""
        directions, predictor = self.tokens(4000, np.random.default_rng(9))
        return float(stats.spearmanr(directions[:, 0], predictor).statistic)

    def measure(self, questions: int, noise: float, rng: np.random.Generator) -> ProbeReport:
        """A measurement of all tokens; the predictor stands in the place of the reverse KL."""
        directions, predictor = self.tokens(questions, rng)
        gradients = np.eye(1, PARAMETERS) + noise * rng.normal(size=(questions, PARAMETERS))
        fold, question = np.arange(questions) % FOLDS, np.repeat(np.arange(questions), TOKENS)
        means = np.stack([gradients[fold == one].mean(axis=0) for one in range(FOLDS)])
        by_fold = (means @ directions.T)[..., None].astype(np.float32)
        by_fold[fold[question], np.arange(len(question))] = np.nan
        zero, column = np.zeros(len(question), np.float32), predictor[:, None].astype(np.float32)
        features = TokenFeatures(question, np.tile(np.arange(TOKENS), questions), zero, zero, column, column, column)
        sums = directions.reshape(questions, TOKENS, PARAMETERS).sum(axis=1)[:, None, None, :]
        gram = gram_of_rows(np.ones(questions), np.full((questions, 1), TOKENS, float), gradients, sums)
        norm = np.array([np.linalg.norm(sums.sum(axis=0))])
        counts = np.bincount(fold).astype(float)
        influence = TokenInfluence(question, features.depth, by_fold, counts, norm, np.ones((len(question), 1), "f4"))
        rollouts = tuple(RolloutRecord(str(i), "", ("t",) * TOKENS, "", 0.0, False, False) for i in range(questions))
        return ProbeReport(
            ("teacher",), (), rollouts, (), {}, 0, 0, {}, updates=(UpdateRecord(gram, influence, features),)
        )


def by_folds(report: ProbeReport) -> Estimate:
    """The library's."""
    return correlations(report, target="influence")["teacher", "reverse_kl"]


def by_questions(report: ProbeReport) -> Estimate:
    """The plain alternative, which takes the influences for known."""
    influence, features = report_influence(report), report.updates[0].features
    assert influence is not None
    assert features is not None
    value, predictor = influence.value[:, 0], features.reverse_kl[:, 0]

    def statistic(weights: Floats) -> Floats:
        kept = [row[features.rollout] > 0 for row in weights.reshape(-1, weights.shape[-1])]
        found = [stats.spearmanr(value[chosen], predictor[chosen]).statistic for chosen in kept]
        return np.array(found).reshape(weights.shape[:-1])

    return jackknife(Estimator(statistic, np.ones(len(report.rollouts), bool), len(value)))


METHODS: dict[str, Callable[[ProbeReport], Estimate]] = {"folds": by_folds, "questions": by_questions}


def main(measurements: int, questions: list[int], noise: list[float], cosine: list[float], seed: int) -> None:
    """Print, for each cell, how often an interval holds the truth and how often it excludes 0."""
    print(f"{measurements} measurements a cell")
    print("truth   noise  questions  method     mean    holds the truth  excludes 0  half-width")
    for one in cosine:
        world, rng = World(one), np.random.default_rng(seed)
        truth = world.truth()
        for size in noise:
            for count in questions:
                reports = [world.measure(count, size, rng) for _ in range(measurements)]
                for name, method in METHODS.items():
                    found = [method(report) for report in reports]
                    holds = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
                    excludes = np.mean([estimate.low > 0 or estimate.high < 0 for estimate in found])
                    mean, half = (np.mean([getattr(e, what) for e in found]) for what in ("value", "half_width"))
                    print(
                        f"{truth:+.2f}   {size:5.1f}  {count:9d}  {name:9s}  {mean:+.2f}   {holds:15.3f}  "
                        f"{excludes:10.3f}  {half:10.2f}"
                    )


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
