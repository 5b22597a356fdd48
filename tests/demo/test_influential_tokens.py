"""Where the gain of a teacher comes from: shares of kinds of tokens, and single tokens."""

import numpy as np
import pytest

from odp_callbacks.analysis.contributions import report_influence
from odp_callbacks.demo.influential_tokens import influential_tokens, token_kinds
from odp_callbacks.records import ProbeReport
from tests.helpers.records import MakeReport
from tests.helpers.updates import update_only


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    made = make_report(lambda correct, depth: (0.0, 0.0), questions=12)
    return update_only(made, lambda correct: (0.6, -0.5))


def test_kinds_share_the_whole_contribution(report: ProbeReport) -> None:
    influence = report_influence(report)
    assert influence is not None
    pieces = [piece for rollout in report.rollouts for piece in rollout.pieces]
    kinds = token_kinds(report, "near")
    assert sum(kind.contribution for kind in kinds) == pytest.approx(influence.value[:, 0].sum())
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    assert sum(kind.token_share for kind in kinds) == pytest.approx(1)
    letters = np.array([any(character.isalpha() for character in piece) for piece in pieces])
    digits = np.array([any(character.isdigit() for character in piece) for piece in pieces])
    words = [kind for kind in kinds if kind.kind == "words"]
    assert sum(kind.contribution for kind in words) == pytest.approx(influence.value[letters & ~digits, 0].sum())


def test_the_largest_significant_tokens_come_first_with_their_surroundings(report: ProbeReport) -> None:
    influence = report_influence(report)
    assert influence is not None
    tokens = influential_tokens(report, "far", 4)
    assert len(tokens) == 4
    sizes = [abs(token.influence) for token in tokens]
    assert sizes == sorted(sizes, reverse=True)
    assert all(token.low > 0 or token.high < 0 for token in tokens)
    assert sizes[0] == pytest.approx(np.abs(influence.value[influence.significant[:, 1], 1]).max())
    texts = {"".join(rollout.pieces) for rollout in report.rollouts}
    assert all(any(token.before + token.text + token.after in text for text in texts) for token in tokens)


def test_without_influences_there_is_nothing(make_report: MakeReport) -> None:
    made = make_report(lambda correct, depth: (0.0, 0.0))
    report = update_only(made, lambda correct: (0.6, -0.5), influence=False)
    assert token_kinds(report, "near") == influential_tokens(report, "near", 3) == []
