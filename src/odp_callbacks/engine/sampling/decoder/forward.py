"""One token of every slot through the layers of a model that is built like Llama."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.decoder.layers import DecoderLayer, DecoderParts
from odp_callbacks.engine.sampling.decoder.ragged_attention import RaggedSlotAttention
from odp_callbacks.engine.sampling.decoder.slot_attention import SlotAttention
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView


class DecoderSlots:
    """The slots of a batch, and the model that gives the logits of their next tokens.

    Args:
        parts: The model's weights.
        cache: Keys and values of the prefixes.
        capacity: The largest number of tokens of a suffix.
        by_table: Whether one kernel attends for all slots, whatever they read.

    Attributes:
        is_repeatable: Whether a step launches the same kernels on the same memory until the number of slots changes.
    """

    def __init__(self, parts: DecoderParts, cache: PrefixCache, capacity: int, *, by_table: bool = False) -> None:
        self.parts, self.is_repeatable = parts, by_table
        attention = RaggedSlotAttention if by_table else SlotAttention
        self.attention: RaggedSlotAttention | SlotAttention = attention(
            parts.heads, len(parts.layers), cache, capacity, parts.dtype
        )
        width = parts.heads.width
        self._signs = torch.ones(width, device=parts.device)
        self._signs[: width // 2] = -1

    def set_view(self, view: SharedPrefixView) -> None:
        """Describe anew what the slots share."""
        self.attention.set_view(view)

    def set_row_count(self, row_count: int) -> None:
        """Add slots at the end."""
        self.attention.set_row_count(row_count)

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given slots to the front, in their order, and drop the others."""
        self.attention.keep_rows(rows)

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run one token for each slot.

        Args:
            tokens: ``(B,)`` int64.
            positions: ``(B,)`` int64, their places in the text.

        Returns:
            Logits ``(B, V)``.
        """
        parts = self.parts
        self.attention.start_step()
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = parts.embedding(tokens)  # (B, E)
            cosines, sines = parts.rotary(hidden[:, None], positions[:, None])  # (B, 1, D)
            rotation = cosines[:, None], (sines * self._signs.to(sines.dtype))[:, None]
            for index, layer in enumerate(parts.layers):
                self._add_layer(index, layer, hidden, rotation)
            hidden = parts.norm(hidden)
        with self._autocast(tokens.device.type, hidden.dtype):
            logits: Tensor = parts.head(hidden)
        return logits

    def _autocast(self, device_type: str, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Autocast for the head, where the model's layers computed under autocast."""
        if dtype == self.parts.dtype:
            return nullcontext()
        # Without a cache: the training's must stay as it is, and a captured step must not read what autocast may free.
        return torch.autocast(device_type, self.parts.dtype, cache_enabled=False)

    def _add_layer(self, index: int, layer: DecoderLayer, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        """Add what a layer computes to the hidden states ``(B, E)``."""
        dtype, heads = self.parts.dtype, self.parts.heads
        cosines, sines = rotation
        query_key_value = layer.query_key_value(_as(layer.attention_norm(hidden), dtype))
        by_head = query_key_value.view(len(hidden), heads.key_heads, heads.queries_per_key + 2, heads.width)
        rotated = by_head[:, :, :-1]  # queries and keys
        plain = rotated if layer.head_norm is None else layer.head_norm(rotated)
        swapped = plain.roll(heads.width // 2, -1)
        torch.addcmul(plain * cosines, swapped, sines, out=rotated)
        context = self.attention.attend(index, by_head, layer.attention.scaling, layer.attention.window)
        layer.attention_output.add(context, hidden)
        gate, up = layer.gate_up(_as(layer.mlp_norm(hidden), dtype)).chunk(2, dim=1)
        layer.down.add(layer.activation(gate).mul_(up), hidden)


def _as(states: Tensor, dtype: torch.dtype) -> Tensor:
    """The states in a dtype, without a call where they have it."""
    return states if states.dtype == dtype else states.to(dtype)
