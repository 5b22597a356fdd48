"""Contributions of tokens from folds of questions: against sums over pairs of folds, and how often intervals cover."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from odp_callbacks.analysis.contributions import contributions, report_influence
from odp_callbacks.analysis.fold_contributions import contribution_of_tokens
from odp_callbacks.records import ProbeReport, RolloutRecord
from odp_callbacks.update_records import TokenInfluence, UpdateRecord, gram_of_rows
from tests.helpers.records import MakeReport, split
from tests.helpers.updates import update_only


def simulated(questions: int, folds: int, rng: np.random.Generator, size: int = 8) -> ProbeReport:
    """One token of each question, whose success gradient and direction are correlated, around fixed means."""
    shared, own = rng.normal(size=(2, questions, size))
    success = np.eye(1, size) + shared
    directions = 0.7 * np.eye(1, size) + 0.7 * np.eye(1, size, 1) + 0.5 * (shared + own)
    fold = np.arange(questions) * folds // questions
    by_fold = np.stack([directions @ success[fold == one].mean(axis=0) for one in range(folds)])
    by_fold[fold, np.arange(questions)] = np.nan
    influence = TokenInfluence(
        np.arange(questions),
        np.zeros(questions, np.int64),
        by_fold[..., None].astype(np.float32),
        np.bincount(fold).astype(float),
        np.array([float(questions)]),  # so that the contribution is the mean over questions
        np.ones((questions, 1), np.float32),
    )
    tokens = np.eye(1, 2) * np.ones((questions, 1))
    gram = gram_of_rows(np.ones(questions), tokens, success, directions[:, None, None] * np.eye(2)[0][:, None])
    rollouts = tuple(RolloutRecord(str(i), "p", ("t",), "t", 1.0, True, False) for i in range(questions))
    return ProbeReport(("one",), (), rollouts, (), {}, 0, 0, {}, updates=(UpdateRecord(gram, influence),))


def leaving_out(measured: TokenInfluence, chosen: NDArray[np.bool_], teacher: int, folds: list[int]) -> float:
    """Contribution of the chosen tokens if these folds were all, scaled up to as many questions."""
    own, questions = np.isnan(measured.by_fold[..., teacher]).argmax(axis=0), measured.fold_questions
    total = 0.0
    for token in np.flatnonzero(chosen & np.isin(own, folds)):
        others = [fold for fold in folds if fold != own[token]]
        total += questions[others] @ measured.by_fold[others, token, teacher] / questions[others].sum()
    return float(total * questions.sum() / questions[folds].sum() / measured.direction_norm[teacher])


def test_the_value_is_the_sum_of_the_tokens_and_leaving_out_is_of_gradients_and_tokens(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    influence, measured = report_influence(report), report.updates[0].influence
    assert influence is not None
    assert measured is not None
    chosen = influence.depth == 1
    for teacher, estimate in enumerate(contribution_of_tokens(report, influence.starts, chosen)):
        assert estimate.value == pytest.approx(influence.value[chosen, teacher].sum(), rel=1e-6)
        assert (estimate.questions, estimate.nodes) == (6, 12)
        folds = range(4)
        left_out = np.array(
            [leaving_out(measured, measured.depth == 1, teacher, [f for f in folds if f != one]) for one in folds]
        )
        half_width = 3.182446 * np.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum())
        assert estimate.value == pytest.approx(leaving_out(measured, measured.depth == 1, teacher, [*folds]), rel=1e-6)
        assert estimate.high - estimate.value == pytest.approx(half_width, rel=1e-4)


@pytest.mark.parametrize("questions", [8, 32])
def test_intervals_cover_at_least_as_often_as_they_say(questions: int) -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        report = simulated(questions, 4, rng)
        (estimate,) = contribution_of_tokens(report, np.arange(questions + 1), np.ones(questions, bool))
        covered.append(estimate.low <= 0.7 <= estimate.high)
    assert 0.94 <= np.mean(covered) <= 0.995


def test_with_two_questions_there_is_a_value_and_no_interval() -> None:
    report = simulated(2, 2, np.random.default_rng(0))
    influence = report_influence(report)
    assert influence is not None
    (part,) = contributions(report, influence)
    assert np.isfinite(part.value[0])
    assert np.isnan(part.estimates[0].low)
    assert part.estimates[0].note == "2 questions"


def test_a_measurement_of_one_question_has_no_weight() -> None:
    from odp_callbacks.analysis.summaries import Analysis
    from odp_callbacks.storage import concatenate

    first, single = simulated(6, 6, np.random.default_rng(0)), simulated(1, 1, np.random.default_rng(1))
    single = replace(single, updates=(replace(single.updates[0], influence=None),))
    both = Analysis(concatenate([first, single]))
    assert both.influence is not None
    (part,) = both.depth_contributions
    assert part.value[0] == pytest.approx(np.nansum(both.influence.value))
