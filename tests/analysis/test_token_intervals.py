"""Intervals of single tokens' alignments, where the truth is known."""

from collections.abc import Callable

import numpy as np
import pytest

from odp_callbacks.analysis.evidence import Evidence, gather, norm
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.analysis.token_intervals import alignment_intervals
from odp_callbacks.records import Floats
from tests.helpers.records import MakeReport, split, synthetic

Draw = Callable[[np.random.Generator], Floats]


def _lead(rng: np.random.Generator) -> Floats:
    return np.concatenate([rng.beta(4, 1.5, 1), rng.beta(1, 4, 3)])


def _alike(rng: np.random.Generator) -> Floats:
    return np.clip(rng.uniform(0.1, 0.9) + 0.05 * rng.normal(size=4), 0.01, 0.99)


WORLDS: dict[str, Draw] = {"spread": lambda rng: rng.beta(1.6, 2.4, 4), "lead": _lead, "alike": _alike}


def drawn(world: Draw, count: int, nodes: int) -> tuple[Evidence, Floats]:
    """Nodes whose branches' successes are drawn, and their true alignments."""
    rng = np.random.default_rng(3)
    truth = np.stack([world(rng) for _ in range(nodes)])
    evidence = gather(
        [
            synthetic(wins / count, count=count, total_square=wins.astype(float), seed=i, question=str(i)).record
            for i, wins in enumerate(rng.binomial(count, truth))
        ]
    )
    offset = truth - truth[:, :1]
    length = norm(evidence.norm_form, offset)[:, None]
    return evidence, np.einsum("nka,na->nk", evidence.gain_form, offset) / length


@pytest.mark.parametrize("count", [4, 32])
@pytest.mark.parametrize("world", list(WORLDS))
def test_the_truth_lies_inside_and_sure_tokens_are_right(world: str, count: int) -> None:
    evidence, true = drawn(WORLDS[world], count, 2000)
    low, high = alignment_intervals(evidence)
    inside = ((low <= true) & (true <= high)).mean()
    # Of 4,000 intervals, two of each node; the model of success is fitted, so a little less than 95 % is fair.
    assert 0.92 < inside < 0.98
    sure = (low > 0) | (high < 0)
    wrong = sure & (np.sign(low + high) != np.sign(true))
    assert wrong.sum() <= 0.03 * sure.sum() + 3
    if world == "lead":
        assert sure.mean() > (0.2 if count == 4 else 0.7), "where one token is clearly right"
    plain = (np.sign(evidence.cosine) != np.sign(true))[np.isfinite(evidence.cosine)].mean()
    assert plain > 5 * wrong.sum() / max(sure.sum(), 1), "the sign of every token is not worth as much"


def test_more_continuations_make_it_narrower_and_knowledge_makes_it_a_point() -> None:
    widths = []
    for count in (2, 8, 32):
        evidence, _ = drawn(WORLDS["spread"], count, 300)
        low, high = alignment_intervals(evidence)
        widths.append((high - low).mean())
    assert widths[0] > 1.2 * widths[1] > 1.5 * widths[2]
    known = gather([synthetic((0.25, 0.75, 0.5), exact=True).record])
    low, high = alignment_intervals(known)
    np.testing.assert_allclose(low, known.cosine, atol=1e-12)
    np.testing.assert_array_equal(low, high)


def test_only_a_token_s_own_rewards_make_it_sure() -> None:
    """Elsewhere the first token always wins; here two continuations against two say little, and so it is shown."""
    clear = [
        synthetic((1.0, 0.0, 0.0), count=8, total_square=[8.0, 0, 0], seed=i, question=str(i)).record for i in range(60)
    ]
    doubtful = synthetic((0.5, 0.0, 0.0), count=2, total_square=[1.0, 0, 0], seed=99, question="last").record
    low, high = alignment_intervals(gather([*clear, doubtful]))
    sure = (low > 0) | (high < 0)
    assert sure[:-1].mean() > 0.8
    assert not sure[-1].any()


def test_a_token_without_an_alignment_has_no_interval(make_report: MakeReport) -> None:
    report = make_report(split)
    analysis = Analysis(report)
    low, high = analysis.token_intervals()
    assert np.isfinite(low).all()
    assert (low <= high).all()
    flat = make_report(split, success=(0.5, 0.5))
    assert np.isnan(Analysis(flat).token_intervals()[0]).all()
    assert not Analysis(flat).sure().any()
