"""A model in this process in the place of a server, so that a teacher with another tokenizer needs none."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from odp_callbacks.engine.gradients.float32_head import float32_head
from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.functional.gradients import evaluation_mode
from odp_callbacks.functional.policies import token_log_probs


class ModelScorer:
    """Scores sequences with a model, in the form of TRL's client.

    :class:`~odp_callbacks.engine.teachers.ServedTeacher` takes it in place of an address. For a teacher with the
    student's vocabulary, :class:`~odp_callbacks.engine.teachers.ModelTeacher` is exact and faster.

    Args:
        model: A causal language model on its own device; it must not be the student.

    Examples:
        >>> from odp_callbacks.engine.teachers import ServedTeacher
        >>> ServedTeacher(ModelScorer(nn.Linear(2, 2)), top_k=256)  # with a language model, and with its tokenizer
        ServedTeacher('ModelScorer', top_k=256)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        top_logprobs: int = 64,
        temperature: float = 1.0,
    ) -> dict[str, list[Any]]:
        """Compute the likeliest tokens at each position behind a prompt.

        Args:
            sequences: Token ids of prompt and response.
            prompt_lengths: Number of tokens of each prompt, at least 1.
            top_logprobs: How many tokens at each position; all if there are fewer.
            temperature: Divides the logits.

        Returns:
            ``logprobs`` and ``logprob_token_ids``, for each sequence ``(T, k)``; ``actual_logprobs`` and
            ``actual_token_ids``, ``(T, 1)``.
        """
        parts: dict[str, list[Any]] = {
            name: [] for name in ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")
        }
        with torch.no_grad(), evaluation_mode(self.model), float32_head(self.model):
            for sequence, start in zip(sequences, prompt_lengths, strict=True):
                tokens = torch.tensor(sequence)
                (logits,) = node_logits(self.model, [tokens[:-1]], [range(start - 1, len(tokens) - 1)])
                logits = logits if logits.dtype == torch.float64 else logits.float()
                top = (logits / temperature).log_softmax(dim=-1).topk(min(top_logprobs, logits.shape[-1]), dim=-1)
                response = tokens[start:]
                actual = token_log_probs(logits, response.to(logits.device), temperature)
                parts["logprobs"].append(top.values.tolist())
                parts["logprob_token_ids"].append(top.indices.tolist())
                parts["actual_logprobs"].append(actual[:, None].tolist())
                parts["actual_token_ids"].append(response[:, None].tolist())
        return parts
