"""Representative paths, windows, ranking, enrichment and difficulty, against their definitions."""

import numpy as np
import pytest

from odp_callbacks.analysis.paper.depth_windows import depth_windows, ranked_depths
from odp_callbacks.analysis.paper.difficulty import difficulty
from odp_callbacks.analysis.paper.enrichment import missing_visits, worth_enriching
from odp_callbacks.analysis.paper.representative_paths import representative_paths


def test_the_windows_are_those_of_the_paper():
    bounds = [(window.start + 1, window.stop) for window in depth_windows(750)]
    assert bounds == [(1, 50), (51, 150), (151, 350), (351, 750)]
    assert depth_windows(0) == []
    assert depth_windows(50) == [range(50)]


def test_ranking_takes_the_largest_of_each_window():
    rng = np.random.default_rng(0)
    gradient_size, difference = rng.random(31), rng.random(31)
    expected = set()
    for first, last in ((0, 4), (4, 12), (12, 28), (28, 31)):
        expected |= set(sorted(range(first, last), key=lambda depth: -gradient_size[depth])[:3])
        expected |= set(sorted(range(first, last), key=lambda depth: -difference[depth])[:1])
    assert ranked_depths(gradient_size, difference, 3, 1, first_window=4) == tuple(sorted(expected))


def test_where_the_teacher_agrees_nothing_is_enriched():
    assert ranked_depths(np.zeros(5), np.zeros(5), 2, 2) == ()


def test_tokens_of_any_teacher_are_enriched():
    student = np.array([[0.9, 0.08, 0.02, 0.0]])
    teachers = np.array([[[0.9, 0.1, 0.0, 0.0]], [[0.5, 0.4, 0.0, 0.1]]])
    assert worth_enriching(student, teachers).tolist() == [[True, True, False, True]]
    assert worth_enriching(student, teachers[:1]).tolist() == [[True, True, False, False]]


def test_visits_are_filled_up():
    assert [missing_visits(visits) for visits in (0, 99, 100, 250)] == [100, 1, 0, 0]


def test_paths_are_the_first_different_ones_of_each_class():
    responses = [(1,), (2,), (1,), (3,), (4,), (2,), (5,)]
    assert representative_paths(responses, [True, False, True, True, True, False, False]) == (0, 3, 1, 6)
    assert representative_paths(responses, [True] * 7, per_class=3) == (0, 1, 3)


@pytest.mark.parametrize(
    ("pass_rate", "expected"),
    [(0.0, None), (0.005, "hard"), (0.249, "hard"), (0.25, "medium"), (0.799, "medium"), (0.8, "easy"), (1.0, "easy")],
)
def test_the_bins_of_difficulty(pass_rate, expected):
    assert difficulty(pass_rate) == expected
