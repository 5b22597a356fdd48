"""The queue of a stream's waves: gives their requests, receives the continuations, and asks for the next wave in time.

Outcomes are added to the tree in the order of the waves, each wave as a whole, and the plan of a wave sees a fixed
number of waves. This makes the plan independent of the order in which continuations finish.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from odp_callbacks.engine.sampling.request_source import NumberedRequest
from odp_callbacks.engine.sampling.requests import Continuation
from odp_callbacks.engine.timing import GrowingProgress
from odp_callbacks.engine.tree.budget import ContinuationBudget
from odp_callbacks.engine.tree.continuations import ContinuationSampler
from odp_callbacks.engine.tree.waves import Wave

WavePlanner = Callable[[Sequence[Wave]], list[Wave]]
"""From the waves whose outcomes are not in the tree yet to the next waves; none ends the stream."""


class WaveQueue:
    """A source of requests (:class:`~odp_callbacks.engine.sampling.request_source.RequestSource`).

    Args:
        sampler: Scores the continuations.
        budget: Is told what has been sampled.
        waves: The waves that are known in advance.
        plan_next: Plans the next waves; None if there are no others.
        progress: Called with the number of finished continuations, and how many there will be.

    Attributes:
        waves: All waves so far.
        known: Number of waves, from the first one, whose outcomes are in the tree.
    """

    def __init__(
        self,
        sampler: ContinuationSampler,
        budget: ContinuationBudget,
        waves: list[Wave],
        plan_next: WavePlanner | None,
        progress: GrowingProgress,
    ) -> None:
        self.sampler, self.budget, self.plan_next, self.progress = sampler, budget, plan_next, progress
        self.waves = list(waves)
        tree = sampler.tree
        nodes = [tree.nodes[first_node] for first_node in tree.first_nodes]
        longest_prompt = max(len(tree.rollouts[node.rollout].question.prompt_ids) for node in nodes)
        self.max_new_tokens = max(1, sampler.config.max_new_tokens - 1 - min(node.depth for node in nodes))
        self.max_tokens = longest_prompt + sampler.config.max_new_tokens
        self.known = 0
        # One continuation of every branch of half of the questions is enough for a first plan.
        self._needed = (len(waves) + 1) // 2
        self._place = 0
        self._given: list[tuple[Wave, int]] = []
        self._finished_count = self._running = 0
        self._known_tokens = 0.0
        self._step, self._is_cut = 0, False

    def next_request(self) -> NumberedRequest | None:
        """Return the next request of the first wave that has one, or plan further; None while outcomes are missing."""
        while True:
            while self._place < len(self.waves):
                wave = self.waves[self._place]
                if wave.started == 0 and not wave.dropped and not self._has_time():
                    self._end()
                    return None
                while (index := wave.start_next(self._tokens_before(self._place))) is not None:
                    stored = self._stored(wave.keys[index])
                    if stored is None:
                        self._given.append((wave, index))
                        self._running += 1
                        return NumberedRequest(len(self._given) - 1, wave.requests[index], wave.keys[index])
                    self.budget.stored_tokens += len(stored.tokens)
                    self._finish(wave, index, stored)
                if not wave.dropped and not self._has_given_all(self._place):
                    return None  # whether the rest belongs to this wave depends on what runs
                self._place += 1
            if not self._plan():
                return None

    def is_exhausted(self) -> bool:
        """Whether there will be no other request; asked while nothing runs."""
        return self.plan_next is None

    def start(self, numbers: Sequence[int], step: int) -> None:
        """Note when the requests of a wave start."""
        for number in numbers:
            wave, _ = self._given[number]
            wave.last_start = max(wave.last_start, step)

    def receive(self, continuations: Mapping[int, Continuation], step: int) -> None:
        """Keep continuations that have finished, write them to the journal, and submit them to the verifier."""
        finished = {number: one for number, one in continuations.items() if not one.unfinished}
        if self.sampler.journal is not None:
            places = {number: self._given[number] for number in finished}
            self.sampler.journal.write({wave.keys[index]: finished[number] for number, (wave, index) in places.items()})
        for number, continuation in finished.items():
            self.budget.sampled_tokens += len(continuation.tokens)
            self.budget.sampled += 1
            self._finish(*self._given[number], continuation)
        self._step, self._is_cut = step, self._is_cut or len(finished) < len(continuations)
        self._running -= len(continuations)
        self.budget.running = self._running
        self.progress(self._finished_count, max(self._planned_count(), self.budget.planned_continuations()))

    def wait(self) -> None:
        """Wait for the rewards that the next plan needs."""
        self._learn()

    def finish(self) -> None:
        """Add the outcomes of all complete waves to the tree.

        After a deadline, waves that started too late for their longest possible continuation are left out, whether
        they are complete or not.
        """
        while self.known < len(self.waves):
            wave = self.waves[self.known]
            is_late = self._is_cut and wave.certain_step > self._step
            if wave.dropped or is_late or not wave.is_sampled(self._known_tokens):
                wave.dropped = True
                self.sampler.cost.is_cut = True
                self.sampler.cost.cut += wave.started
                self.known += 1
            else:
                self._learn()
        useless = (wave.continuations.get(index) for wave, index in self._given if not wave.counts(index))
        self.sampler.cost.slot_use.occupied -= sum(len(one.tokens) for one in useless if one is not None)

    def _plan(self) -> bool:
        """Plan the next waves if the outcomes that they depend on are there, and say whether there are new ones."""
        if self.plan_next is None:
            return False
        while self.known < self._needed:
            wave = self.waves[self.known]
            # With a deadline, what is known must be sure to count then.
            is_sure = self.budget.has_time_for_steps(wave.certain_step - self._step, self._step)
            if not wave.is_sampled(self._known_tokens) or not is_sure:
                return False
            wave.scoring.start()
            if not wave.scoring.is_ready():
                return False
            self._learn()
        # The next plan will see all waves up to the last one but those which are planned now.
        self._needed = len(self.waves)
        waves = self.plan_next(self.waves[self.known :])
        if not waves or waves[-1].is_last:
            self.plan_next = None
        self.waves += waves
        return bool(waves)

    def _has_given_all(self, place: int) -> bool:
        """Whether a wave will have no other request, or none that belongs to it."""
        wave = self.waves[place]
        return wave.started == len(wave.requests) or (
            all(len(one.continuations) == one.started for one in self.waves[: place + 1])
        )

    def _learn(self) -> None:
        """Add the outcomes of the next wave to the tree."""
        wave = self.waves[self.known]
        wave.close(self._known_tokens)
        self.sampler.add_outcomes(wave)
        # Behind a wave that its limit has cut, nothing belongs to the stream.
        self._known_tokens += wave.counted_tokens if wave.counted == len(wave.requests) else math.inf
        self.known += 1

    def _finish(self, wave: Wave, index: int, continuation: Continuation) -> None:
        self.sampler.finish(wave, index, continuation)
        self._finished_count += 1

    def _stored(self, key: int) -> Continuation | None:
        journal = self.sampler.journal
        return None if journal is None else journal.continuations.get(key)

    def _tokens_before(self, place: int) -> float:
        """Tokens of the waves before a place, as far as known or else expected."""
        return sum(wave.started_tokens for wave in self.waves[:place] if not wave.dropped)

    def _planned_count(self) -> int:
        return sum(wave.started if wave.is_last else len(wave.requests) for wave in self.waves)

    def _has_time(self) -> bool:
        """Whether the wave that would start next can end before the deadline, together with what runs."""
        if self._place == 0 or not self.budget.deadline.is_finite:
            return True
        wave = self.waves[self._place]
        tokens = min(wave.planned_tokens, wave.token_limit - self._tokens_before(self._place))
        return self.budget.has_time_for(tokens)

    def _end(self) -> None:
        """Start no other wave."""
        for wave in self.waves[self._place :]:
            wave.dropped = True
        self.plan_next = None
