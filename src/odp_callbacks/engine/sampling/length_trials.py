"""Trials at the lengths that will be used: whether logits depend on the total length, and which backends still work.

A model with long-rope rotates all positions differently once the sequence exceeds a length, and keys that were cached
before are then wrong. A model that builds a mask of its own beyond a window may not hand it to the attention function.
Neither shows in a trial of a few tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.backend_trials import check_attention, check_generated, forward_continuations
from odp_callbacks.engine.sampling.model_forward import forward_with_cache
from odp_callbacks.engine.sampling.prefix_cache import extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.repeated_cache import copy_prefixes
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.sampling.trial_logits import check_logits, own_logits, random_sequences

LENGTH_RATIO = 4
"""Ratio of the lengths that are compared with the longest."""
RESPONSE_LENGTH, STEP_COUNT = 3, 2
"""Tokens of the trial that are read as a response, and as steps of a continuation; the others are the prompt."""
SHORTEST_TRIAL = 8
"""Tokens of the shortest trial."""


def check_independence(model: nn.Module, shortest: int, longest: int) -> None:
    """Check that logits depend on the tokens before them, and not on how many follow.

    Args:
        model: Causal language model, in evaluation mode.
        shortest: The smallest number of tokens in a forward pass.
        longest: The largest.

    Raises:
        ArithmeticError: If the logits of a shorter sequence differ from those at its end in the longest.
    """
    lengths = list(_lengths_between(shortest, longest))
    (token_ids,) = random_sequences(model, [longest])
    expected = [own_logits(model, token_ids[:length], [length - 1]) for length in lengths]
    if lengths:
        of_longest = own_logits(model, token_ids, [length - 1 for length in lengths])
        check_logits(model, torch.cat(expected), of_longest)


def _lengths_between(shortest: int, longest: int) -> Iterator[int]:
    """Yield lengths from ``shortest`` to below ``longest``.

    A model whose logits change above some length in between shows it at the longest of these that is not above it. A
    single token attends only to itself, wherever it is; the first length is therefore 2 at least.
    """
    length = max(2, shortest)
    while length < longest:
        yield length
        length *= LENGTH_RATIO


class CachedTrial:
    """Tries the ways to continue on cached keys and values at the end of one long sequence.

    Args:
        model: Causal language model, in evaluation mode.
        longest: Length of the sequence in tokens.
    """

    def __init__(self, model: nn.Module, longest: int) -> None:
        self.model = model
        (self.token_ids,) = random_sequences(model, [longest])
        self.prompt_length = longest - RESPONSE_LENGTH - STEP_COUNT
        self.positions = list(range(self.prompt_length, longest))
        self.expected = own_logits(model, self.token_ids, self.positions)  # (5, V)
        self.prompt = self.token_ids[: self.prompt_length]
        self.response = self.token_ids[self.prompt_length : longest - STEP_COUNT]
        self.steps: list[int] = self.token_ids[longest - STEP_COUNT :].tolist()

    def try_backend(self, backend: str) -> None:
        """Try one backend.

        Args:
            backend: One of :data:`~odp_callbacks.engine.sampling.backend_selection.BACKENDS`.

        Raises:
            ArithmeticError: If its logits differ from those of the full forward pass.
            NotImplementedError: If a layer cannot share a prefix.
        """
        if backend == "shared prefix":
            self._try_shared_prefix()
        elif backend == "repeated cache":
            self._try_copies([[token] for token in self.token_ids[self.prompt_length :].tolist()])
        elif backend == "generate":
            check_generated(self.model, self.prompt[None])

    def try_segments(self) -> None:
        """Try several tokens at once on a cache, as the segments of a backward pass use it.

        Raises:
            ArithmeticError: If its logits differ from those of the full forward pass.
        """
        self._try_copies([self.response.tolist(), self.steps])

    def _try_shared_prefix(self) -> None:
        last = list(range(RESPONSE_LENGTH))
        with torch.no_grad():
            prompts = prefill(self.model, [self.prompt])
            cache, (response_logits,) = extend_prefix_cache(self.model, prompts, [self.response], [0], [last])
        request = ContinuationRequest(0, self.prompt_length + RESPONSE_LENGTH, self.steps[0], STEP_COUNT)
        step_logits, view = forward_continuations(self.model, cache, [request], self.steps)
        check_attention(self.model, cache, view)
        self._check([response_logits, *step_logits])

    def _try_copies(self, parts: list[list[int]]) -> None:
        """Run parts of the sequence's end, one after the other, on a copy of its prompt's cache."""
        device = next(self.model.parameters()).device
        length = torch.tensor([self.prompt_length], device=device)
        all_logits = []
        with torch.no_grad():
            prefixes = prefill(self.model, [self.prompt])
            cache, attention_mask = copy_prefixes(prefixes, torch.zeros_like(length), length)
            for part in parts:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(1, len(part))], dim=1)
                offsets = torch.arange(len(part), device=device)
                logits = forward_with_cache(
                    self.model,
                    torch.tensor([part], device=device),
                    cache,
                    attention_mask=attention_mask,
                    position_ids=(length + offsets)[None],
                    logit_positions=offsets,
                )
                all_logits.append(logits[0])
                length = length + len(part)
        self._check(all_logits)

    def _check(self, all_logits: list[Tensor]) -> None:
        check_logits(self.model, self.expected, torch.cat(all_logits))
