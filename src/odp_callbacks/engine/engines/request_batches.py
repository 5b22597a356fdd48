"""Sampling with an engine: whatever a source of requests has at the moment is sent at once."""

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from torch import Tensor

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.request_source import NumberedRequest, RequestSource, SlotUse
from odp_callbacks.engine.sampling.requests import Continuation

if TYPE_CHECKING:
    from odp_callbacks.engine.engines.interface import EngineSample
    from odp_callbacks.engine.engines.student_engine import StudentEngine

SEGMENTS = 8
"""With a deadline that cuts all responses alike, they are sampled in so many parts."""


def sample_with_engine(
    engine: "StudentEngine",
    sequences: Sequence[Tensor],
    source: RequestSource,
    *,
    temperature: float,
    stop_token_ids: Sequence[int],
    batch_size: int,
    deadline: Deadline | None = None,
    cut_alike: bool = False,
    slot_use: SlotUse,
) -> None:
    """Sample what a source asks for until it is exhausted or the deadline has passed.

    Without a deadline, the engine gets everything that the source has at the moment, whole waves of continuations.
    With one, it gets at most ``batch_size`` requests at a time, so that less is lost when the time is up. An engine
    tells nothing about unfinished responses; how far they are is estimated from the time that earlier ones took.

    Args:
        engine: The engine.
        sequences: ``(T_s,)`` int64 each.
        source: Gives the requests.
        temperature: Divides the logits.
        stop_token_ids: Tokens that end a response.
        batch_size: The largest number of requests at a time where there is a deadline.
        deadline: When to stop; None: no limit.
        cut_alike: Whether responses that the deadline leaves unfinished must be cut at a common length. They are then
            sampled in parts of equal lengths, the later ones as continuations of the earlier ones.
        slot_use: Counts the steps, from where it stands, and the tokens.
    """
    sampler = _EngineSampler(engine, sequences, temperature, tuple(stop_token_ids), deadline)
    is_finite = deadline is not None and deadline.is_finite
    while not sampler.time_is_up():
        waiting: list[NumberedRequest] = []
        while (not is_finite or cut_alike or len(waiting) < batch_size) and (one := source.next_request()) is not None:
            waiting.append(one)
        if not waiting:
            if source.is_exhausted():
                return
            source.wait()
            continue
        source.start([numbered.number for numbered in waiting], slot_use.steps)
        start = 0.0 if deadline is None else deadline.elapsed_seconds
        sampled = sampler.in_segments(waiting) if is_finite and cut_alike else sampler.whole(waiting)
        lengths = [len(one.tokens) for one in sampled]
        slot_use.occupied += sum(lengths)
        if not any(one.unfinished for one in sampled):
            slot_use.steps += max(lengths)
            sampler.learn(max(lengths), start)
        else:
            slot_use.steps += sampler.estimated_steps(start)
        received = {numbered.number: one for numbered, one in zip(waiting, sampled, strict=True)}
        source.receive(received, slot_use.steps)


class _EngineSampler:
    """Turns requests into prompts and samples into continuations; the arguments are as above."""

    def __init__(
        self,
        engine: "StudentEngine",
        sequences: Sequence[Tensor],
        temperature: float,
        stop_token_ids: tuple[int, ...],
        deadline: Deadline | None,
    ) -> None:
        self.engine, self.temperature, self.stop_token_ids = engine, temperature, stop_token_ids
        self.deadline = Deadline() if deadline is None else deadline
        self._sequences = [sequence.tolist() for sequence in sequences]
        self._steps, self._seconds = 0, 0.0

    def time_is_up(self) -> bool:
        return self.deadline.has_passed

    def learn(self, steps: int, start: float) -> None:
        """Note that so many steps have taken the time since ``start``."""
        self._steps += steps
        self._seconds += self.deadline.elapsed_seconds - start

    def estimated_steps(self, start: float) -> int:
        """Steps that fit into the time since ``start``; 0 while nothing is known."""
        if not self._seconds > 0:
            return 0
        return math.floor((self.deadline.elapsed_seconds - start) * self._steps / self._seconds)

    def whole(self, waiting: Sequence[NumberedRequest]) -> list[Continuation]:
        """Sample requests to their ends."""
        limits = [numbered.request.max_new_tokens for numbered in waiting]
        keys = [numbered.key for numbered in waiting]
        return [_continuation(one) for one in self._sample([self._prompt(one) for one in waiting], limits, keys)]

    def in_segments(self, waiting: Sequence[NumberedRequest]) -> list[Continuation]:
        """Sample requests part by part; those that are unfinished have the same length."""
        tokens: list[tuple[int, ...]] = [() for _ in waiting]
        running = list(range(len(waiting)))
        limits = [numbered.request.max_new_tokens for numbered in waiting]
        segment, length = math.ceil(max(limits) / SEGMENTS), 0
        while running and not self.time_is_up():
            samples = self._sample(
                [[*self._prompt(waiting[index]), *tokens[index]] for index in running],
                [min(segment, limits[index] - length) for index in running],
                [segment_seed(waiting[index].key, length) for index in running],
            )
            if any(sample.finish_reason == "unfinished" for sample in samples):
                break
            length += segment
            for index, sample in zip(running, samples, strict=True):
                tokens[index] += sample.token_ids
            running = [
                index
                for index, sample in zip(running, samples, strict=True)
                if sample.finish_reason == "length" and length < limits[index]
            ]
        return [
            Continuation(
                response,
                truncated=not response or response[-1] not in self.stop_token_ids,
                unfinished=index in running,
            )
            for index, response in enumerate(tokens)
        ]

    def _prompt(self, numbered: NumberedRequest) -> list[int]:
        request = numbered.request
        return [*self._sequences[request.sequence][: request.prefix_length], request.first_token]

    def _sample(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], keys: Sequence[int]
    ) -> list["EngineSample"]:
        return self.engine.sample(
            prompts,
            max_tokens=limits,
            seeds=keys,
            temperature=self.temperature,
            stop_token_ids=self.stop_token_ids,
            seconds=self.deadline.remaining_seconds if self.deadline.is_finite else None,
        )


def segment_seed(key: int, position: int) -> int:
    """The seed of the part of a response that begins at a position; that of the first part is the key itself.

    Examples:
        >>> segment_seed(5, 0), segment_seed(5, 16) == segment_seed(5, 32)
        (5, False)
    """
    if position == 0:
        return key
    digest = blake2b(f"{key} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _continuation(sample: "EngineSample") -> Continuation:
    return Continuation(
        sample.token_ids,
        truncated=sample.finish_reason != "stop",
        unfinished=sample.finish_reason == "unfinished",
    )
