"""Waves of continuations: what is planned together, and counts together or not at all.

Which continuations a wave holds never depends on which of them finishes first. A wave whose length was planned by a
number of tokens ends at the first request, in its own order, that no longer fits; requests behind it that were started
before that was known are dropped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest
from odp_callbacks.engine.tree.continuation_tree import Response
from odp_callbacks.engine.verifier import Scoring

BranchIndex = tuple[int, int]
"""Index of a group in the tree, and of a branch in the group."""


@dataclass
class Wave:
    """Continuations that are planned together, and what is known about them.

    Attributes:
        scoring: The verifier's side. Its numbers are those of ``ending_branches``, then those of ``requests``.
        groups: The groups of the tree that the wave is about.
        ending_branches: Branches that end the response and have not been scored yet.
        requests: One request for each continuation, in the order in which they start.
        branches: For each request, the branch that it starts with.
        keys: For each request, the key of its random draws.
        expected_lengths: For each request, the number of tokens that it was expected to take.
        token_limit: Tokens of this and all earlier waves after which the wave ends; infinite for a wave that ends with
            its last request.
        is_last: Whether no other wave follows.
        responses: By number, the whole responses that the verifier has received.
        continuations: What has finished, by the index of the request.
        started: Number of requests that have started.
        counted: Number of requests, from the first one, that belong to the wave; 0 until that is known.
        dropped: Whether the wave ended before it was complete, at a deadline.
        last_start: Number of the step of the model before which the last request started.
        started_tokens: Tokens of the requests that have started, as far as known or else expected.
    """

    scoring: Scoring
    groups: frozenset[int]
    ending_branches: list[BranchIndex] = field(default_factory=list)
    requests: list[ContinuationRequest] = field(default_factory=list)
    branches: list[BranchIndex] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    expected_lengths: list[float] = field(default_factory=list)
    token_limit: float = math.inf
    is_last: bool = False
    responses: dict[int, Response] = field(default_factory=dict)
    continuations: dict[int, Continuation] = field(default_factory=dict)
    started: int = 0
    counted: int = 0
    dropped: bool = False
    last_start: int = 0
    started_tokens: float = 0.0

    def start_next(self, earlier_tokens: float) -> int | None:
        """Start the next request if it belongs to the wave as far as known, and return its index.

        Args:
            earlier_tokens: Tokens of the earlier waves, as far as known or else expected.
        """
        if self.dropped or self.started == len(self.requests):
            return None
        expected = self.expected_lengths[self.started]
        if not self._fits(earlier_tokens + self.started_tokens, expected):
            return None
        self.started += 1
        self.started_tokens += expected
        return self.started - 1

    def finish(self, index: int, continuation: Continuation) -> None:
        """Keep a finished continuation."""
        self.continuations[index] = continuation
        self.started_tokens += len(continuation.tokens) - self.expected_lengths[index]

    def is_sampled(self, earlier_tokens: float) -> bool:
        """Whether everything that belongs to the wave has finished; ``earlier_tokens`` must be known exactly then."""
        if self.dropped or len(self.continuations) < self.started:
            return False
        return self.started == len(self.requests) or not self._fits(
            earlier_tokens + self.started_tokens, self.expected_lengths[self.started]
        )

    @property
    def certain_step(self) -> int:
        """The step by which all of the wave would have finished even at the largest possible lengths.

        At a deadline, a wave may count only if this step was reached: one that merely happens to be complete has short
        continuations.
        """
        return self.last_start + max((request.max_new_tokens for request in self.requests), default=0)

    def close(self, earlier_tokens: float) -> None:
        """Find out how many of the requests of a wave that has been sampled belong to it; the first ones do."""
        tokens = earlier_tokens
        self.counted = self.started
        for index in range(self.started):
            if not self._fits(tokens, self.expected_lengths[index]):
                self.counted = index
                return
            tokens += len(self.continuations[index].tokens)

    def counts(self, index: int) -> bool:
        """Whether a request belongs to the wave; known once the wave is closed."""
        return not self.dropped and index < self.counted

    @property
    def counted_tokens(self) -> int:
        """Tokens of the continuations that belong to the wave; known once the wave is closed."""
        return sum(len(self.continuations[index].tokens) for index in range(self.counted))

    @property
    def planned_tokens(self) -> float:
        """Tokens that all requests were expected to take when the wave was planned."""
        return sum(self.expected_lengths)

    def _fits(self, tokens: float, expected: float) -> bool:
        # Half of the expected length, so that the limit is exceeded as often as it is missed.
        return tokens + expected / 2 < self.token_limit


Ordering = Callable[[Sequence[ContinuationRequest], Sequence[float]], Sequence[int]]
"""From requests and their expected numbers of tokens to the indices of the requests in the order of their starts."""


def sort_by_sequence(requests: Sequence[ContinuationRequest], _: Sequence[float]) -> list[int]:
    """Order requests so that those of one sequence are neighbours, which share what the model reads.

    Among the requests of a sequence, those with the shortest prefix start first: their continuations are the longest.
    """
    return sorted(range(len(requests)), key=lambda index: (requests[index].sequence, requests[index].prefix_length))


def sort_by_length(requests: Sequence[ContinuationRequest], expected_lengths: Sequence[float]) -> list[int]:
    """Order requests so that the longest expected continuations start first, and the last ones end soon."""
    return sorted(
        range(len(requests)), key=lambda index: (-expected_lengths[index], -requests[index].max_new_tokens, index)
    )


def sort_randomly(generator: np.random.Generator) -> Ordering:
    """Order requests at random: how many of them fit into a limit then depends on no node more than on another."""
    return lambda requests, _: generator.permutation(len(requests)).tolist()
