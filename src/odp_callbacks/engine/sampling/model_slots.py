"""The slots of a batch of continuations, and what gives the logits of their next tokens."""

from typing import Protocol

from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import AttentionSwitch
from odp_callbacks.engine.sampling.model_forward import forward_with_cache
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView
from odp_callbacks.engine.sampling.suffix_cache import suffix_cache
from odp_callbacks.functional.gradients import forward_arguments


class Slots(Protocol):
    """Keeps the keys and values of each slot's suffix, and runs one token for each.

    Attributes:
        is_repeatable: Whether a step launches the same kernels on the same memory until the number of slots changes.
    """

    is_repeatable: bool

    def set_row_count(self, row_count: int) -> None:
        """Add slots at the end; the view follows."""

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given slots, ``(B',)`` int64, to the front, and drop the others; the view follows."""

    def set_view(self, view: SharedPrefixView) -> None:
        """Describe anew what the slots share."""

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run one token ``(B,)`` for each slot, at its position ``(B,)`` in the text; return logits ``(B, V)``."""


class ModelSlots:
    """Slots whose logits come from the forward pass of the model.

    Args:
        model: The student in evaluation mode; it must attend through transformers' attention interface.
        capacity: The largest number of tokens of a suffix.
    """

    is_repeatable = False

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        # Switched on for a step only: between steps, the source may run the model, or call the user's reward function.
        self.attention = AttentionSwitch(model)
        # Looked up once, because inspecting a signature at every token is slow.
        self.accepted_arguments = forward_arguments(model)
        self.row_count = 0
        self.view: SharedPrefixView | None = None

    def set_row_count(self, row_count: int) -> None:
        """Add slots at the end."""
        self.row_count = row_count
        if self.view is not None:
            for layer in self.suffixes.layers:
                layer.set_row_count(row_count)

    def keep_rows(self, rows: Tensor) -> None:
        """Move the given slots to the front, in their order, and drop the others."""
        self.row_count = len(rows)
        for layer in self.suffixes.layers:
            layer.keep_rows(rows)

    def set_view(self, view: SharedPrefixView) -> None:
        """Describe anew what the slots share."""
        if self.view is None:
            self.suffixes = suffix_cache(self.row_count, self.capacity, view)
        self.view = view
        for layer in self.suffixes.layers:
            layer.view = view

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run one token for each slot.

        Args:
            tokens: ``(B,)`` int64.
            positions: ``(B,)`` int64, their places in the text.

        Returns:
            Logits ``(B, V)``.
        """
        with self.attention.on():
            logits = forward_with_cache(
                self.model,
                tokens[:, None],
                self.suffixes,
                position_ids=positions[:, None],
                shared_prefix=self.view,
                accepted_arguments=self.accepted_arguments,
            )
        return logits[:, -1]
