"""A causal language model in two parts: the body gives hidden states, the head turns them into logits.

Logits of a whole batch, ``(B, T, V)``, do not fit into memory for a vocabulary of 150,000 tokens. With the two parts
apart, logits exist only for a few hundred positions at a time.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.layer_sizes import layer_sizes
from odp_callbacks.engine.replaced_forward import replaced_forward
from odp_callbacks.engine.sampling.backend_selection import depends_on_length, independent_groups
from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly, exact_arithmetic
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.sampling.rotary_state import FixedRotaries
from odp_callbacks.engine.sampling.trial_logits import check_logits
from odp_callbacks.engine.update.shared_prompts import SHARED_PROMPTS
from odp_callbacks.engine.update.token_layout import (
    TokenLayout,
    layout_of_sequences,
    packs_of_equal_prompts,
    shared_layout,
)
from odp_callbacks.functional.gradients import call_with_parameters, forward_arguments, lora_parameters

MAXIMUM_LOGITS = 2**23
"""Logits of one model that are held at a time on a CPU, and elsewhere where memory is scarce."""
MAXIMUM_LOGITS_ELSEWHERE = 2**26
"""The same where there is memory: an accelerator is idle between the operators of a few positions."""
BYTES_OF_LOGIT = 256
"""What a logit takes with the directions and features that are computed from it, at most."""
Parameters = Mapping[str, Tensor] | None
"""Replacements for parameters of a model, by name."""

_REPRODUCED: WeakKeyDictionary[nn.Module, type[Any] | None] = WeakKeyDictionary()
"""For models whose body and head gave their logits in a trial, the type of the body's output; None for others."""


def logits_at_a_time(device: torch.device, max_memory_bytes: float | None = None) -> int:
    """How many logits of one model are held at a time.

    Args:
        device: Where they are.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.

    Examples:
        >>> logits_at_a_time(torch.device("cpu")) == MAXIMUM_LOGITS
        True
    """
    if device.type == "cpu":
        return MAXIMUM_LOGITS
    fitting = free_bytes(device, max_memory_bytes) // BYTES_OF_LOGIT
    return max(MAXIMUM_LOGITS, min(MAXIMUM_LOGITS_ELSEWHERE, fitting))


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
        self._rotaries = FixedRotaries(model)
        self._hidden_size = layer_sizes(model).hidden
        self._output_type: type[Any] = type(None)
        self._cuts = "logits_to_keep" in forward_arguments(model)
        self.splits = split and self._decoder is not None and self._remembered_trial()

    def hidden_states(
        self, sequences: Sequence[Tensor], positions: Sequence[Sequence[int]], parameters: Parameters = None
    ) -> Tensor:
        """Run the body over a padded batch.

        Where hidden states depend on the total length, those of a position are of the sequence that ends there.

        Args:
            sequences: ``(T_b,)`` int64 each, without padding.
            positions: For each sequence, the ``N_b`` positions that are wanted.
            parameters: Replacements for parameters.

        Returns:
            ``(N, H)`` with ``N`` the sum of ``N_b``, sequence by sequence; ``(N, V)`` logits if the model does not
            split.
        """
        shortest = min((min(wanted) + 1 for wanted in positions if wanted), default=1)
        if sequences and depends_on_length(self.model, shortest, max(map(len, sequences))):
            of_prefixes = [
                self._hidden_states_of_prefixes(sequence, wanted, parameters)
                for sequence, wanted in zip(sequences, positions, strict=True)
            ]
            return torch.cat([hidden for hidden in of_prefixes if len(hidden)])
        return self.run(layout_of_sequences(sequences, positions), parameters)

    def layout(
        self, prompts: Sequence[Tensor], responses: Sequence[Sequence[int]], keys: Sequence[Hashable]
    ) -> TokenLayout | None:
        """Lay out responses for one forward pass; those to one prompt share it where the model can do that.

        Args:
            prompts: ``(P_r,)`` int64, the prompt of each response.
            responses: The tokens of each response, at least one.
            keys: Responses with different keys stay in different sequences.

        Returns:
            None if hidden states depend on the total length, so that one forward pass cannot give them.
        """
        lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
        if depends_on_length(self.model, min(map(len, prompts)), max(lengths)):
            return None
        packs = packs_of_equal_prompts(prompts, responses, keys, self._hidden_size)
        if any(len(pack) > 1 for pack in packs):
            longest_prompt, longest_response = max(map(len, prompts)), max(map(len, responses))
            if not SHARED_PROMPTS.work(self, longest_prompt, longest_response):
                packs = [[index] for index in range(len(responses))]
        return shared_layout(prompts, responses, packs)

    def _hidden_states_of_prefixes(self, sequence: Tensor, positions: Sequence[int], parameters: Parameters) -> Tensor:
        """Hidden states ``(N, H)`` at the ends of prefixes, each as its prefix alone has it."""
        rows: dict[int, Tensor] = {}
        for group in independent_groups(self.model, [position + 1 for position in positions]):
            of_group = [positions[index] for index in group]
            hidden = self.run(layout_of_sequences([sequence[: of_group[-1] + 1]], [of_group]), parameters)
            rows.update(zip(group, hidden, strict=True))
        return torch.stack([rows[index] for index in range(len(positions))]) if rows else torch.empty(0)

    def run(self, layout: TokenLayout, parameters: Parameters = None) -> Tensor:
        """Run the body once.

        Args:
            layout: The batch.
            parameters: Replacements for parameters.

        Returns:
            ``(N, H)``, or ``(N, V)`` logits if the model does not split.
        """
        device = next(self.model.parameters()).device
        keywords: dict[str, Any] = {"input_ids": layout.ids.to(device), "use_cache": False}
        size = layout.ids.shape[1]
        if layout.branches is not None and layout.positions is not None:
            keywords["position_ids"] = layout.positions.to(device)
            keywords["attention_mask"] = self._attention_mask(layout.visible().to(device))
        elif int(layout.lengths.min()) < size:
            keywords["attention_mask"] = (torch.arange(size) < layout.lengths[:, None]).long().to(device)
        with self._rotaries.at(layout.longest):
            if not self.splits:
                found: Tensor = call_with_parameters(self.model, parameters, keywords).logits
            else:
                found = self._body(keywords, parameters)
            # A model on several devices returns them on another one than it reads.
            return found[layout.rows.to(found.device), layout.columns.to(found.device)]

    def _attention_mask(self, visible: Tensor) -> Tensor:
        """``(B, 1, L, L)``: bool for the fused attention, which takes every dtype, and to be added for the others."""
        if getattr(self._causal.config, "_attn_implementation", None) == "sdpa":
            return visible[:, None]
        dtype = self._causal.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )[:, None]

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
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        keywords = {"input_ids": ids, "use_cache": False}
        with replaced_forward(self._decoder, lambda *_, **__: output_type(last_hidden_state=hidden[None])):
            output: Tensor = call_with_parameters(self.model, parameters, keywords).logits[0]
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

    def _remembered_trial(self) -> bool:
        """The result of the trial, which is done once for each model."""
        if self.model not in _REPRODUCED:
            _REPRODUCED[self.model] = self._output_type if self._reproduces_the_logits() else None
        found = _REPRODUCED[self.model]
        self._output_type = found or self._output_type
        return found is not None

    def _reproduces_the_logits(self) -> bool:
        """Whether body and head give the model's logits: in its own precision, and without rounding to half."""
        if not computes_exactly(self.model) and not self._passes_trial():
            return False
        with exact_arithmetic(self.model):
            return self._passes_trial()

    @torch.no_grad()
    def _passes_trial(self) -> bool:
        device = next(self.model.parameters()).device
        ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=device)
        keywords: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        self.splits = True
        try:
            expected = self.model(**keywords).logits
            hidden = self._body(keywords, None)
            actual = self.logits(hidden.flatten(0, 1)).unflatten(0, ids.shape)
            if actual.shape != expected.shape:
                return False
            check_logits(self.model, expected.flatten(0, 1), actual.flatten(0, 1))
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            return False
        return True


def head_has_lora(student: nn.Module) -> bool:
    """Whether LoRA parameters of a student act on the logits without acting on the hidden states.

    Args:
        student: Student with LoRA.
    """
    head = getattr(student, "get_output_embeddings", lambda: None)()
    # A parameter that the head shares with the embeddings is another object in the same memory.
    inside = {p.data_ptr() for p in head.parameters() if p.numel()} if isinstance(head, nn.Module) else set()
    return any(p.data_ptr() in inside for p in lora_parameters(student).values())
