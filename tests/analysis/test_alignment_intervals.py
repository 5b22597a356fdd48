"""Intervals of single tokens' alignments, where the truth is known."""

from collections.abc import Callable

import numpy as np
import pytest

from odp_callbacks.analysis.alignment_intervals import alignment_intervals
from odp_callbacks.analysis.evidence import Evidence, gather, norm
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import Floats
from tests.helpers.records import MakeReport, split, synthetic

DrawSuccesses = Callable[[np.random.Generator], Floats]


def first_branch_leads(generator: np.random.Generator) -> Floats:
    return np.concatenate([generator.beta(4, 1.5, 1), generator.beta(1, 4, 3)])


def branches_alike(generator: np.random.Generator) -> Floats:
    return np.clip(generator.uniform(0.1, 0.9) + 0.05 * generator.normal(size=4), 0.01, 0.99)


WORLDS: dict[str, DrawSuccesses] = {
    "spread": lambda generator: generator.beta(1.6, 2.4, 4),
    "lead": first_branch_leads,
    "alike": branches_alike,
}


def measure(world: DrawSuccesses, count: int, node_count: int) -> tuple[Evidence, Floats]:
    """Evidence of ``count`` continuations of each branch, and the true alignments of the nodes."""
    generator = np.random.default_rng(3)
    true_successes = np.stack([world(generator) for _ in range(node_count)])
    evidence = gather(
        [
            synthetic(
                wins / count, count=count, total_square=wins.astype(float), seed=index, question=str(index)
            ).record
            for index, wins in enumerate(generator.binomial(count, true_successes))
        ]
    )
    offset = true_successes - true_successes[:, :1]
    true_norm = norm(evidence.norm_form, offset)[:, None]
    return evidence, np.einsum("nka,na->nk", evidence.gain_form, offset) / true_norm


@pytest.mark.parametrize("count", [4, 32])
@pytest.mark.parametrize("world", list(WORLDS))
def test_intervals_cover_and_significant_tokens_are_right(world: str, count: int) -> None:
    evidence, true_alignment = measure(WORLDS[world], count, 2000)
    low, high = alignment_intervals(evidence)
    coverage = ((low <= true_alignment) & (true_alignment <= high)).mean()
    # Of 4,000 intervals, two of each node. The success model is fitted, so a little less than 95 % is expected.
    assert 0.92 < coverage < 0.98
    significant = (low > 0) | (high < 0)
    wrong_side = significant & (np.sign(low + high) != np.sign(true_alignment))
    assert wrong_side.sum() <= 0.03 * significant.sum() + 3
    if world == "lead":
        assert significant.mean() > (0.2 if count == 4 else 0.7), "one token is clearly right"
    wrong_signs = np.sign(evidence.cosine) != np.sign(true_alignment)
    share_of_wrong_signs = wrong_signs[np.isfinite(evidence.cosine)].mean()
    assert share_of_wrong_signs > 5 * wrong_side.sum() / max(significant.sum(), 1), "signs alone are less reliable"


def test_more_continuations_make_it_narrower_and_knowledge_makes_it_a_point() -> None:
    widths = []
    for count in (2, 8, 32):
        evidence, _ = measure(WORLDS["spread"], count, 300)
        low, high = alignment_intervals(evidence)
        widths.append((high - low).mean())
    assert widths[0] > 1.2 * widths[1] > 1.5 * widths[2]
    known_success = gather([synthetic((0.25, 0.75, 0.5), exact=True).record])
    low, high = alignment_intervals(known_success)
    np.testing.assert_allclose(low, known_success.cosine, atol=1e-12)
    np.testing.assert_array_equal(low, high)


def test_only_a_token_s_own_rewards_make_it_significant() -> None:
    """Elsewhere the first token always wins; at the last node two continuations of each branch say little."""
    clear_nodes = [
        synthetic((1.0, 0.0, 0.0), count=8, total_square=[8.0, 0, 0], seed=index, question=str(index)).record
        for index in range(60)
    ]
    doubtful_node = synthetic((0.5, 0.0, 0.0), count=2, total_square=[1.0, 0, 0], seed=99, question="last").record
    low, high = alignment_intervals(gather([*clear_nodes, doubtful_node]))
    significant = (low > 0) | (high < 0)
    assert significant[:-1].mean() > 0.8
    assert not significant[-1].any()


def test_a_token_without_an_alignment_has_no_interval(make_report: MakeReport) -> None:
    report = make_report(split)
    analysis = Analysis(report)
    low, high = analysis.token_intervals()
    assert np.isfinite(low).all()
    assert (low <= high).all()
    without_difference = make_report(split, success=(0.5, 0.5))
    assert np.isnan(Analysis(without_difference).token_intervals()[0]).all()
    assert not Analysis(without_difference).significant_tokens().any()
