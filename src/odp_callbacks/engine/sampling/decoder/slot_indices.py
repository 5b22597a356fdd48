"""Where the queries of a block of prefixes come from, and where its outputs go."""

from dataclasses import dataclass

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.decoder.layers import HeadShape
from odp_callbacks.engine.sampling.decoder.prefix_blocks import PrefixBlock
from odp_callbacks.engine.sampling.decoder.suffix_storage import SuffixStorage


@dataclass(frozen=True)
class BlockIndices:
    """Indices of one block of ``G`` sequences with ``n`` rows each, in the order ``(G, H', n, Q)``.

    Attributes:
        queries: ``(G * H' * n * Q,)`` int64, into all vectors of queries, keys and values of the slots.
        query_shape: ``(G, H', n * Q, D)``, of the queries that these select.
        outputs: ``(G * H' * n * Q,)`` int64, into the vectors of a layer's storage of suffixes.
        score_rows: ``(G, H', n * Q)`` int64, into the rows of the scores; -1 for rows that no slot has.
        score_columns: The same shape, into the columns.
    """

    queries: Tensor
    query_shape: tuple[int, int, int, int]
    outputs: Tensor
    score_rows: Tensor
    score_columns: Tensor

    @classmethod
    def of(cls, block: PrefixBlock, heads: HeadShape, suffixes: SuffixStorage) -> "BlockIndices":
        """Compute the indices.

        Args:
            block: Its slots.
            heads: ``H'`` heads of keys, ``Q`` queries for each.
            suffixes: Where the outputs go.
        """
        device, per_key = block.slots.device, heads.queries_per_key
        head, query = torch.arange(heads.key_heads, device=device), torch.arange(per_key, device=device)
        # Rows that no slot has read the queries of the first slot, and nothing reads what they give.
        slots = block.slots[:, None, :, None]  # (G, 1, n, 1)
        row_heads = slots.clamp(min=0) * heads.key_heads + head[:, None, None]
        columns = block.level * per_key + query
        is_slot = (slots >= 0).expand(-1, heads.key_heads, -1, per_key)
        outputs = torch.where(is_slot, suffixes.value_rows(row_heads, columns), suffixes.spare_row)
        shape = (len(block.slots), heads.key_heads, block.slots.shape[1] * per_key)
        return cls(
            (row_heads * (per_key + 2) + query).flatten(),
            (*shape, heads.width),
            outputs.flatten(),
            torch.where(is_slot, row_heads * per_key + query, -1).reshape(shape),
            columns.expand_as(is_slot).reshape(shape),
        )

    def scores(self, width: int, row_count: int, *, by_query: bool) -> Tensor:
        """Indices into the flattened scores.

        Args:
            width: Columns of the scores.
            row_count: Rows of the scores; one more number follows them.
            by_query: Whether log-sum-exps lie in memory as ``(G, n * Q, H')``.

        Returns:
            ``(G * H' * n * Q,)`` int64.
        """
        places = self.score_rows * width + self.score_columns
        places = torch.where(self.score_rows >= 0, places, row_count * width)
        return (places.transpose(1, 2) if by_query else places).flatten()
