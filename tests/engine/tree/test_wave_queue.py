"""When the waves are planned, and what becomes of those that a deadline interrupts."""

import threading
from typing import Any, cast

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.backends import prefill_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.budget import ContinuationBudget
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.continuations import ContinuationCost, ContinuationSampler
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.engine.tree.wave_queue import WaveQueue
from odp_callbacks.engine.tree.waves import Wave
from odp_callbacks.engine.verifier import Verifier
from tests.helpers.continuations import sample_waves
from tests.helpers.worlds import make_world

WORLD = make_world(horizon=6)
QUESTION = as_questions([WORLD.row], WORLD.tokenizer)[0]
ROLLOUT = Rollout(QUESTION, (1, 2, 3, 1, 2, 0), "", False, reward=0.25)


def new_sampler(seed: int = 0, reward: Any = WORLD.reward, batch_size: int = 64) -> ContinuationSampler:
    """One node at the root with a branch for each token but the last, which ends the response."""
    tree = ContinuationTree([ROLLOUT], [Node(0, 0, 1.0)])
    tree.set_branches([[Branch(token, 0.25, 0.25, False) for token in range(1, 5)]])
    return ContinuationSampler(
        WORLD.model,
        WORLD.tokenizer,
        Verifier(reward),
        prefill_rollouts(WORLD.model, [ROLLOUT.sequence[:-1]]),
        tree,
        ProbeConfig(max_new_tokens=WORLD.horizon, batch_size=batch_size),
        (0,),
        Randomness(seed),
    )


def plan_waves(sampler: ContinuationSampler, count: int, of_each: int = 5) -> list[Any]:
    return [sampler.plan([[of_each] * 4], [3.0]) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_plan_sees_all_waves_but_the_one_that_runs(batch_size: int) -> None:
    """The first two waves are known; each of the next ones is planned from all but the last."""
    sampler = new_sampler(batch_size=batch_size)
    seen: list[tuple[int, int]] = []

    def plan_next(outstanding: Any) -> list[Any]:
        known = sum(len(outcome.rewards) for outcome in sampler.tree.outcomes[0])
        seen.append((known, len(outstanding)))
        return [sampler.plan([[len(seen)] * 4], [3.0])] if len(seen) < 5 else []

    sample_waves(sampler, plan_waves(sampler, 2), plan_next)
    assert seen == [(20, 1), (40, 1), (44, 1), (52, 1), (64, 1)]
    assert sum(len(outcome.rewards) for outcome in sampler.tree.outcomes[0]) == 40 + 4 + 8 + 12 + 16


def test_sampling_goes_on_while_the_verifier_thinks() -> None:
    """The rewards of the first wave come late; the second wave is sampled meanwhile, and the third one waits."""
    release = threading.Event()
    calls: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        if threading.current_thread() is not threading.main_thread():
            calls.append("thread")
            assert release.wait(20)
        return WORLD.reward(prompts, completions)

    sampler = new_sampler(reward=reward, batch_size=4)
    sampler.verifier.threaded = True
    finished: list[int] = []
    plans: list[int] = []

    def plan_next(outstanding: Any) -> list[Any]:
        plans.append(sum(finished))
        return []

    waves = plan_waves(sampler, 2)
    finish = ContinuationSampler.finish

    def counted(self: Any, wave: Any, index: int, continuation: Any) -> None:
        finished.append(1)
        if len(finished) == 40:
            release.set()
        finish(self, wave, index, continuation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuationSampler, "finish", counted)
        sample_waves(sampler, waves, plan_next)
    sampler.verifier.close()
    assert plans == [40]
    assert calls


class _Steps:
    """A clock that counts how often it was read."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1.0
        return self.time


class _Drawn:
    """A sampler whose continuations are random lengths, and whose outcomes are these lengths."""

    def __init__(self) -> None:
        self.tree, self.config, self.journal = new_sampler().tree, ProbeConfig(max_new_tokens=31), None
        self.cost = ContinuationCost()
        self.counted: list[int] = []

    def finish(self, wave: Wave, index: int, continuation: Continuation) -> None:
        wave.finish(index, continuation)

    def add_outcomes(self, wave: Wave) -> None:
        self.counted += [len(wave.continuations[index].tokens) for index in range(wave.counted)]


def run_until(seed: int, slots: int, steps: int) -> tuple[list[int], list[int]]:
    """Sample waves of four until a deadline; return the lengths that count, and those that have finished."""
    generator, sampler = np.random.default_rng(seed), _Drawn()
    request = ContinuationRequest(0, 1, 2, 30)
    scoring = new_verifier().open()
    waves = [
        Wave(scoring, frozenset({0}), requests=[request] * 4, keys=[0] * 4, expected_lengths=[9.0] * 4)
        for _ in range(200)
    ]
    queue = WaveQueue(
        cast(Any, sampler), ContinuationBudget(sampler.config, sampler.cost, generator), waves, None, ignore
    )
    running: dict[int, tuple[int, int]] = {}
    finished: list[int] = []
    for step in range(steps):
        while len(running) < slots and (numbered := queue.next_request()) is not None:
            running[numbered.number] = (step, min(30, int(generator.geometric(0.1))))
            queue.start([numbered.number], step)
        ended = {number: length for number, (start, length) in running.items() if start + length == step + 1}
        finished += ended.values()
        for number in ended:
            del running[number]
        queue.receive({number: Continuation((1,) * length, False) for number, length in ended.items()}, step + 1)
    queue.receive({number: Continuation((), True, True) for number in running}, steps)
    queue.finish()
    return sampler.counted, finished


def ignore(done: int, total: int) -> None:
    """Report no progress."""


def new_verifier() -> Verifier:
    return Verifier(lambda prompts, completions: [0.0] * len(prompts))


@pytest.mark.parametrize("slots", [2, 24])
def test_what_a_deadline_interrupts_biases_nothing(slots: int) -> None:
    """The continuations that have finished by then are too short on average, and so are waves that are complete."""
    lengths = np.minimum(30, np.random.default_rng(0).geometric(0.1, 200_000))
    counted: list[float] = []
    finished: list[float] = []
    for seed in range(60):
        some, all_finished = run_until(seed, slots, 90)
        counted, finished = counted + some, finished + all_finished
    assert 400 < len(counted) < len(finished)
    assert stats.ttest_ind(counted, lengths).pvalue > 1e-3
    assert stats.ttest_ind(finished, lengths).pvalue < 1e-3, "the case must be one where the finished ones are biased"


def test_a_wave_that_does_not_fit_in_the_time_is_not_started() -> None:
    sampler = new_sampler(batch_size=4)
    clock = _Steps()
    waves = [*plan_waves(sampler, 1, of_each=1), *plan_waves(sampler, 1, of_each=500)]
    queue = sample_waves(sampler, waves, deadline=Deadline(2000.0, clock=clock))
    assert [wave.dropped for wave in queue.waves] == [False, True]
    assert clock.time < 200
    assert sampler.cost.is_cut
    assert sampler.cost.continuations == 4


def test_without_a_deadline_nothing_is_cut() -> None:
    sampler = new_sampler()
    sample_waves(sampler, plan_waves(sampler, 3))
    assert not sampler.cost.is_cut
    assert sampler.cost.cut == 0
    assert 0 < sampler.cost.slot_use.occupied == sampler.cost.tokens <= sampler.cost.slot_use.available
