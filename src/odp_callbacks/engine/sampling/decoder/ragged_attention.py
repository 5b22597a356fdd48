"""Attention of one token in each slot by one kernel, whatever the lengths of what the slots read.

It serves on CUDA devices. All that changes from step to step lies in tensors that stay where they are in memory, so
that the launches of a step can be captured once and replayed (:mod:`~odp_callbacks.engine.sampling.step_graph`).
"""

from functools import cache as remembered

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.decoder.layers import HeadShape
from odp_callbacks.engine.sampling.decoder.suffix_storage import SuffixStorage
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.shared_prefix import KeyValueLayers, SharedLevel, SharedPrefixView

PROMPT, PROMPT_LENGTH, RESPONSE, RESPONSE_LENGTH, RESPONSE_START, SUFFIX_START = range(6)
"""Rows of the table, as the kernel reads it."""
SERVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_attend_by_table(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be tried: on a CUDA device, where Triton is installed.

    Examples:
        >>> can_attend_by_table(torch.device("cpu"), torch.float32)
        False
    """
    return device.type == "cuda" and dtype in SERVED_DTYPES and _has_triton()


@remembered
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401  # only whether it is there
    except ImportError:
        return False
    return True


class RaggedSlotAttention:
    """Attends for one token of each slot.

    Args:
        heads: Sizes of the attention.
        layer_count: Layers of the model.
        cache: Keys and values of the prefixes.
        capacity: The largest number of tokens of a suffix.
        dtype: In which the layers compute.

    Raises:
        NotImplementedError: If the numbers of a key or value do not lie beside each other in memory.
    """

    def __init__(
        self, heads: HeadShape, layer_count: int, cache: PrefixCache, capacity: int, dtype: torch.dtype
    ) -> None:
        self.heads, self.cache = heads, cache
        device = (cache.prompt_layers or cache.response_layers)[0][0].device
        self.suffixes = SuffixStorage(heads, layer_count, 0, capacity, dtype, device)
        self.table = torch.zeros(6, 0, dtype=torch.long, device=device)
        stored = [states for layer in (*cache.prompt_layers, *cache.response_layers) for states in layer]
        if any(states.stride(-1) != 1 for states in stored):
            raise NotImplementedError("keys or values do not lie beside each other in memory")

    def set_row_count(self, row_count: int) -> None:
        """Add slots at the end."""
        self.suffixes.set_row_count(row_count)
        self._set_rows()

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given slots to the front, in their order, and drop the others."""
        self.suffixes.keep_rows(rows)
        self._set_rows()

    def _set_rows(self) -> None:
        row_count = self.suffixes.row_count
        self.suffixes.set_width(self.suffixes.capacity)
        self.table = self.table.new_zeros(6, row_count)

    def set_view(self, view: SharedPrefixView) -> None:
        """Describe anew what the slots share.

        Args:
            view: Its rows are the slots.
        """
        self.view = view
        # In place, since a captured step reads the table where it is.
        self.table.zero_()
        for level in view.levels:
            first = PROMPT if level.layers is self.cache.prompt_layers else RESPONSE
            sequences = _sequences(level).to(self.table.device)
            self.table[first] = sequences[view.inverse_order]
            self.table[first + 1] = level.read_lengths[view.inverse_order]
            if first == RESPONSE:
                self.table[RESPONSE_START] = level.offsets[view.inverse_order]
        self.table[SUFFIX_START] = view.prefix_lengths

    def start_step(self) -> None:
        """Prepare what all layers share in a step, for the lengths of the suffixes that the view has now."""
        self.suffixes.set_lengths(self.view.suffix_lengths)

    def attend(self, layer_index: int, query_key_value: Tensor, scaling: float, window: int) -> Tensor:
        """Attend in one layer, and keep the new keys and values.

        Args:
            layer_index: Index of the layer.
            query_key_value: ``(B, H', queries_per_key + 2, D)``: queries, key and value of each head of keys.
            scaling: Factor of the scores.
            window: Positions that a query sees, itself included; 0 for all.

        Returns:
            ``(B, H * D)``.
        """
        from odp_callbacks.engine.sampling.decoder.ragged_kernel import attend_by_table

        heads, suffixes = self.heads, self.suffixes
        by_head = query_key_value.view(-1, heads.queries_per_key + 2, heads.width)
        suffixes.write(layer_index, by_head[:, heads.queries_per_key :])
        suffix = suffixes.by_slot(layer_index)
        return attend_by_table(
            query_key_value,
            (
                _states(self.cache.prompt_layers, layer_index, suffix),
                _states(self.cache.response_layers, layer_index, suffix),
                suffix,
            ),
            self.table,
            self.view.suffix_lengths,
            heads,
            scaling,
            window,
        )


def _states(layers: KeyValueLayers, layer_index: int, others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of a level; where there is none, others stand in, of which nothing is read."""
    return layers[layer_index] if layers else others


def _sequences(level: SharedLevel) -> Tensor:
    """The sequence that each row of a level reads, ``(B,)`` int64 in the view's order; 0 for rows that read nothing."""
    sequences = torch.zeros(len(level.read_lengths), dtype=torch.long)
    for group in level.groups:
        sequences[group.first_row : group.stop_row] = group.sequence
    return sequences
