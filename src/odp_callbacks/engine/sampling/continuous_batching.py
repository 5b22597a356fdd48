"""Sample many continuations of shared prefixes in one batch that stays full.

Each row of the batch is a slot. When a continuation finishes, the next request takes its slot, so that each step of
the model serves as many continuations as the batch has room for. Requests come from a source that may still be making
its plan (:mod:`~odp_callbacks.engine.sampling.request_source`). Prefixes are read where they are stored
(:mod:`odp_callbacks.engine.sampling.attention`) and never copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.categorical import check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.decoder.choice import DecoderChoice
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.randomness import as_key_tensor, uniforms
from odp_callbacks.engine.sampling.request_source import NumberedRequest, RequestSource, SlotUse
from odp_callbacks.engine.sampling.requests import Continuation
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView
from odp_callbacks.engine.sampling.step_graph import RepeatedStep

SHRINKING_SHARES = {"cpu": 7 / 8}
"""The batch drops its free slots when no request waits and at most this share of its rows is occupied, by device
type."""
ACCELERATOR_SHRINKING_SHARE = 1 / 2
"""The same on accelerators, where a few rows more take hardly any time, and other shapes do."""
ACCELERATOR_CHECK_INTERVAL = 8
"""Steps between two checks for finished continuations on an accelerator, because each check waits for the device."""
BY_FORWARD_PASS = DecoderChoice(None)


def sample_with_shared_prefix(
    model: nn.Module,
    cache: PrefixCache,
    source: RequestSource,
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    batch_size: int,
    deadline: Deadline | None = None,
    slot_use: SlotUse,
    decoder: DecoderChoice = BY_FORWARD_PASS,
) -> None:
    """Sample what a source asks for, until it has nothing at the moment and nothing is left in the batch.

    Args:
        model: The student in evaluation mode; it must attend through transformers' attention interface.
        cache: From :func:`~odp_callbacks.engine.sampling.prefix_cache.prefill` or
            :func:`~odp_callbacks.engine.sampling.prefix_cache.extend_prefix_cache`.
        source: Gives the requests, and receives the continuations as they finish.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        batch_size: The largest number of continuations at a time.
        deadline: When to stop; continuations that have started and not finished by then are marked as unfinished.
            None: no limit.
        slot_use: Counts the steps and the slots, from where it stands.
        decoder: How the logits are computed.

    Raises:
        FloatingPointError: If the model's logits do not define a distribution (NaN).
    """
    batch = _ContinuousBatch(
        model, cache, source, list(eos_token_ids), batch_size, slot_use.steps, temperature, decoder
    )
    sampled_tokens = 0
    try:
        while batch.running:
            batch.step()
            if not batch.is_check_due():
                continue
            continuations = batch.collect_finished()
            sampled_tokens += sum(len(continuation.tokens) for continuation in continuations.values())
            if continuations:
                source.receive(continuations, batch.first_step + batch.steps_done)
            batch.admit()
            if deadline is not None and batch.running:
                deadline.reserve_for(sum(batch.occupied) * batch.check_interval)
                if deadline.has_passed:
                    continuations = batch.unfinished()
                    sampled_tokens += sum(len(continuation.tokens) for continuation in continuations.values())
                    source.receive(continuations, batch.first_step + batch.steps_done)
                    return
    finally:
        slot_use.steps += batch.steps_done
        slot_use.occupied += sampled_tokens
        slot_use.available += batch.steps_done * batch.most_slots


STATES_OF_SLOTS = (
    "next_tokens", "max_lengths", "slot_keys", "lengths", "prefix_lengths", "suffix_lengths", "sampled_tokens", "ended",
)  # fmt: skip
"""Tensors with a row for each slot."""


class _ContinuousBatch:
    """A batch of ``B`` slots, each with a request, a suffix in the cache, and the tokens that it has sampled.

    Attributes:
        running: For each slot, its request; its last one where the slot is free.
        occupied: For each slot, whether its continuation is unfinished.
        first_step: Number of the first step, for the source.
        steps_done: Steps of the model so far.
        most_slots: The largest number of slots so far.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PrefixCache,
        source: RequestSource,
        eos_token_ids: list[int],
        batch_size: int,
        first_step: int,
        temperature: float,
        decoder: DecoderChoice,
    ) -> None:
        self.cache, self.source, self.batch_size = cache, source, batch_size
        self.first_step = first_step
        self.device = next(model.parameters()).device
        self.check_interval = 1 if self.device.type == "cpu" else ACCELERATOR_CHECK_INTERVAL
        # Finished continuations go on until the next check.
        self.suffix_capacity = source.max_new_tokens + self.check_interval - 1
        self.temperature = temperature
        self.slots = decoder.slots(model, cache, self.suffix_capacity)
        self.shrinking_share = SHRINKING_SHARES.get(self.device.type, ACCELERATOR_SHRINKING_SHARE)
        can_repeat = self.slots.is_repeatable and self.device.type == "cuda"
        self.repeated_step = RepeatedStep(self.sample_token) if can_repeat else None
        self.running: list[NumberedRequest] = []
        self.occupied: list[bool] = []
        self.start_step: list[int] = []
        self.steps_done = self.most_slots = 0
        self.eos_token_ids = torch.tensor(eos_token_ids, device=self.device, dtype=torch.long)
        # One row for each slot; there is none yet.
        self.next_tokens, self.max_lengths, self.slot_keys, self.lengths, self.prefix_lengths, self.suffix_lengths = (
            torch.zeros(0, dtype=torch.long, device=self.device) for _ in range(6)
        )
        self.sampled_tokens = torch.zeros(0, self.suffix_capacity, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(0, dtype=torch.bool, device=self.device)
        self.all_valid = torch.ones((), dtype=torch.bool, device=self.device)
        self.admit()

    def step(self) -> None:
        """Sample one token for every slot."""
        if self.repeated_step is None:
            self.sample_token()
        else:
            self.repeated_step()
        self.steps_done += 1
        self._note_suffix_lengths()

    def sample_token(self) -> None:
        """Sample one token for every slot; tensors change in place, and the host does not wait for the device."""
        # A finished continuation goes on until the next check; its positions must not exceed the model's.
        positions = self.prefix_lengths + torch.minimum(self.suffix_lengths, self.max_lengths - 1)
        logits = self.slots.logits(self.next_tokens, positions)  # (B, V)
        uniform_draws = uniforms(self.slot_keys, self.suffix_lengths, 2)
        tokens, valid = sample_tokens(logits, self.temperature, uniform_draws)
        running = ~self.ended & (self.lengths < self.max_lengths)
        self.all_valid &= (valid | ~running).all()
        self.next_tokens.copy_(tokens)
        self.sampled_tokens.scatter_(1, self.suffix_lengths[:, None], tokens[:, None])
        self.lengths += running
        self.ended |= running & (tokens[:, None] == self.eos_token_ids).any(-1)
        # A free slot goes on until the batch drops it; its suffix must not exceed the capacity.
        self.suffix_lengths.add_(1).clamp_(max=self.suffix_capacity - 1)

    def is_check_due(self) -> bool:
        """Whether it is time to check which continuations have finished."""
        return self.steps_done % self.check_interval == 0

    def collect_finished(self) -> dict[int, Continuation]:
        """Free the slots of the continuations that have finished, and return these by number."""
        finished = (self.ended | (self.lengths >= self.max_lengths)).tolist()
        finished_slots = [slot for slot, occupied in enumerate(self.occupied) if occupied and finished[slot]]
        check_probabilities(self.all_valid)
        if not finished_slots:
            return {}
        continuations = self._continuations(finished_slots)
        for slot in finished_slots:
            self.occupied[slot] = False
        return continuations

    def admit(self) -> None:
        """Start the requests that the source has, in free slots and in new ones; drop slots that nothing waits for."""
        free_slots = [slot for slot, occupied in enumerate(self.occupied) if not occupied]
        room = len(free_slots) + self.batch_size - len(self.occupied)
        started: list[NumberedRequest] = []
        while len(started) < room and (numbered := self.source.next_request()) is not None:
            started.append(numbered)
        if started:
            self.source.start([numbered.number for numbered in started], self.first_step + self.steps_done)
            new_count = max(0, len(started) - len(free_slots))
            first_new = len(self.occupied)
            self._start([*free_slots, *range(first_new, first_new + new_count)][: len(started)], started, new_count)
        if sum(self.occupied) <= self.shrinking_share * len(self.occupied):
            self._keep_slots([slot for slot, occupied in enumerate(self.occupied) if occupied])

    def unfinished(self) -> dict[int, Continuation]:
        """Return what there is of the continuations that have not finished, by number."""
        slots = [slot for slot, occupied in enumerate(self.occupied) if occupied]
        return {
            number: replace(continuation, truncated=True, unfinished=True)
            for number, continuation in self._continuations(slots).items()
        }

    def _continuations(self, slots: list[int]) -> dict[int, Continuation]:
        """Read the continuations of the given slots, by number."""
        rows = zip(
            slots,
            self.sampled_tokens[slots].tolist(),
            self.lengths[slots].tolist(),
            self.ended[slots].tolist(),
            strict=True,
        )
        return {
            self.running[slot].number: Continuation(tuple(tokens[:length]), not ended)
            for slot, tokens, length, ended in rows
        }

    def _start(self, slots: list[int], started: Sequence[NumberedRequest], new_count: int) -> None:
        """Start requests in the given slots, the last ``new_count`` of which do not exist yet."""
        self._add_slots(new_count, started[0])
        for slot, numbered in zip(slots, started, strict=True):
            self.running[slot], self.occupied[slot], self.start_step[slot] = numbered, True, self.steps_done
        rows = torch.tensor(slots, device=self.device)
        requests = [numbered.request for numbered in started]
        self.next_tokens[rows] = torch.tensor([request.first_token for request in requests], device=self.device)
        self.max_lengths[rows] = torch.tensor([request.max_new_tokens for request in requests], device=self.device)
        self.slot_keys[rows] = as_key_tensor([numbered.key for numbered in started], self.device)
        self.lengths[rows], self.ended[rows], self.suffix_lengths[rows] = 0, False, 0
        self._replace_view()

    def _add_slots(self, count: int, placeholder: NumberedRequest) -> None:
        """Add free slots at the end."""
        self.running += [placeholder] * count
        self.occupied += [False] * count
        self.start_step += [self.steps_done] * count
        if count:
            self._replace_states(lambda states: torch.cat([states, states.new_zeros(count, *states.shape[1:])]))
            self.slots.set_row_count(len(self.occupied))
        self.most_slots = max(self.most_slots, len(self.occupied))

    def _keep_slots(self, slots: list[int]) -> None:
        """Drop all slots but the given ones."""
        self.running = [self.running[slot] for slot in slots]
        self.occupied = [self.occupied[slot] for slot in slots]
        self.start_step = [self.start_step[slot] for slot in slots]
        if not slots:
            return
        kept_rows = torch.tensor(slots, device=self.device)
        self._replace_states(lambda states: states[kept_rows])
        self.slots.keep_rows(kept_rows)
        self._replace_view()

    def _replace_states(self, replacement: Callable[[Tensor], Tensor]) -> None:
        """Replace what is known of each slot, after their number has changed."""
        for name in STATES_OF_SLOTS:
            setattr(self, name, replacement(getattr(self, name)))
        if self.repeated_step is not None:
            self.repeated_step.forget()

    def _replace_view(self) -> None:
        """Describe anew what the slots share, after their requests have changed."""
        requests = [numbered.request for numbered in self.running]
        self.view: SharedPrefixView = self.cache.shared_prefix_view(requests, self.device, self.suffix_capacity)
        # In place, since a step may read them where they are.
        self.prefix_lengths.copy_(self.view.prefix_lengths)
        self._note_suffix_lengths()
        self.slots.set_view(self.view)

    def _note_suffix_lengths(self) -> None:
        """Give the view the lengths of the suffixes; their maximum is known here without asking the device."""
        start_steps = {
            start_step for start_step, occupied in zip(self.start_step, self.occupied, strict=True) if occupied
        }
        longest_suffix = min(self.steps_done - min(start_steps, default=self.steps_done), self.suffix_capacity - 1)
        self.view.set_suffix_lengths(self.suffix_lengths, longest_suffix, len(start_steps) < 2)
