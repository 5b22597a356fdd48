"""Where the sampling of continuations takes its next request from: a list, or a plan that is still being made."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback


class NumberedRequest(NamedTuple):
    """A request that a source gives.

    Attributes:
        number: Under which the source receives the continuation.
        request: Where the continuation starts.
        key: Of its random draws.
    """

    number: int
    request: ContinuationRequest
    key: int


class RequestSource(Protocol):
    """Gives requests one by one, and receives their continuations.

    Sampling asks whenever it has room. A source may have nothing at the moment, and more after it has received
    continuations.

    Attributes:
        max_new_tokens: No request has a larger limit.
        max_tokens: No request has a prefix and a limit that are longer together.
    """

    max_new_tokens: int
    max_tokens: int

    def next_request(self) -> NumberedRequest | None:
        """Return the next request, or None if there is none at the moment."""

    def is_exhausted(self) -> bool:
        """Whether there will never be another request, whatever is received."""

    def start(self, numbers: Sequence[int], step: int) -> None:
        """Learn which requests start, and at which step: every unfinished continuation gains one token in a step."""

    def receive(self, continuations: Mapping[int, Continuation], step: int) -> None:
        """Take continuations by the numbers of their requests, as they are after so many steps.

        A deadline may have left them unfinished.
        """

    def wait(self) -> None:
        """Wait for what the next request depends on; called while nothing is being sampled."""


class ListedRequests:
    """A source whose requests are all known.

    Args:
        requests: The requests.
        keys: The key of each.
        order: The indices of the requests in the order in which they start.
        on_finished: Called with continuations as they finish, by the index of their request.

    Attributes:
        continuations: What has been received, by the index of the request.
    """

    def __init__(
        self,
        requests: Sequence[ContinuationRequest],
        keys: Sequence[int],
        order: Sequence[int],
        on_finished: FinishedCallback | None = None,
    ) -> None:
        self.max_new_tokens = max((request.max_new_tokens for request in requests), default=0)
        self.max_tokens = max((request.prefix_length + request.max_new_tokens for request in requests), default=0)
        self.continuations: dict[int, Continuation] = {}
        self._requests, self._keys, self._waiting, self._on_finished = requests, keys, deque(order), on_finished

    def next_request(self) -> NumberedRequest | None:
        """Return the next request; None after the last one."""
        if not self._waiting:
            return None
        index = self._waiting.popleft()
        return NumberedRequest(index, self._requests[index], self._keys[index])

    def is_exhausted(self) -> bool:
        """Whether all requests have been given."""
        return not self._waiting

    def start(self, numbers: Sequence[int], step: int) -> None:
        """Do nothing: all requests count, whenever they start."""

    def receive(self, continuations: Mapping[int, Continuation], step: int) -> None:
        """Keep continuations, and report those that have finished."""
        self.continuations.update(continuations)
        finished = {index: one for index, one in continuations.items() if not one.unfinished}
        if finished and self._on_finished is not None:
            self._on_finished(finished)

    def wait(self) -> None:
        """Return at once: nothing depends on anything."""


class SeparatedRequests:
    """A source without some of its requests, which are set aside to be sampled in another way.

    Args:
        source: Gives all requests.
        is_separate: Whether to set a request aside.

    Attributes:
        set_aside: The requests that have been set aside so far.
    """

    def __init__(self, source: RequestSource, is_separate: Callable[[ContinuationRequest], bool]) -> None:
        self.max_new_tokens, self.max_tokens = source.max_new_tokens, source.max_tokens
        self.set_aside: list[NumberedRequest] = []
        self._is_separate = is_separate
        self._source = source
        self.is_exhausted, self.start, self.receive = source.is_exhausted, source.start, source.receive
        self.wait = source.wait

    def next_request(self) -> NumberedRequest | None:
        """Return the next request that is not set aside."""
        while (numbered := self._source.next_request()) is not None:
            if not self._is_separate(numbered.request):
                return numbered
            self.set_aside.append(numbered)
        return None

    def take_set_aside(self) -> "WaitingRequests":
        """Return a source of the requests that have been set aside so far, and forget them here."""
        waiting, self.set_aside = self.set_aside, []
        return WaitingRequests(waiting, self._source)


class WaitingRequests:
    """Some requests of a source, which receives their continuations.

    Args:
        waiting: The requests.
        source: Where they come from.
    """

    def __init__(self, waiting: Sequence[NumberedRequest], source: RequestSource) -> None:
        self.max_new_tokens, self.max_tokens = source.max_new_tokens, source.max_tokens
        self._waiting = deque(waiting)
        self.start, self.receive, self.wait = source.start, source.receive, source.wait

    def next_request(self) -> NumberedRequest | None:
        """Return the next request; None after the last one."""
        return self._waiting.popleft() if self._waiting else None

    def is_exhausted(self) -> bool:
        """Whether all of these requests have been given."""
        return not self._waiting


@dataclass
class SlotUse:
    """How much of the batch was occupied: a slot-step is one slot during one step of the model.

    Attributes:
        occupied: Slot-steps in which a token of a continuation was sampled.
        available: Slot-steps that there were, at the largest number of slots that the batch had.
        steps: Steps of the model.
    """

    occupied: int = 0
    available: int = 0
    steps: int = 0

    @property
    def share(self) -> float:
        """Share of the slot-steps that were occupied; NaN where there were none.

        Examples:
            >>> SlotUse(occupied=90, available=100).share
            0.9
        """
        return self.occupied / self.available if self.available else math.nan
