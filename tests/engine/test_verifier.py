import signal
import threading
import time

import pytest
import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.verifier import BATCH_SIZE, RewardTimeoutError, Verifier

QUESTION = Question("0", {"prompt": "a", "answer": "1"}, torch.tensor([1]))


def score_arguments(texts):
    return [QUESTION] * len(texts), texts, [[i] for i in range(len(texts))]


def exact(prompts, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def score_one_by_one(verifier, texts):
    scoring = verifier.open()
    for i, text in enumerate(texts):
        scoring.add(i, QUESTION, text, [i])
    return scoring.rewards()


def verifier_after_trial(reward, texts=("1", "2"), **options):
    verifier = Verifier(reward, **options)
    verifier.try_thread(verifier.score(*score_arguments(list(texts))), *score_arguments(list(texts)))
    return verifier


class Recording:
    def __init__(self, reward=exact):
        self.reward, self.calls = reward, []

    def __call__(self, prompts, completions, answer):
        self.calls.append((threading.current_thread() is threading.main_thread(), len(completions)))
        return self.reward(prompts, completions, answer)


@pytest.mark.parametrize("count", [0, 1, BATCH_SIZE, 2 * BATCH_SIZE + 5])
@pytest.mark.parametrize("thread", [False, True])
def test_rewards_are_those_of_one_call(count, thread):
    reward = Recording()
    verifier = verifier_after_trial(reward) if thread else Verifier(reward)
    texts = [str(i % 3) for i in range(count)]
    assert score_one_by_one(verifier, texts) == dict(enumerate(exact(None, texts, ["1"] * count)))
    assert bool(verifier.threaded) == thread
    calls = reward.calls[2:] if thread else reward.calls
    assert sum(n for _, n in calls) == count
    assert all(main != thread and n <= BATCH_SIZE for main, n in calls)
    verifier.close()


def test_it_scores_while_others_are_submitted():
    entered, allowed = threading.Event(), threading.Event()

    def slow(prompts, completions, answer):
        if threading.current_thread() is not threading.main_thread() and len(completions) == BATCH_SIZE:
            entered.set()
            assert allowed.wait(5)
        return exact(prompts, completions, answer)

    verifier = verifier_after_trial(slow)
    scoring = verifier.open()
    for i in range(BATCH_SIZE):
        scoring.add(i, QUESTION, "1", [i])
    assert entered.wait(5), "a full batch must not wait for the others"
    scoring.add(BATCH_SIZE, QUESTION, "2", [0])
    allowed.set()
    assert scoring.rewards() == {**dict.fromkeys(range(BATCH_SIZE), 1.0), BATCH_SIZE: 0.0}
    verifier.close()


def by_signal(prompts, completions, answer):
    """As verifiers do that limit their own time by an alarm: elsewhere they fail, and call that a wrong answer."""
    try:
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
    except ValueError:
        return [0.0] * len(completions)
    return exact(prompts, completions, answer)


def never_twice(prompts, completions, answer):
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("not here")
    return exact(prompts, completions, answer)


@pytest.mark.parametrize("reward", [by_signal, never_twice])
def test_a_verifier_that_fails_elsewhere_stays_in_the_main_thread(reward):
    verifier = verifier_after_trial(reward)
    with pytest.warns(UserWarning, match="outside the main thread"):
        assert score_one_by_one(verifier, ["1", "2"] * 50)[0] == 1.0
    assert verifier.threaded is False
    assert score_one_by_one(verifier, ["1"]) == {0: 1.0}
    verifier.close()


def test_rewards_that_are_all_alike_prove_nothing():
    verifier = verifier_after_trial(by_signal, texts=("2", "3"))
    assert verifier.threaded is None
    assert score_one_by_one(verifier, ["1", "2"]) == {0: 1.0, 1: 0.0}


@pytest.mark.parametrize("thread", [False, True])
def test_a_call_that_takes_too_long_is_ended(thread):
    release = threading.Event()

    def hangs(prompts, completions, answer):
        if len(completions) > 2:
            release.wait(10)
        return exact(prompts, completions, answer)

    verifier = verifier_after_trial(hangs, timeout=0.2) if thread else Verifier(hangs, timeout=0.2)
    handler = signal.getsignal(signal.SIGALRM)
    start = time.perf_counter()
    with pytest.raises(RewardTimeoutError, match=r"longer than 0.2 s for 3 completions.*`reward_timeout`"):
        score_one_by_one(verifier, ["1"] * 3)
    assert time.perf_counter() - start < 5
    release.set()
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert score_one_by_one(verifier, ["1"]) == {0: 1.0}
    verifier.close()


def test_an_error_is_the_verifiers_own():
    def fails(prompts, completions, answer):
        if "!" in completions:
            raise KeyError("level")
        return exact(prompts, completions, answer)

    for verifier in (verifier_after_trial(fails), Verifier(fails)):
        with pytest.raises(KeyError, match="level"):
            score_one_by_one(verifier, ["!"])
        verifier.close()


def test_no_thread_is_left():
    verifier = verifier_after_trial(exact)
    score_one_by_one(verifier, ["1"])
    verifier.close()
    for thread in threading.enumerate():
        if thread.name == "odp-verifier":
            thread.join(5)
            assert not thread.is_alive()


def test_a_limit_is_not_taken_for_a_wrong_answer():
    """A verifier that catches every exception and calls it wrong must not catch the end of its time."""

    def careful(prompts, completions, answer):
        try:
            time.sleep(1)
        except Exception:
            return [0.0] * len(completions)
        return [1.0] * len(completions)

    with pytest.raises(RewardTimeoutError):
        score_one_by_one(Verifier(careful, timeout=0.1), ["1"])
