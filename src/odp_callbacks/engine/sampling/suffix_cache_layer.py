"""One layer of the cache of the rows' own suffixes.

It has a file of its own because its base class needs transformers, whose import takes seconds.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView


class SuffixCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # untyped in transformers
    """Keys and values of the rows' own suffixes in one layer, ``(B, H, L, D)``.

    Args:
        row_count: ``B``, rows of the batch.
        capacity: ``L``, the largest number of tokens that a row's suffix will have.
        view: What the rows share; replaced when the rows change.
    """

    def __init__(self, row_count: int, capacity: int, view: SharedPrefixView) -> None:
        super().__init__()
        self.row_count, self.capacity, self.view = row_count, capacity, view
        self._stored_keys: Tensor | None = None
        self._stored_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory, in the shape, dtype and device of the first keys and values."""
        # Zeros rather than uninitialised memory: what a mask hides has a weight of 0, and 0 times a NaN is NaN.
        self.keys, self.values = self._stored_keys, self._stored_values = tuple(
            states.new_zeros(self.row_count, states.shape[1], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token for each row, or of all tokens at once.

        Args:
            key_states: ``(B, H, T, D)``, where ``T`` is 1 or the capacity.
            value_states: ``(B, H, T, D)``.

        Returns:
            The keys and values up to the longest suffix.
        """
        if key_states.shape[2] == self.capacity:  # a whole response in one forward pass
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        for stored, new_states in ((self.keys, key_states), (self.values, value_states)):
            if self.view.equal_lengths:
                stored[:, :, self.view.longest_suffix] = new_states[:, :, 0]
            else:
                rows = torch.arange(len(stored), device=stored.device)
                stored[rows, :, self.view.suffix_lengths] = new_states[:, :, 0]
        end = self.view.longest_suffix + 1
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given rows to the front, in their order, and drop the others.

        Args:
            rows: ``(B',)`` int64.
        """
        assert self.keys is not None
        assert self.values is not None
        # Copied within the memory that is allocated, so that the peak does not rise by a second cache.
        self.keys[: len(rows)] = self.keys[rows]
        self.values[: len(rows)] = self.values[rows]
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def set_row_count(self, row_count: int) -> None:
        """Add rows at the end, in the memory of rows that were dropped as far as there is any.

        Args:
            row_count: The number of rows afterwards.
        """
        if not self.is_initialized:  # whole responses are not stored
            return
        assert self.keys is not None
        assert self.values is not None
        assert self._stored_keys is not None
        assert self._stored_values is not None
        if row_count > len(self._stored_keys):
            kept_rows = len(self.keys)
            larger_keys, larger_values = (
                states.new_zeros(row_count, *states.shape[1:]) for states in (self.keys, self.values)
            )
            larger_keys[:kept_rows], larger_values[:kept_rows] = self.keys, self.values
            self._stored_keys, self._stored_values = larger_keys, larger_values
        self.keys, self.values = self._stored_keys[:row_count], self._stored_values[:row_count]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the mask that transformers builds."""
        return self.view.longest_suffix + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens in the longest suffix."""
        return self.view.longest_suffix

    def get_max_length(self) -> int:
        """Return the capacity."""
        return self.capacity
