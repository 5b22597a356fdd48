"""Clients that score sequences in the place of a server, from a model in this process."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class ModelClient:
    """Scores sequences with a model, in the form of TRL's client.

    Args:
        model: The model.

    Attributes:
        asked: The sequences that it was asked about.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.asked = model, list[list[int]]()

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, Any]:
        self.asked += sequences
        results = [
            self._score(sequence, start, top_logprobs, temperature)
            for sequence, start in zip(sequences, prompt_lengths, strict=True)
        ]
        names = ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")
        return dict(zip(names, zip(*results, strict=True), strict=True))

    @torch.no_grad()
    def _score(self, sequence: Sequence[int], start: int, count: int, temperature: float) -> tuple[list[Any], ...]:
        logits = self.model(torch.tensor([sequence])).logits[0, start - 1 : -1].double()
        log_probs = (logits / temperature).log_softmax(-1)
        top = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
        missing = count - top.indices.shape[-1]
        values = [row + [-math.inf] * missing for row in top.values.tolist()]
        token_ids = [row + [0] * missing for row in top.indices.tolist()]
        tokens = torch.tensor(sequence[start:])[:, None]
        return values, token_ids, log_probs.gather(-1, tokens).tolist(), tokens.tolist()
