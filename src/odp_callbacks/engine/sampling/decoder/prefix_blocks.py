"""Which slots read which stored prefixes, as few batches of equal shape.

The sequences of a level are stored in one tensor. A slice of it is read by all slots that continue one of its
sequences, in one call: each sequence gets as many rows as the one that most slots continue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.shared_prefix import RowGroup, SharedPrefixView, additive_mask


@dataclass(frozen=True)
class PrefixBlock:
    """Neighbouring sequences of a level, and the slots that read them.

    Attributes:
        level: Index of the level.
        first_sequence: The first sequence of the slice.
        stop_sequence: One past the last.
        longest_read: ``T``, positions that the slice has.
        slots: ``(G, n)`` int64, the slots of each sequence; -1 where it has fewer.
        read_lengths: ``(G, n)`` int64, positions that each of these slots reads.
        offsets: ``(G, n)`` int64, the position in the text at which the slot's sequence starts.
        reads_all: Whether every slot reads all positions of the slice.
    """

    level: int
    first_sequence: int
    stop_sequence: int
    longest_read: int
    slots: Tensor
    read_lengths: Tensor
    offsets: Tensor
    reads_all: bool

    def mask(self, view: SharedPrefixView, window: int, queries_per_key: int, dtype: torch.dtype) -> Tensor | None:
        """Build the mask of the block for one token of each slot.

        Args:
            view: What the slots share.
            window: Positions that a query sees, itself included; 0 for all.
            queries_per_key: Query heads that share one head of keys and values.
            dtype: Of the mask.

        Returns:
            Additive ``(G, 1, n * queries_per_key, T)``, or None where every position is seen.
        """
        if self.reads_all and not window:
            return None
        key_positions = torch.arange(self.longest_read, device=self.slots.device)
        visible = key_positions < self.read_lengths[..., None]  # (G, n, T)
        if window:
            query_positions = (view.prefix_lengths + view.suffix_lengths)[self.slots]
            visible = visible & (self.offsets[..., None] + key_positions > query_positions[..., None] - window)
        return additive_mask(visible.repeat_interleave(queries_per_key, dim=1), dtype)[:, None]


def prefix_blocks(view: SharedPrefixView, call_cost: float) -> list[PrefixBlock]:
    """Describe what the slots of a batch read, in as few blocks as do not waste too much.

    Args:
        view: What the slots share.
        call_cost: How much reading costs as much as another block: rows times positions.
    """
    blocks = []
    for level_index, level in enumerate(view.levels):
        for groups in joined_groups(level.groups, call_cost):
            sequences = [group.sequence for group in groups]
            first, stop = min(sequences), max(sequences) + 1
            most_rows = max(group.stop_row - group.first_row for group in groups)
            places = torch.full((stop - first, most_rows), -1)
            for group in groups:
                places[group.sequence - first, : group.stop_row - group.first_row] = torch.arange(
                    group.first_row, group.stop_row
                )
            places = places.to(view.order.device)
            longest = max(group.longest_read for group in groups)
            is_row = places >= 0
            blocks.append(
                PrefixBlock(
                    level_index,
                    first,
                    stop,
                    longest,
                    torch.where(is_row, view.order[places], -1),
                    torch.where(is_row, level.read_lengths[places], longest),
                    torch.where(is_row, level.offsets[places], 0),
                    not any(group.unequal_reads or group.longest_read < longest for group in groups),
                )
            )
    return blocks


def joined_groups(groups: Sequence[RowGroup], call_cost: float) -> list[list[RowGroup]]:
    """Join neighbouring groups as long as what is read in vain costs less than another call.

    Args:
        groups: The groups of a level, by their rows.
        call_cost: In rows times positions.

    Examples:
        >>> groups = [RowGroup(0, 0, 2, 10, False), RowGroup(1, 2, 4, 10, False), RowGroup(2, 4, 5, 1000, False)]
        >>> [len(joined) for joined in joined_groups(groups, call_cost=100)]
        [2, 1]
    """
    joined: list[list[RowGroup]] = []
    for group in groups:
        if joined:
            together, apart = _padded_cost([*joined[-1], group]), _padded_cost(joined[-1]) + _padded_cost([group])
            if together <= apart + call_cost:
                joined[-1].append(group)
                continue
        joined.append([group])
    return joined


def _padded_cost(groups: Sequence[RowGroup]) -> int:
    sequences = [group.sequence for group in groups]
    rows = max(group.stop_row - group.first_row for group in groups)
    return (max(sequences) - min(sequences) + 1) * rows * max(group.longest_read for group in groups)
