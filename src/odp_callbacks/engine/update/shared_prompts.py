"""Whether a model gives its own logits where responses share the tokens of their prompt in one sequence."""

from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odp_callbacks.engine.prompts import context_limit
from odp_callbacks.engine.sampling.exact_arithmetic import exact_arithmetic
from odp_callbacks.engine.sampling.length_verdicts import rounded_up
from odp_callbacks.engine.sampling.rotary_state import preserving_rotary_state
from odp_callbacks.engine.sampling.trial_logits import check_logits, random_sequences
from odp_callbacks.engine.update.token_layout import TokenLayout, shared_layout
from odp_callbacks.functional.gradients import forward_arguments


class RunsLayouts(Protocol):
    """A model that runs a batch, as :class:`~odp_callbacks.engine.update.split_model.SplitModel` does."""

    model: nn.Module

    def run(self, layout: TokenLayout, parameters: Any = None) -> Tensor:
        """Hidden states at the positions of the layout."""

    def logits(self, hidden: Tensor, parameters: Any = None) -> Tensor:
        """Logits that belong to hidden states."""


class SharedPromptVerdicts:
    """Remembers for each model up to which lengths its responses can share a prompt. Models are held weakly."""

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[nn.Module, dict[tuple[int, int], bool]] = WeakKeyDictionary()

    def work(self, runner: RunsLayouts, prompt: int, response: int) -> bool:
        """Whether a prompt and responses of these lengths can share a sequence, by a trial at least as long.

        A window that hides distant tokens, for example, is not in the mask that a shared prompt needs. It shows where
        sequences are longer than the window.

        Args:
            runner: The model.
            prompt: Tokens of the longest prompt.
            response: Tokens of the longest response.
        """
        model, limit = runner.model, context_limit(runner.model)
        lengths = rounded_up(prompt), rounded_up(response)
        if limit is not None and sum(lengths) > limit:
            lengths = prompt, response
        found = self._found.setdefault(model, {})
        if any(works and prompt <= known[0] and response <= known[1] for known, works in found.items()):
            return True
        if lengths not in found:
            found[lengths] = "position_ids" in forward_arguments(model) and _passes(runner, *lengths)
        return found[lengths]


SHARED_PROMPTS = SharedPromptVerdicts()
"""What is known of the models of this process."""


def _passes(runner: RunsLayouts, prompt_length: int, response_length: int) -> bool:
    """Compare two responses that share a prompt with each on its own."""
    prompt, *responses = random_sequences(runner.model, [prompt_length, response_length, response_length])
    prompts, tokens = [prompt] * 2, [response.tolist() for response in responses]
    last = torch.tensor([response_length - 1, 2 * response_length - 1, response_length // 2])
    with (
        preserving_rotary_state(runner.model),
        torch.inference_mode(False),
        torch.no_grad(),
        exact_arithmetic(runner.model),
    ):
        try:
            apart = runner.logits(runner.run(shared_layout(prompts, tokens, [[0], [1]]))[last])
            together = runner.logits(runner.run(shared_layout(prompts, tokens, [[0, 1]]))[last])
            check_logits(runner.model, apart, together)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            return False
    return True
