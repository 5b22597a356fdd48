"""Sample many continuations of shared prefixes in one batch that stays full.

Each row of the batch is a slot. When a continuation finishes, the next waiting request takes its slot, so that each
step of the model serves as many continuations as the batch has room for. Prefixes are read where they are stored
(:mod:`odp_callbacks.engine.sampling.attention`) and never copied.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import using_shared_prefix_attention
from odp_callbacks.engine.sampling.categorical import check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.model_forward import forward_with_cache
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.randomness import as_key_tensor, uniforms
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView
from odp_callbacks.engine.sampling.suffix_cache import suffix_cache
from odp_callbacks.functional.gradients import forward_arguments

SHRINKING_SHARE = 7 / 8
"""The batch drops its free slots when no request waits and at most this share of the slots is occupied."""
ACCELERATOR_CHECK_INTERVAL = 8
"""Steps between two checks for finished continuations on an accelerator, because each check waits for the device."""


def sample_with_shared_prefix(
    model: nn.Module,
    cache: PrefixCache,
    requests: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
    batch_size: int,
    on_finished: FinishedCallback | None = None,
) -> list[Continuation]:
    """Sample one continuation for each request from the student's own policy, with a temperature and no other change.

    Args:
        model: The student in evaluation mode; it must attend through transformers' attention interface.
        cache: From :func:`~odp_callbacks.engine.sampling.prefix_cache.prefill` or
            :func:`~odp_callbacks.engine.sampling.prefix_cache.extend_prefix_cache`.
        requests: Where each continuation starts.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        keys: One for each request; the tokens of a continuation depend on its own key only.
        batch_size: The largest number of continuations at a time.
        on_finished: Called with continuations as they finish; None for no call.

    Returns:
        Continuations in the order of ``requests``.

    Raises:
        FloatingPointError: If the model's logits do not define a distribution (NaN).
    """
    if not requests:
        return []
    sampled: dict[int, Continuation] = {}
    with using_shared_prefix_attention(model):
        batch = _ContinuousBatch(model, cache, requests, list(eos_token_ids), batch_size, keys)
        while batch.request_of_slot:
            batch.step(temperature)
            if batch.is_check_due():
                finished = batch.collect_finished()
                sampled.update(finished)
                if finished and on_finished is not None:
                    on_finished(finished)
    return [sampled[index] for index in range(len(requests))]


class _ContinuousBatch:
    """A batch of ``B`` slots, each with a request, a suffix in the cache, and the tokens that it has sampled.

    Attributes:
        request_of_slot: For each slot, the index of its request; of its last one where the slot is free.
        occupied: For each slot, whether its continuation is unfinished.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PrefixCache,
        requests: Sequence[ContinuationRequest],
        eos_token_ids: list[int],
        batch_size: int,
        keys: Sequence[int],
    ) -> None:
        self.model, self.cache, self.requests = model, cache, requests
        self.device = next(model.parameters()).device
        self.request_keys = as_key_tensor(keys, self.device)
        # Looked up once, because inspecting a signature at every token is slow.
        self.accepted_arguments = forward_arguments(model)
        self.check_interval = 1 if self.device.type == "cpu" else ACCELERATOR_CHECK_INTERVAL

        # Requests of one sequence are neighbours; among these, the longest continuations start first.
        def start_order(index: int) -> tuple[int, int, int]:
            sequence = requests[index].sequence
            return cache.prompt_of_sequence[sequence], sequence, requests[index].prefix_length

        self.waiting_requests = deque(sorted(range(len(requests)), key=start_order))
        # Finished continuations go on until the next check.
        self.suffix_capacity = max(request.max_new_tokens for request in requests) + self.check_interval - 1
        slot_count = min(batch_size, len(requests))
        self.request_of_slot = [self.waiting_requests.popleft() for _ in range(slot_count)]
        self.occupied = [True] * slot_count
        self.start_step = [0] * slot_count
        self.steps_done = 0
        self.eos_token_ids = torch.tensor(eos_token_ids, device=self.device, dtype=torch.long)
        self.next_tokens = self._first_tokens(range(slot_count))
        self.max_lengths = self._max_new_tokens(range(slot_count))
        self.slot_keys = self.request_keys[self.request_of_slot]
        self.sampled_tokens = torch.zeros(slot_count, self.suffix_capacity, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(slot_count, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(slot_count, dtype=torch.bool, device=self.device)
        self.all_valid = torch.ones((), dtype=torch.bool, device=self.device)
        self.view = self._shared_prefix_view()
        self.suffixes = suffix_cache(slot_count, self.suffix_capacity, self.view)

    def step(self, temperature: float) -> None:
        """Sample one token for every slot."""
        view = self.view
        # A finished continuation goes on until the next check; its positions must not exceed the model's.
        position_ids = (view.prefix_lengths + torch.minimum(view.suffix_lengths, self.max_lengths - 1))[:, None]
        logits = forward_with_cache(
            self.model,
            self.next_tokens[:, None],
            self.suffixes,
            position_ids=position_ids,
            shared_prefix=view,
            accepted_arguments=self.accepted_arguments,
        )[:, -1]  # (B, V)
        uniform_draws = uniforms(self.slot_keys, view.suffix_lengths, 2)
        self.next_tokens, valid = sample_tokens(logits, temperature, uniform_draws)
        running = ~self.ended & (self.lengths < self.max_lengths)
        self.all_valid &= (valid | ~running).all()
        self.sampled_tokens.scatter_(1, view.suffix_lengths[:, None], self.next_tokens[:, None])
        self.lengths += running
        self.ended |= running & torch.isin(self.next_tokens, self.eos_token_ids)
        self.steps_done += 1
        # A free slot goes on until the batch drops it; its suffix must not exceed the capacity.
        self._set_suffix_lengths(view.suffix_lengths.add_(1).clamp_(max=self.suffix_capacity - 1))

    def is_check_due(self) -> bool:
        """Whether it is time to check which continuations have finished."""
        return self.steps_done % self.check_interval == 0

    def collect_finished(self) -> dict[int, Continuation]:
        """Return the continuations that have finished, and give their slots to waiting requests."""
        finished = (self.ended | (self.lengths >= self.max_lengths)).tolist()
        finished_slots = [slot for slot, occupied in enumerate(self.occupied) if occupied and finished[slot]]
        check_probabilities(self.all_valid)
        if not finished_slots:
            return {}
        continuations = self._continuations(finished_slots)
        reused_slots = finished_slots[: len(self.waiting_requests)]
        for slot in reused_slots:
            self.request_of_slot[slot] = self.waiting_requests.popleft()
            self.start_step[slot] = self.steps_done
        for slot in finished_slots[len(reused_slots) :]:
            self.occupied[slot] = False
        if reused_slots:
            self._start_requests(reused_slots)
        if sum(self.occupied) <= SHRINKING_SHARE * len(self.occupied):
            self._keep_slots([slot for slot, occupied in enumerate(self.occupied) if occupied])
        return continuations

    def _continuations(self, slots: list[int]) -> dict[int, Continuation]:
        """Read the finished continuations of the given slots, by the index of their request."""
        rows = zip(
            slots,
            self.sampled_tokens[slots].tolist(),
            self.lengths[slots].tolist(),
            self.ended[slots].tolist(),
            strict=True,
        )
        return {
            self.request_of_slot[slot]: Continuation(tuple(tokens[:length]), not ended)
            for slot, tokens, length, ended in rows
        }

    def _start_requests(self, slots: list[int]) -> None:
        """Start the new requests of the given slots."""
        slot_indices = torch.tensor(slots, device=self.device)
        self.next_tokens[slot_indices] = self._first_tokens(slots)
        self.max_lengths[slot_indices] = self._max_new_tokens(slots)
        self.slot_keys[slot_indices] = self.request_keys[[self.request_of_slot[slot] for slot in slots]]
        self.lengths[slot_indices], self.ended[slot_indices] = 0, False
        self._replace_view(self.view.suffix_lengths.index_fill(0, slot_indices, 0))

    def _keep_slots(self, slots: list[int]) -> None:
        """Drop all slots but the given ones."""
        self.request_of_slot = [self.request_of_slot[slot] for slot in slots]
        self.occupied = [self.occupied[slot] for slot in slots]
        self.start_step = [self.start_step[slot] for slot in slots]
        if not slots:
            return
        kept_rows = torch.tensor(slots, device=self.device)
        self.next_tokens, self.max_lengths = self.next_tokens[kept_rows], self.max_lengths[kept_rows]
        self.slot_keys, self.sampled_tokens = self.slot_keys[kept_rows], self.sampled_tokens[kept_rows]
        self.lengths, self.ended = self.lengths[kept_rows], self.ended[kept_rows]
        for layer in self.suffixes.layers:
            layer.keep_rows(kept_rows)
        self._replace_view(self.view.suffix_lengths[kept_rows])

    def _replace_view(self, suffix_lengths: Tensor) -> None:
        """Describe anew what the slots share, after their requests have changed."""
        self.view = self._shared_prefix_view()
        self._set_suffix_lengths(suffix_lengths)
        for layer in self.suffixes.layers:
            layer.view = self.view

    def _shared_prefix_view(self) -> SharedPrefixView:
        requests = [self.requests[index] for index in self.request_of_slot]
        return self.cache.shared_prefix_view(requests, self.device, self.suffix_capacity)

    def _set_suffix_lengths(self, suffix_lengths: Tensor) -> None:
        """Give the view the lengths of the suffixes; their maximum is known here without asking the device."""
        start_steps = {
            start_step for start_step, occupied in zip(self.start_step, self.occupied, strict=True) if occupied
        }
        longest_suffix = min(self.steps_done - min(start_steps, default=self.steps_done), self.suffix_capacity - 1)
        self.view.set_suffix_lengths(suffix_lengths, longest_suffix, len(start_steps) < 2)

    def _first_tokens(self, slots: Sequence[int]) -> Tensor:
        tokens = [self.requests[self.request_of_slot[slot]].first_token for slot in slots]
        return torch.tensor(tokens, device=self.device)

    def _max_new_tokens(self, slots: Sequence[int]) -> Tensor:
        limits = [self.requests[self.request_of_slot[slot]].max_new_tokens for slot in slots]
        return torch.tensor(limits, device=self.device)
