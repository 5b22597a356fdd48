"""The common limit of rollouts that a deadline left unfinished."""

from odp_callbacks.engine.rollout_cuts import cut_rollouts
from odp_callbacks.engine.sampling.requests import Continuation


def finished(length):
    return Continuation((7,) * (length - 1) + (2,), False)


def unfinished(length):
    return Continuation((7,) * length, True, True)


def test_nothing_is_cut_if_all_have_finished():
    rollouts = [finished(3), finished(9)]
    assert cut_rollouts(rollouts, 2).continuations == rollouts
    assert cut_rollouts(rollouts, 2).limit is None


def test_all_have_the_limit_that_the_unfinished_ones_have_reached():
    cut = cut_rollouts([finished(3), unfinished(5), finished(8), unfinished(6)], 2)
    assert (cut.limit, cut.questions) == (5, 2)
    assert [len(one.tokens) for one in cut.continuations] == [3, 5, 5, 5]
    assert [one.truncated for one in cut.continuations] == [False, True, True, True]
    assert not any(one.unfinished for one in cut.continuations)


def test_questions_that_started_late_are_left_out():
    cut = cut_rollouts([unfinished(50), finished(9), unfinished(40), unfinished(40), unfinished(2), unfinished(0)], 2)
    assert (cut.limit, cut.questions) == (40, 2)


def test_nothing_is_left_if_nothing_was_sampled():
    cut = cut_rollouts([unfinished(0)] * 4, 2)
    assert (cut.continuations, cut.questions) == ([], 0)
