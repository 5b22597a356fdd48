"""The router: which teacher each class of tokens gets."""

import pickle

import pytest
import torch

from odp_callbacks.gates import TeacherRouter, tokens_of
from tests.helpers.records import MakeReport
from tests.helpers.updates import update_only

TOKENS = tokens_of(torch.ones(2, 8), [1.0, 0.0], teachers=("near", "far"))
"""A correct and an incorrect rollout of 8 tokens."""


def routes(router: TeacherRouter) -> list[list[int]]:
    return router.route(TOKENS).reshape(2, 8).tolist()


def test_each_class_gets_the_teacher_that_helps_it_most(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.0, figure="predicted_gain")
    assert routes(router) == [[0] * 8] * 2
    router.observe(make_report(lambda correct, depth: (0.8, 0.2) if correct else (0.2, 0.8)))
    assert routes(router) == [[0] * 8, [1] * 8]


def test_it_acts_on_the_difference_of_update_gains_on_the_same_questions(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.0)
    report = make_report(lambda correct, depth: (0.0, 0.0), questions=8)
    router.observe(update_only(report, lambda correct: (0.8, 0.2) if correct else (0.2, 0.8)))
    assert routes(router) == [[0] * 8, [1] * 8]
    router.observe(update_only(report, lambda correct: (0.5, 0.5), seed=1))
    assert routes(router) == [[0] * 8, [1] * 8]  # only as good, so nothing changes


def test_it_keeps_its_teacher_if_the_difference_is_noise_or_the_other_is_only_as_good(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.0, probes=1, figure="predicted_gain")
    router.observe(make_report(lambda correct, depth: (0.3, 0.3)))
    assert routes(router) == [[0] * 8] * 2
    router.observe(make_report(lambda correct, depth: (0.2, 0.7)))
    assert routes(router) == [[1] * 8] * 2
    router.observe(make_report(lambda correct, depth: (0.5, 0.5)))
    assert routes(router) == [[1] * 8] * 2


def test_differences_are_paired_so_that_common_noise_does_not_hide_them(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.0, figure="predicted_gain")
    # Gains scatter by 0.4 from node to node, the same for both; the difference of 0.1 hardly does.
    router.observe(make_report(lambda correct, depth: (0.0, 0.1), noise=0.4))
    assert routes(router) == [[1] * 8] * 2
    assert router.evidence.estimate((True, -1), "far").low < 0


def test_a_window_can_have_another_teacher_than_its_side(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.0, figure="predicted_gain")
    router.observe(make_report(lambda correct, depth: (0.9, 0.1) if depth == 0 else (0.1, 0.9)))
    assert routes(router) == [[0, *[1] * 7]] * 2


def test_it_explores_whole_rollouts_at_the_stated_rate() -> None:
    router = TeacherRouter(explore=0.25, seed=3)
    tokens = tokens_of(torch.ones(4000, 2), [0.0] * 4000, teachers=("a", "b", "c"))
    chosen = router.route(tokens).reshape(4000, 2)
    assert (chosen[:, 0] == chosen[:, 1]).all()
    shares = torch.bincount(chosen[:, 0]) / 4000
    standard_error = (0.25 * 0.75 / 4000) ** 0.5
    assert abs(float(1 - shares[0]) - 0.25) < 3 * standard_error
    assert abs(float(shares[1] - shares[2])) < 3 * (0.25 / 4000) ** 0.5


def test_it_only_routes_unless_it_has_a_floor(make_report: MakeReport) -> None:
    harmful = make_report(lambda correct, depth: (-0.5, -0.8))
    without_floor, with_floor = (
        TeacherRouter(explore=0.0, figure="predicted_gain"),
        TeacherRouter(explore=0.0, floor=0.0, figure="predicted_gain"),
    )
    without_floor.observe(harmful)
    with_floor.observe(harmful)
    assert without_floor(TOKENS).tolist() == [1] * 16
    assert with_floor(TOKENS).tolist() == [0] * 16


def test_it_chooses_among_the_teachers_of_the_training(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.0, figure="predicted_gain")
    tokens = tokens_of(torch.ones(1, 2), [0.0], teachers=("near", "third"))
    router.route(tokens)
    router.observe(make_report(lambda correct, depth: (0.1, 0.9, 0.5), teachers=("near", "far", "third")))
    assert router.route(tokens).tolist() == [1, 1]


def test_a_checkpoint_keeps_choices_and_the_random_stream(make_report: MakeReport) -> None:
    router = TeacherRouter(explore=0.5, figure="predicted_gain")
    router.route(TOKENS)
    router.observe(make_report(lambda correct, depth: (0.1, 0.6)))
    restored = TeacherRouter(explore=0.5, figure="predicted_gain")
    restored.load_state_dict(pickle.loads(pickle.dumps(router.state_dict())))
    assert [routes(restored) for _ in range(5)] == [routes(router) for _ in range(5)]


@pytest.mark.parametrize("explore", [-0.1, 1.0])
def test_an_impossible_rate_is_refused(explore: float) -> None:
    with pytest.raises(ValueError, match="`explore` must lie in"):
        TeacherRouter(explore=explore)
