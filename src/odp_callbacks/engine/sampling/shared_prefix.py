"""What the rows of a batch share with each other: which keys and values each row reads, and the masks for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

KeyValueLayers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``(S, H, T, D)`` for ``S`` sequences."""


class RowGroup(NamedTuple):
    """Neighbouring rows that read the same sequence.

    Attributes:
        sequence: Index of the sequence that they read.
        first_row: The first row of the group, in the view's order.
        stop_row: One past the last row of the group.
        longest_read: The largest number of positions that a row of the group reads.
        unequal_reads: Whether some rows of the group read fewer positions than others.
    """

    sequence: int
    first_row: int
    stop_row: int
    longest_read: int
    unequal_reads: bool


@dataclass(frozen=True)
class SharedLevel:
    """One level of the shared prefix: the prompts, or the responses.

    Attributes:
        layers: Keys and values of the level's sequences, ``(S, H, T, D)`` in each layer.
        groups: Rows that read the same sequence, in the view's order. Rows that read nothing are in no group.
        read_lengths: ``(B,)`` int64 in the view's order, how many positions of its sequence a row reads.
        offsets: ``(B,)`` int64 in the view's order, the position in the text at which the row's sequence starts.
    """

    layers: KeyValueLayers
    groups: list[RowGroup]
    read_lengths: Tensor
    offsets: Tensor

    @classmethod
    def from_reads(
        cls,
        layers: KeyValueLayers,
        sequences: Sequence[int],
        read_lengths: Sequence[int],
        offsets: Sequence[int],
        device: torch.device,
    ) -> "SharedLevel":
        """Group the rows of a level.

        Args:
            layers: Keys and values of the level's sequences, ``(S, H, T, D)`` in each layer.
            sequences: ``B``, the sequence of each row; rows with the same sequence are neighbours.
            read_lengths: ``B``, how many positions of its sequence each row reads.
            offsets: ``B``, the position in the text at which the row's sequence starts.
            device: Where the model is.
        """
        groups = []
        first_row = 0
        for row in range(1, len(sequences) + 1):
            if row < len(sequences) and sequences[row] == sequences[first_row]:
                continue
            group_reads = read_lengths[first_row:row]
            longest_read = max(group_reads)
            if longest_read:
                groups.append(
                    RowGroup(sequences[first_row], first_row, row, longest_read, min(group_reads) < longest_read)
                )
            first_row = row
        return cls(layers, groups, torch.tensor(read_lengths, device=device), torch.tensor(offsets, device=device))


@dataclass
class SharedPrefixView:
    """What one forward pass attends to: the levels that its ``B`` rows share, and the length of each row's suffix.

    Attributes:
        levels: Prompts first, then responses; a level that no row reads is left out.
        order: ``(B,)`` int64, sorts the rows so that those which read the same sequence are neighbours.
        inverse_order: ``(B,)`` int64, undoes ``order``.
        prefix_lengths: ``(B,)`` int64, the position at which a row's own suffix starts.
        suffix_lengths: ``(B,)`` int64, tokens in a row's suffix before this forward pass.
        longest_suffix: The largest of ``suffix_lengths``.
        equal_lengths: Whether all ``suffix_lengths`` are equal.
        max_position: An upper bound of the positions that are attended to.
        windows: Sliding windows that the layers have asked for; a trial compares them with the model's configuration.
        attended_layers: Indices of the layers that have attended to the shared levels; a trial counts them.
    """

    levels: list[SharedLevel]
    order: Tensor
    inverse_order: Tensor
    prefix_lengths: Tensor
    suffix_lengths: Tensor
    longest_suffix: int
    equal_lengths: bool
    max_position: int
    windows: set[int] = field(default_factory=set)
    attended_layers: set[int] = field(default_factory=set)
    _level_masks: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)
    _suffix_masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def set_suffix_lengths(self, suffix_lengths: Tensor, longest_suffix: int, equal_lengths: bool) -> None:
        """Replace the lengths of the suffixes, and drop the masks that depend on them.

        Args:
            suffix_lengths: ``(B,)`` int64.
            longest_suffix: The largest of them, so that the device need not be asked.
            equal_lengths: Whether they are all equal.
        """
        self.suffix_lengths, self.longest_suffix, self.equal_lengths = suffix_lengths, longest_suffix, equal_lengths
        self._suffix_masks = {}
        # A level's mask depends on the suffixes only where a sliding window cuts it.
        self._level_masks = {key: mask for key, mask in self._level_masks.items() if key[2] == 0}

    def level_mask(
        self, level_index: int, group_index: int, window: int, queries_per_key: int, query: Tensor
    ) -> Tensor | None:
        """Build the mask of one group of a level.

        Args:
            level_index: Index of the level.
            group_index: Index of the group in the level.
            window: Positions that a query sees, itself included; 0 for all.
            queries_per_key: Query heads that share one head of keys and values.
            query: ``(B, H, T', D)``, for its number of steps, dtype and device.

        Returns:
            Additive ``(1, 1, n * queries_per_key * T', T)`` for the ``n`` rows of the group, or None where every
            position is seen.
        """
        level, steps = self.levels[level_index], query.shape[2]
        group = level.groups[group_index]
        cutting_window = window if 0 < window <= self.max_position else 0
        if not cutting_window and not group.unequal_reads:
            return None
        mask_key = (level_index, group_index, cutting_window, queries_per_key)
        if mask_key not in self._level_masks:
            rows = slice(group.first_row, group.stop_row)
            key_positions = torch.arange(group.longest_read, device=query.device)
            visible = key_positions < level.read_lengths[rows, None, None]  # (n, 1, T)
            if cutting_window:
                suffix_starts = (self.prefix_lengths + self.suffix_lengths)[self.order[rows], None]
                query_positions = suffix_starts + torch.arange(steps, device=query.device)  # (n, T')
                text_positions = level.offsets[rows, None, None] + key_positions
                visible = visible & (text_positions > query_positions[..., None] - cutting_window)  # (n, T', T)
            stacked = visible[:, None].expand(-1, queries_per_key, steps, -1).reshape(1, 1, -1, group.longest_read)
            self._level_masks[mask_key] = additive_mask(stacked, query.dtype)
        return self._level_masks[mask_key]

    def suffix_mask(self, length: int, window: int, queries_per_key: int, query: Tensor) -> Tensor | None:
        """Build the mask of the rows' own suffixes.

        Args:
            length: ``L``, positions of the suffix cache that are read.
            window: Positions that a query sees, itself included; 0 for all.
            queries_per_key: Query heads that share one head of keys and values.
            query: ``(B, H, T', D)``, for its number of steps, dtype and device.

        Returns:
            Additive ``(B or 1, 1, queries_per_key * T', L)``, or None where every position is seen.
        """
        steps = query.shape[2]
        cutting_window = window if 0 < window < length else 0
        if self.equal_lengths and steps == 1 and not cutting_window:
            return None
        mask_key = (length, cutting_window, queries_per_key)
        if mask_key not in self._suffix_masks:
            key_positions = torch.arange(length, device=query.device)
            longest = self.longest_suffix
            suffix_lengths = key_positions[longest : longest + 1] if self.equal_lengths else self.suffix_lengths
            query_positions = suffix_lengths[:, None] + torch.arange(steps, device=query.device)  # (B or 1, T')
            visible = key_positions <= query_positions[..., None]
            if cutting_window:
                visible = visible & (key_positions > query_positions[..., None] - cutting_window)
            stacked = visible[:, None].expand(-1, queries_per_key, -1, -1).reshape(len(suffix_lengths), 1, -1, length)
            self._suffix_masks[mask_key] = additive_mask(stacked, query.dtype)
        return self._suffix_masks[mask_key]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where ``visible`` is true, and the lowest finite number elsewhere.

    With -inf, a row that sees nothing of a part would get a weight of NaN there in place of 0.

    Args:
        visible: ``(…, T)`` bool.
        dtype: Of the scores.

    Returns:
        ``(…, T)``, whose rows start at multiples of 16 numbers in memory, as kernels need them.

    Examples:
        >>> additive_mask(torch.tensor([True, False]), torch.float16).tolist()
        [0.0, -65504.0]
    """
    length = visible.shape[-1]
    padded = torch.zeros(*visible.shape[:-1], -(-length // 16) * 16, dtype=dtype, device=visible.device)
    return padded[..., :length].masked_fill_(~visible, torch.finfo(dtype).min)
