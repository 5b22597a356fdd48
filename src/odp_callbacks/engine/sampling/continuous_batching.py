"""Sampling many continuations of shared prefixes, in one batch that stays full.

A row of the batch is a seat. A continuation that has finished leaves it, and one that waits takes it, so that each step
of the model serves as many continuations as there is room for; prefixes are read where they are
(:mod:`odp_callbacks.engine.sampling.attention`) and never copied.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import using_shared_prefix_attention
from odp_callbacks.engine.sampling.categorical import Continuation, check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.prefix_cache import ContinuationRequest, PrefixCache, forward, share, suffix_cache
from odp_callbacks.engine.sampling.randomness import as_keys, uniforms
from odp_callbacks.functional.gradients import forward_arguments

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done of it, and how much there is."""
Finished = Callable[[dict[int, Continuation]], None]
"""Called with continuations as they finish, by their place among the starts."""
LEAVE = 7 / 8
"""The batch is made smaller when this share of its seats, or less, is taken and nobody waits."""
PATIENCE = 8
"""Steps between looks at which rows have ended, on an accelerator: each look waits for it."""


def sample_with_shared_prefix(
    model: nn.Module,
    cache: PrefixCache,
    starts: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
    batch_size: int,
    finished: Finished | None = None,
) -> list[Continuation]:
    """Sample one continuation for each start, from the student's own policy: temperature, and nothing else.

    Args:
        model: The student, in evaluation mode; it must attend through transformers' attention interface.
        cache: PrefilledRollouts, from :func:`~odp_callbacks.engine.sampling.prefix_cache.prefill`.
        starts: Where each continuation starts.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        keys: Of each continuation; what it draws is a function of its key alone.
        batch_size: The most continuations at a time.
        finished: Told of continuations as they finish.

    Returns:
        In the order of ``starts``.

    Raises:
        FloatingPointError: If the model's logits are no distribution (NaN).
    """
    if not starts:
        return []
    sampled: dict[int, Continuation] = {}
    with using_shared_prefix_attention(model):
        batch = _Batch(model, cache, starts, list(eos_token_ids), batch_size, keys)
        while batch.owners:
            batch.step(temperature)
            if batch.due():
                done = batch.leave()
                sampled.update(done)
                if done and finished is not None:
                    finished(done)
    return [sampled[i] for i in range(len(starts))]


class _Batch:
    """Continuations under way: ``B`` seats, each with a start, a suffix, and what it has written.

    Attributes:
        owners: For each seat, which start sits or sat there last.
        taken: For each seat, whether it still does.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PrefixCache,
        starts: Sequence[ContinuationRequest],
        eos: list[int],
        batch_size: int,
        keys: Sequence[int],
    ) -> None:
        self.model, self.cache, self.starts = model, cache, starts
        self.device = next(model.parameters()).device
        self.keys = as_keys(keys, self.device)  # of all starts; `key` has those of the seats
        self.takes = forward_arguments(model)  # read once: inspecting a signature has no place in a loop over tokens
        self.patience = 1 if self.device.type == "cpu" else PATIENCE

        # Neighbours share a sequence; of one sequence, those with most left to write go first.
        def place(i: int) -> tuple[int, int, int]:
            return cache.owners[starts[i].sequence], starts[i].sequence, starts[i].prefix

        self.waiting = deque(sorted(range(len(starts)), key=place))
        self.longest = max(s.limit for s in starts) + self.patience - 1
        self.owners = [self.waiting.popleft() for _ in range(min(batch_size, len(starts)))]
        seats = len(self.owners)
        self.taken = [True] * seats
        self.born = [0] * seats
        self.now = 0
        self.eos = torch.tensor(eos, device=self.device, dtype=torch.long)
        self.token = self._of("token", range(seats))
        self.limit = self._of("limit", range(seats))
        self.key = self.keys[self.owners]
        self.written = torch.zeros(seats, self.longest, dtype=torch.long, device=self.device)
        self.length = torch.zeros(seats, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(seats, dtype=torch.bool, device=self.device)
        self.sound = torch.ones((), dtype=torch.bool, device=self.device)
        self.view = share(cache, [starts[i] for i in self.owners], self.device, self.longest)
        self.suffixes = suffix_cache(seats, self.longest, self.view)

    def _of(self, name: str, seats: Sequence[int]) -> Tensor:
        return torch.tensor([getattr(self.starts[self.owners[seat]], name) for seat in seats], device=self.device)

    def step(self, temperature: float) -> None:
        """One token for every seat."""
        view = self.view
        # Who has ended writes on unread until somebody looks, but not beyond the model's positions.
        positions = (view.starts + torch.minimum(view.ages, self.limit - 1))[:, None]
        logits = forward(
            self.model, self.token[:, None], self.suffixes, positions=positions, view=view, takes=self.takes
        )[:, -1]  # (B, V)
        draws = uniforms(self.key, view.ages, 2)
        self.token, sound = sample_tokens(logits, temperature, draws)
        running = ~self.ended & (self.length < self.limit)
        self.sound &= (sound | ~running).all()
        self.written.scatter_(1, view.ages[:, None], self.token[:, None])
        self.length += running
        self.ended |= running & torch.isin(self.token, self.eos)
        # A seat that nobody waits for goes on until the batch is made smaller; it must not outgrow its room.
        view.ages.add_(1).clamp_(max=self.longest - 1)
        self.now += 1
        view.step(*self._ages())

    def _ages(self) -> tuple[int, bool]:
        """The oldest suffix, and whether all are as old."""
        born = {at for at, taken in zip(self.born, self.taken, strict=True) if taken}
        return min(self.now - min(born, default=self.now), self.longest - 1), len(born) < 2

    def due(self) -> bool:
        """Whether it is time to look who has ended."""
        return self.now % self.patience == 0

    def leave(self) -> dict[int, Continuation]:
        """Take up what has finished, and seat those who wait."""
        over = (self.ended | (self.length >= self.limit)).tolist()
        seats = [seat for seat, taken in enumerate(self.taken) if taken and over[seat]]
        check_probabilities(self.sound)
        if not seats:
            return {}
        rows = zip(
            seats, self.written[seats].tolist(), self.length[seats].tolist(), self.ended[seats].tolist(), strict=True
        )
        found = {self.owners[s]: Continuation(tuple(row[:length]), not end) for s, row, length, end in rows}
        free = seats[: len(self.waiting)]
        for seat in free:
            self.owners[seat], self.born[seat] = self.waiting.popleft(), self.now
        for seat in seats[len(free) :]:
            self.taken[seat] = False
        if free:
            self._seat(free)
        if sum(self.taken) <= LEAVE * len(self.owners):
            self._shrink([seat for seat, taken in enumerate(self.taken) if taken])
        return found

    def _seat(self, seats: list[int]) -> None:
        """ContinuationRequest anew on seats whose owners have changed."""
        at = torch.tensor(seats, device=self.device)
        self.token[at] = self._of("token", seats)
        self.limit[at] = self._of("limit", seats)
        self.key[at] = self.keys[[self.owners[seat] for seat in seats]]
        self.length[at], self.ended[at] = 0, False
        self._look(self.view.ages.index_fill(0, at, 0))

    def _shrink(self, seats: list[int]) -> None:
        """Go on with these seats alone."""
        for name in ("owners", "taken", "born"):
            setattr(self, name, [getattr(self, name)[seat] for seat in seats])
        if not seats:
            return
        rows = torch.tensor(seats, device=self.device)
        for name in ("token", "limit", "key", "written", "length", "ended"):
            setattr(self, name, getattr(self, name)[rows])
        for layer in self.suffixes.layers:
            layer.retain(rows)
        self._look(self.view.ages[rows])

    def _look(self, ages: Tensor) -> None:
        """A new view of what is shared, for new owners."""
        self.view = share(self.cache, [self.starts[i] for i in self.owners], self.device, self.longest)
        self.view.ages = ages
        self.view.step(*self._ages())
        for layer in self.suffixes.layers:
            layer.view = self.view
