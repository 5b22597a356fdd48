"""A causal language model in two parts: the body gives hidden states, the head turns them into logits.

Logits of a whole batch, ``(B, T, V)``, do not fit into memory for a vocabulary of 150,000 tokens. With the two parts
apart, logits exist only for a few hundred positions at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.functional.gradients import call_with_parameters, forward_arguments

Parameters = Mapping[str, Tensor] | None
"""Replacements for parameters of a model, by name."""


class SplitModel:
    """Hidden states of chosen positions, and the logits that belong to hidden states.

    The head is the model's own forward with the decoder's output put in its place: scaling and soft-capping of logits
    are those of the model. Where a trial finds that this does not reproduce the model's logits, :attr:`splits` is
    False: hidden states then are the logits themselves, and the head changes nothing.

    Args:
        model: A causal language model of transformers, with or without peft, in the mode that the caller wants.
        split: False keeps the parts together.

    Attributes:
        splits: Whether body and head are apart.
    """

    def __init__(self, model: nn.Module, *, split: bool = True) -> None:
        self.model = model
        wrapped: Any = model
        self._causal: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = getattr(self._causal, "base_model", None)
        self._decoder: Any = decoder if decoder is not self._causal else None
        self._cuts = "logits_to_keep" in forward_arguments(model)
        self.splits = split and self._decoder is not None and self._reproduces_the_logits()

    def hidden_states(
        self, sequences: Sequence[Tensor], positions: Sequence[Sequence[int]], parameters: Parameters = None
    ) -> Tensor:
        """Run the body over a padded batch.

        Args:
            sequences: ``(T_b,)`` int64 each, without padding.
            positions: For each sequence, the ``N_b`` positions that are wanted.
            parameters: Replacements for parameters.

        Returns:
            ``(N, H)`` with ``N`` the sum of ``N_b``, sequence by sequence; ``(N, V)`` logits if the model does not
            split.
        """
        device = next(self.model.parameters()).device
        ids = pad_sequence([sequence.cpu() for sequence in sequences], batch_first=True).to(device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        rows = torch.tensor([row for row, wanted in enumerate(positions) for _ in wanted], device=device)
        columns = torch.tensor([position for wanted in positions for position in wanted], device=device)
        keywords: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if int(lengths.min()) < ids.shape[1]:
            keywords["attention_mask"] = mask
        if not self.splits:
            logits: Tensor = call_with_parameters(self.model, parameters, keywords).logits
            return logits[rows, columns]
        return self._body(keywords, parameters)[rows, columns]

    def logits(self, hidden: Tensor, parameters: Parameters = None) -> Tensor:
        """Run the head.

        Args:
            hidden: ``(N, H)`` from :meth:`hidden_states`.
            parameters: Replacements for parameters.

        Returns:
            ``(N, V)``.
        """
        if not self.splits:
            return hidden
        output_type = self._output_type
        decoder = self._decoder
        own_forward = decoder.__dict__.get("forward")

        def replaced(*_: Any, **__: Any) -> Any:
            return output_type(last_hidden_state=hidden[None])

        decoder.forward = replaced
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            keywords = {"input_ids": ids, "use_cache": False}
            output: Tensor = call_with_parameters(self.model, parameters, keywords).logits[0]
        finally:
            if own_forward is None:
                del decoder.forward
            else:
                decoder.forward = own_forward
        return output

    def _body(self, keywords: dict[str, Any], parameters: Parameters) -> Tensor:
        """The decoder's last hidden state, ``(B, T, H)``."""
        outputs: list[Any] = []
        handle = self._decoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            if self._cuts:
                keywords = {**keywords, "logits_to_keep": 1}
            call_with_parameters(self.model, parameters, keywords)
        finally:
            handle.remove()
        (output,) = outputs
        self._output_type = type(output)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def _reproduces_the_logits(self) -> bool:
        device = next(self.model.parameters()).device
        ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=device)
        keywords: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        self.splits = True
        try:
            expected = self.model(**keywords).logits
            hidden = self._body(keywords, None)
            actual = self.logits(hidden.flatten(0, 1)).unflatten(0, ids.shape)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            return False
        # Half precision rounds a product over H by the kernel that the shape selects.
        tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
        scale = float(expected.abs().max())
        return actual.shape == expected.shape and float((actual - expected).abs().max()) <= tolerance * max(scale, 1.0)
