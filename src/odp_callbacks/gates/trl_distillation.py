"""A gate in TRL's `DistillationTrainer`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.functional.tokens import policy_features
from odp_callbacks.gates.trl_weighting import BatchWeighting

TOKENS_PER_CHUNK = 256
"""For how many tokens logits are computed at a time, because TRL itself never holds the logits of a whole batch."""


class GatedDistillation:
    """Computes rewards when the trainer samples, and applies weights where its loss is one number for each token.

    Args:
        weighting: Computes the weights of the trainer's batches.
    """

    def __init__(self, weighting: BatchWeighting) -> None:
        self.weighting, trainer = weighting, weighting.trainer
        self.original_generate, self.original_loss = trainer._generate_and_score_completions, trainer._compute_loss
        self.trl_module: Any = sys.modules["trl.trainer.distillation_trainer"]

    def install(self) -> None:
        """Replace two methods of the trainer."""
        trainer = self.weighting.trainer
        trainer._generate_and_score_completions = self.generate_and_score
        trainer._compute_loss = self.gated_loss

    def generate_and_score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch with two more lists, which TRL shuffles and splits as it does the tensors."""
        output: dict[str, Any] = self.original_generate(rows)
        if self.weighting.training:
            masks = output["completion_mask"].bool()
            completions = [
                token_ids[mask].tolist() for token_ids, mask in zip(output["completion_ids"], masks, strict=True)
            ]
            rewards = self.weighting.score(rows, completions)
            output["odp_questions"] = [repr(row["prompt"]) for row in rows]
            if rewards is not None:
                output["odp_rewards"] = rewards
        return output

    def gated_loss(self, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Compute TRL's loss with weighted terms; in evaluation, compute TRL's own loss."""
        if not self.weighting.training:
            return self.original_loss(student, inputs, num_items_in_batch)
        with self._weighted_terms(inputs):
            return self.original_loss(student, inputs, num_items_in_batch)

    @contextmanager
    def _weighted_terms(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Replace TRL's function for the divergence of each token by one that weights it."""
        original = self.trl_module.ChunkedDivergenceFunction
        self.trl_module.ChunkedDivergenceFunction = WeightedDivergence(original, self.weighting, inputs)
        try:
            yield
        finally:
            self.trl_module.ChunkedDivergenceFunction = original


class WeightedDivergence:
    """Takes the place of TRL's autograd function, whose ``apply`` returns the divergence and entropy of each token.

    Args:
        original: TRL's autograd function.
        weighting: Computes the weights.
        inputs: TRL's batch.
    """

    def __init__(self, original: Any, weighting: BatchWeighting, inputs: dict[str, Any]) -> None:
        self.original, self.weighting, self.inputs = original, weighting, inputs

    def apply(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Return TRL's divergences multiplied by the gate's weights, and TRL's entropies."""
        divergence, entropy = self.original.apply(*args)
        mask = self.inputs["completion_mask"].bool()
        if "tool_mask" in self.inputs:
            mask = mask & self.inputs["tool_mask"].bool()
        mask = mask.to(divergence.device)
        # TRL passes either all positions of the batch, or only those with a token.
        has_token = mask.flatten() if len(divergence) == mask.numel() else mask.new_ones(len(divergence))
        token_ids = self.inputs["completion_ids"].to(divergence.device)[mask]
        weights = self.weighting.weights(
            mask,
            self.inputs.get("odp_rewards"),
            self.inputs.get("odp_questions", ()),  # a batch that was sampled in an evaluation has none
            partial(_features_of_hidden_states, args, has_token, token_ids),
            divergence.detach()[has_token],
        )
        return divergence * torch.ones_like(divergence).masked_scatter(has_token, weights), entropy


@torch.no_grad()
def _features_of_hidden_states(args: Sequence[Any], has_token: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
    """The features of both policies at each token, from the hidden states and heads that TRL passes.

    Args:
        args: The arguments of TRL's autograd function.
        has_token: Which of the passed positions hold one of the ``N`` tokens.
        token_ids: ``(N,)``.
    """
    student, student_head, student_bias, teacher, teacher_head, teacher_bias = args[:6]
    temperature, student_scale, student_cap, teacher_scale, teacher_cap = args[7:12]
    chunks: list[dict[str, Tensor]] = []
    positions = has_token.nonzero()[:, 0]
    for chunk_positions, chunk_ids in zip(
        positions.split(TOKENS_PER_CHUNK), token_ids.split(TOKENS_PER_CHUNK), strict=True
    ):
        chunks.append(
            policy_features(
                _logits(student[chunk_positions], student_head, student_bias, student_scale, student_cap),
                _logits(teacher[chunk_positions], teacher_head, teacher_bias, teacher_scale, teacher_cap),
                chunk_ids,
                temperature,
            )
        )
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden.to(head.dtype), head, bias).float() * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)
