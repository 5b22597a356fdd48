r"""Attention of one token in each slot, to the prefixes that the slots share and to their own suffixes.

Attention to a block of prefixes gives outputs and the log-sum-exp of its scores. Each enters the attention to the
suffix as one more position: the log-sum-exp as its score, the output as its value. One softmax over all of these is
then the softmax over all positions, since :math:`e^{\ell_i}` is the sum of the exponentials of part :math:`i`.
"""

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.attention import attend
from odp_callbacks.engine.sampling.decoder.layers import HeadShape
from odp_callbacks.engine.sampling.decoder.prefix_blocks import PrefixBlock, prefix_blocks
from odp_callbacks.engine.sampling.decoder.slot_indices import BlockIndices
from odp_callbacks.engine.sampling.decoder.suffix_storage import SuffixStorage
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView, additive_mask

WIDTH_STEP = 16
"""The suffixes are read up to a multiple of this many positions, so that shapes seldom change."""
CALL_OPERATIONS = {"cpu": 1e6}
"""Floating-point operations that take as long as the calls for one more block of prefixes, by device type."""
ACCELERATOR_CALL_OPERATIONS = 3e8
MOST_SLICES = 64
"""Slices of the stored prefixes that are kept."""


class SlotAttention:
    """Attends for one token of each slot.

    Args:
        heads: Sizes of the attention.
        layer_count: Layers of the model.
        cache: Keys and values of the prefixes.
        capacity: The largest number of tokens of a suffix.
        dtype: In which the layers compute.
    """

    def __init__(
        self, heads: HeadShape, layer_count: int, cache: PrefixCache, capacity: int, dtype: torch.dtype
    ) -> None:
        self.heads, self.dtype = heads, dtype
        level_count = bool(cache.prompt_layers) + bool(cache.response_layers)
        device = (cache.prompt_layers or cache.response_layers)[0][0].device
        self.suffixes = SuffixStorage(heads, layer_count, level_count * heads.queries_per_key, capacity, dtype, device)
        operations = CALL_OPERATIONS.get(device.type, ACCELERATOR_CALL_OPERATIONS)
        self.call_cost = operations / (4 * heads.key_heads * heads.queries_per_key * heads.width)
        # So torch's kernel for the CPU lays them out in memory.
        self.sums_by_query = device.type == "cpu"
        # Sums of exponentials in half precision would be too coarse.
        self.score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.blocks: list[PrefixBlock] = []
        self._slices: dict[tuple[int, int, int, int], list[tuple[Tensor, Tensor]]] = {}
        self._block_masks: dict[tuple[int, int], Tensor | None] = {}
        self._suffix_masks: dict[int, Tensor] = {}
        self._width = 0

    def set_row_count(self, row_count: int) -> None:
        """Add slots at the end."""
        self.suffixes.set_row_count(row_count)

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given slots to the front, in their order, and drop the others."""
        self.suffixes.keep_rows(rows)

    def set_view(self, view: SharedPrefixView) -> None:
        """Describe anew what the slots share.

        Args:
            view: Its rows are the slots.
        """
        self.view, self._width = view, 0
        self.blocks = prefix_blocks(view, self.call_cost)
        self.indices = [BlockIndices.of(block, self.heads, self.suffixes) for block in self.blocks]
        self._query_rows = [len(indices.queries) for indices in self.indices]
        self._query_index = torch.cat([indices.queries for indices in self.indices]) if self.indices else None
        self._prefix_slices = [self._slice(block) for block in self.blocks]
        self._block_masks = {}

    def start_step(self) -> None:
        """Prepare what all layers share in a step, for the lengths of the suffixes that the view has now."""
        view, suffixes = self.view, self.suffixes
        width = min(-(-(view.longest_suffix + 1) // WIDTH_STEP) * WIDTH_STEP, suffixes.capacity)
        if width != self._width:
            self._width = width
            suffixes.set_width(width)
            rows = suffixes.row_count * self.heads.key_heads * self.heads.queries_per_key
            columns = suffixes.reserved + width
            # One number more, for what the rows give that no slot has.
            self._flat_scores = torch.zeros(rows * columns + 1, dtype=self.score_dtype, device=view.order.device)
            self._scores = self._flat_scores[:-1].view(-1, self.heads.queries_per_key, columns)
            self._score_indices = [
                indices.scores(columns, rows, by_query=self.sums_by_query) for indices in self.indices
            ]
        suffixes.set_lengths(view.suffix_lengths)
        self._suffix_masks = {}
        # The mask of a block depends on the suffixes only where a sliding window cuts it.
        self._block_masks = {key: mask for key, mask in self._block_masks.items() if key[1] == 0}

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
        heads, suffixes = self.heads, self.suffixes
        window = window if 0 < window <= self.view.max_position else 0
        by_head = query_key_value.view(-1, heads.queries_per_key + 2, heads.width)
        suffixes.write(layer_index, by_head[:, heads.queries_per_key :])
        keys, values = suffixes.layers[layer_index]
        queries, mask = by_head[:, : heads.queries_per_key], self._suffix_mask(window)
        if self.score_dtype == self.dtype:
            torch.baddbmm(mask, queries, keys, alpha=scaling, out=self._scores)
        else:
            self._scores.copy_(torch.baddbmm(mask, queries, keys, alpha=scaling))
        if self._query_index is not None:
            self._attend_to_prefixes(layer_index, by_head, scaling, window)
        weights = torch.softmax(self._scores, dim=-1)
        if self.score_dtype != self.dtype:
            weights = weights.to(self.dtype)
        return torch.bmm(weights, values).view(len(query_key_value), -1)

    def _attend_to_prefixes(self, layer_index: int, by_head: Tensor, scaling: float, window: int) -> None:
        """Attend to every block, and enter outputs and log-sum-exps in the place that is reserved for them."""
        assert self._query_index is not None
        queries = by_head.view(-1, self.heads.width).index_select(0, self._query_index).split(self._query_rows)
        for number, (block, indices) in enumerate(zip(self.blocks, self.indices, strict=True)):
            keys, values = self._prefix_slices[number][layer_index]
            output, log_sums = attend(
                queries[number].view(indices.query_shape),
                keys,
                values,
                scaling,
                self._block_mask(number, block, window),
                fused=True,
            )
            self.suffixes.write_reserved(layer_index, indices.outputs, output)
            sums = log_sums.transpose(1, 2) if self.sums_by_query else log_sums
            self._flat_scores.index_copy_(0, self._score_indices[number], sums.reshape(-1))

    def _block_mask(self, number: int, block: PrefixBlock, window: int) -> Tensor | None:
        if (number, window) not in self._block_masks:
            self._block_masks[number, window] = block.mask(self.view, window, self.heads.queries_per_key, self.dtype)
        return self._block_masks[number, window]

    def _suffix_mask(self, window: int) -> Tensor:
        if window not in self._suffix_masks:
            lengths = self.view.suffix_lengths[:, None]
            visible = self.suffixes.columns <= lengths  # (B, X + L)
            if window:
                visible = visible & (self.suffixes.columns > lengths - window)
            visible = visible.repeat_interleave(self.heads.key_heads, dim=0)[:, None]
            self._suffix_masks[window] = additive_mask(visible, self.dtype)
        return self._suffix_masks[window]

    def _slice(self, block: PrefixBlock) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that a block reads, for each layer."""
        layers = self.view.levels[block.level].layers
        place = (id(layers), block.first_sequence, block.stop_sequence, block.longest_read)
        if place not in self._slices:
            if len(self._slices) >= MOST_SLICES:
                self._slices.clear()
            sequences = slice(block.first_sequence, block.stop_sequence)
            self._slices[place] = [
                (keys[sequences, :, : block.longest_read], values[sequences, :, : block.longest_read])
                for keys, values in layers
            ]
        return self._slices[place]
