"""The cache of the rows' own suffixes, which follow a shared prefix; its memory is allocated once."""

from functools import partial
from typing import TYPE_CHECKING

from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView

if TYPE_CHECKING:
    from transformers import Cache


def suffix_cache(row_count: int, capacity: int, view: SharedPrefixView) -> "Cache":
    """Create an empty cache for the rows' own suffixes.

    Args:
        row_count: ``B``, rows of the batch.
        capacity: ``L``, the largest number of tokens that a row's suffix will have.
        view: What the rows share. A forward pass writes the keys and values of each row at the row's suffix length in
            this view.
    """
    from transformers import Cache

    from odp_callbacks.engine.sampling.suffix_cache_layer import SuffixCacheLayer

    return Cache(layer_class_to_replicate=partial(SuffixCacheLayer, row_count, capacity, view))
