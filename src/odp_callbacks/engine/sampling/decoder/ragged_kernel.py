"""A Triton kernel: one token of each slot attends to its prompt, its response and its suffix, of whatever lengths.

What a slot reads stands in a table in memory, so that the launch depends on the number of slots alone. A captured graph
of launches therefore serves while requests come and go. Keys that slots share are read once from memory, since the
programs of one batch find them in the cache of the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from odp_callbacks.engine.sampling.decoder.layers import HeadShape

POSITIONS_PER_BLOCK = 64
SMALLEST_TILE = 16
"""Rows of the smallest matrix product of Triton."""


def attend_by_table(
    query_key_value: Tensor,
    parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    table: Tensor,
    suffix_lengths: Tensor,
    heads: HeadShape,
    scaling: float,
    window: int,
) -> Tensor:
    """Attend for one token of each slot.

    Args:
        query_key_value: ``(B, H', queries_per_key + 2, D)``, contiguous: queries, key and value of each head of keys.
        parts: Keys and values of prompts, of responses and of suffixes, ``(S, H', T, D)`` each. Suffix number ``i`` is
            that of slot ``i``.
        table: ``(6, B)`` int64, for each slot the index of its prompt, and how many positions of it are read; the same
            of its response; and where in the text the response and the suffix start.
        suffix_lengths: ``(B,)`` int64, tokens before this one; its own key and value stand behind them.
        heads: Sizes of the attention.
        scaling: Factor of the scores.
        window: Positions that a query sees, itself included; 0 for all.

    Returns:
        ``(B, H * D)``.
    """
    slot_count = len(query_key_value)
    outputs = query_key_value.new_empty(slot_count, heads.key_heads * heads.queries_per_key * heads.width)
    states = [states for part in parts for states in part]
    # float32 is not rounded to TF32 ("ieee" below): logits are compared with those of the model's own forward pass.
    _attend[(slot_count, heads.key_heads)](
        query_key_value,
        *states,
        *[stride for part in states for stride in part.stride()[:3]],
        table,
        suffix_lengths,
        outputs,
        slot_count,
        scaling,
        window,
        queries_per_key=heads.queries_per_key,
        width=heads.width,
        padded_queries=max(SMALLEST_TILE, triton.next_power_of_2(heads.queries_per_key)),
        padded_width=max(SMALLEST_TILE, triton.next_power_of_2(heads.width)),
        block=POSITIONS_PER_BLOCK if query_key_value.dtype != torch.float32 else POSITIONS_PER_BLOCK // 2,
    )
    return outputs


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _attend_to_part(  # type: ignore[no-untyped-def]  # Triton compiles it
    query,
    highest,
    total,
    context,
    keys,
    values,
    key_step,
    value_step,
    first,
    stop,
    scaling,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    block: tl.constexpr,
):
    """Add the positions from ``first`` to ``stop`` of one sequence to a softmax that is being summed up.

    It is called for each part in turn: a kernel has no lists of pointers to go through.
    """
    columns = tl.arange(0, padded_width)
    for start in range(first, stop, block):
        positions = start + tl.arange(0, block)
        is_read = positions < stop
        is_number = is_read[:, None] & (columns < width)[None, :]
        key = tl.load(keys + positions[:, None] * key_step + columns[None, :], mask=is_number, other=0.0)
        value = tl.load(values + positions[:, None] * value_step + columns[None, :], mask=is_number, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        scores = tl.where(is_read[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrinking = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        total = total * shrinking + tl.sum(weights, 1)
        context = context * shrinking[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = new_highest
    return highest, total, context


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _attend(  # type: ignore[no-untyped-def]  # Triton compiles it
    query_key_value,
    prompt_keys,
    prompt_values,
    response_keys,
    response_values,
    suffix_keys,
    suffix_values,
    prompt_key_sequence,
    prompt_key_head,
    prompt_key_step,
    prompt_value_sequence,
    prompt_value_head,
    prompt_value_step,
    response_key_sequence,
    response_key_head,
    response_key_step,
    response_value_sequence,
    response_value_head,
    response_value_step,
    suffix_key_sequence,
    suffix_key_head,
    suffix_key_step,
    suffix_value_sequence,
    suffix_value_head,
    suffix_value_step,
    table,
    suffix_lengths,
    outputs,
    slot_count,
    scaling,
    window,
    queries_per_key: tl.constexpr,
    width: tl.constexpr,
    padded_queries: tl.constexpr,
    padded_width: tl.constexpr,
    block: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_heads = tl.num_programs(1)
    rows = tl.arange(0, padded_queries)
    columns = tl.arange(0, padded_width)
    is_query = (rows < queries_per_key)[:, None] & (columns < width)[None, :]
    row_head = slot * key_heads + head
    query = tl.load(
        query_key_value + (row_head * (queries_per_key + 2) + rows[:, None]) * width + columns[None, :],
        mask=is_query,
        other=0.0,
    )
    prompt = tl.load(table + slot)
    prompt_length = tl.load(table + slot_count + slot)
    response = tl.load(table + 2 * slot_count + slot)
    response_length = tl.load(table + 3 * slot_count + slot)
    response_start = tl.load(table + 4 * slot_count + slot)
    suffix_start = tl.load(table + 5 * slot_count + slot)
    suffix_length = tl.load(suffix_lengths + slot)
    first_seen = suffix_start * 0
    if window > 0:
        first_seen = tl.maximum(suffix_start + suffix_length + 1 - window, 0)
    # Finite, so that the first block's factor is 0 and not NaN.
    highest = tl.full((padded_queries,), -1e38, tl.float32)
    total = tl.zeros((padded_queries,), tl.float32)
    context = tl.zeros((padded_queries, padded_width), tl.float32)
    highest, total, context = _attend_to_part(
        query,
        highest,
        total,
        context,
        prompt_keys + prompt * prompt_key_sequence + head * prompt_key_head,
        prompt_values + prompt * prompt_value_sequence + head * prompt_value_head,
        prompt_key_step,
        prompt_value_step,
        first_seen,
        prompt_length,
        scaling,
        width,
        padded_width,
        block,
    )
    highest, total, context = _attend_to_part(
        query,
        highest,
        total,
        context,
        response_keys + response * response_key_sequence + head * response_key_head,
        response_values + response * response_value_sequence + head * response_value_head,
        response_key_step,
        response_value_step,
        tl.maximum(first_seen - response_start, 0),
        response_length,
        scaling,
        width,
        padded_width,
        block,
    )
    highest, total, context = _attend_to_part(
        query,
        highest,
        total,
        context,
        suffix_keys + slot * suffix_key_sequence + head * suffix_key_head,
        suffix_values + slot * suffix_value_sequence + head * suffix_value_head,
        suffix_key_step,
        suffix_value_step,
        tl.maximum(first_seen - suffix_start, 0),
        suffix_length + 1,
        scaling,
        width,
        padded_width,
        block,
    )
    context = context / total[:, None]
    tl.store(
        outputs + (row_head * queries_per_key + rows[:, None]) * width + columns[None, :],
        context.to(outputs.dtype.element_ty),
        mask=is_query,
    )
