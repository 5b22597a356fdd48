"""Keys and values of the slots' own suffixes, in memory that is allocated once."""

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.decoder.layers import HeadShape

HIDDEN_COLUMN = 2**40
"""Stands for the position of a reserved place: later than any token."""


class SuffixStorage:
    """Keys and values ``(2, B, H', X + L, D)`` of each layer, where the first ``X`` positions are reserved.

    Those of a slot and head lie beside each other: a small matrix product is several times slower on a CPU where its
    rows are apart.

    Args:
        heads: Sizes of the attention.
        layer_count: Layers of the model.
        reserved: ``X``, positions before the suffix that attention to prefixes uses.
        capacity: The largest number of tokens of a suffix.
        dtype: Of keys and values.
        device: Where the model is.

    Attributes:
        row_count: ``B``, slots.
        layers: Keys ``(B * H', D, X + width)`` and values ``(B * H', X + width, D)`` of each layer.
        columns: ``(X + width,)`` int64, the suffix's position that each column holds.
        spare_row: Index of a vector that nothing reads.
    """

    def __init__(
        self,
        heads: HeadShape,
        layer_count: int,
        reserved: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.heads, self.reserved, self.capacity = heads, reserved, capacity
        self.row_count = self._allocated_rows = 0
        self._vectors_of_row = heads.key_heads * (reserved + capacity)
        self._storages = [torch.zeros(2, 1, heads.width, dtype=dtype, device=device) for _ in range(layer_count)]
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def spare_row(self) -> int:
        """Index of the vector behind all others."""
        return self._allocated_rows * self._vectors_of_row

    def set_row_count(self, row_count: int) -> None:
        """Add slots at the end, in the memory of slots that were dropped as far as there is any."""
        if row_count > self._allocated_rows:
            kept = self.row_count * self._vectors_of_row
            for index, storage in enumerate(self._storages):
                # Zeros rather than uninitialised memory: what is hidden has a weight of 0, and 0 times a NaN is NaN.
                larger = storage.new_zeros(2, row_count * self._vectors_of_row + 1, self.heads.width)
                larger[:, :kept] = storage[:, :kept]
                self._storages[index] = larger
            self._allocated_rows = row_count
        self.row_count = row_count

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given slots to the front, in their order, and drop the others.

        Args:
            rows: ``(B',)`` int64.
        """
        for storage in self._storages:
            for states in storage:
                by_row = states[:-1].view(self._allocated_rows, -1)
                by_row[: len(rows)] = by_row[rows]
        self.row_count = len(rows)

    def set_width(self, width: int) -> None:
        """Choose up to which position the suffixes are read."""
        heads, columns = self.heads, self.reserved + self.capacity
        device = self._storages[0].device
        self.layers = []
        self._all_values = [storage[1] for storage in self._storages]
        for storage in self._storages:
            keys, values = (
                states[: self.row_count * self._vectors_of_row].view(-1, columns, heads.width)[
                    :, : self.reserved + width
                ]
                for states in storage
            )
            self.layers.append((keys.mT, values))
        positions = torch.arange(-self.reserved, width, device=device)
        self.columns = torch.where(positions < 0, HIDDEN_COLUMN, positions)
        row_heads = torch.arange(self.row_count * heads.key_heads, device=device).view(-1, heads.key_heads)
        self._first_positions = row_heads * columns + self.reserved

    def by_slot(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, ``(B, H', X + L, D)`` each.

        Args:
            layer_index: Index of the layer.
        """
        columns = self.reserved + self.capacity
        keys, values = (
            states[: self.row_count * self._vectors_of_row].view(-1, self.heads.key_heads, columns, self.heads.width)
            for states in self._storages[layer_index]
        )
        return keys, values

    def set_lengths(self, lengths: Tensor) -> None:
        """Choose where the next keys and values are written.

        Args:
            lengths: ``(B,)`` int64.
        """
        self._written = (self._first_positions + lengths[:, None]).flatten()

    def write(self, layer_index: int, keys_and_values: Tensor) -> None:
        """Write a key and a value for each slot and head.

        Args:
            layer_index: Index of the layer.
            keys_and_values: ``(B * H', 2, D)``.
        """
        self._storages[layer_index].index_copy_(1, self._written, keys_and_values.transpose(0, 1))

    def write_reserved(self, layer_index: int, rows: Tensor, values: Tensor) -> None:
        """Write vectors in the place of values.

        Args:
            layer_index: Index of the layer.
            rows: ``(M,)`` int64, from :meth:`value_rows`, or :attr:`spare_row`.
            values: ``M`` vectors of ``D`` numbers, in any shape.
        """
        self._all_values[layer_index].index_copy_(0, rows, values.reshape(-1, self.heads.width))

    def value_rows(self, row_heads: Tensor, columns: Tensor) -> Tensor:
        """Indices of values among all values of a layer.

        Args:
            row_heads: int64, ``slot * H' + head``.
            columns: int64, the same shape; reserved columns come first.
        """
        return row_heads * (self.reserved + self.capacity) + columns
