"""A gate in TRL's `GKDTrainer`."""

from typing import Any

import torch
from torch import Tensor

from odp_callbacks.engine.prompts import Row
from odp_callbacks.functional.tokens import policy_features
from odp_callbacks.gates.trl_weighting import BatchWeighting


class GatedGKD:
    """Weights the loss of each token; all that this trainer knows about a question is its tokens.

    Args:
        weighting: Computes the weights of the trainer's batches.
    """

    def __init__(self, weighting: BatchWeighting) -> None:
        self.weighting, trainer = weighting, weighting.trainer
        self.original_step, self.original_loss = trainer.training_step, trainer.generalized_jsd_loss
        self.rows: list[Row] = []

    def install(self) -> None:
        """Replace two methods of the trainer."""
        self.weighting.trainer.training_step = self.training_step
        self.weighting.trainer.generalized_jsd_loss = self.gated_loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Keep questions and reference answers, before the student's own responses replace the answers."""
        self.rows = []  # without them, a batch is not gated
        with self.weighting.guarded("the questions of a batch could not be read, and it was not gated"):
            self.rows = self._rows(inputs)
        loss: Tensor = self.original_step(model, inputs, *args, **kwargs)
        return loss

    def _rows(self, inputs: dict[str, Any]) -> list[Row]:
        """The questions of a batch, with their reference answers."""
        prompt_masks = inputs["prompt_attention_mask"].bool()
        prompts = [token_ids[mask].tolist() for token_ids, mask in zip(inputs["prompts"], prompt_masks, strict=True)]
        references = [token_ids[token_ids != -100].tolist() for token_ids in inputs["labels"]]
        return [
            {"prompt": prompt, "reference": reference}
            for prompt, reference in zip(self.weighting.decode(prompts), self.weighting.decode(references), strict=True)
        ]

    def gated_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute TRL's loss with weighted terms; the arguments are those of TRL's function."""
        options = {"labels": labels, "beta": beta, "temperature": temperature}
        if not self.weighting.training:
            plain_loss: Tensor = self.original_loss(
                student_logits, teacher_logits, reduction=reduction, num_items_in_batch=num_items_in_batch, **options
            )
            return plain_loss
        terms: Tensor = self.original_loss(student_logits, teacher_logits, reduction="none", **options)  # (N, V)
        mask = labels != -100
        completions = [token_ids[row_mask].tolist() for token_ids, row_mask in zip(labels, mask, strict=True)]
        weights = self.weighting.weights(
            mask,
            self.weighting.score(self.rows, completions),
            [row["prompt"] for row in self.rows],
            lambda: policy_features(student_logits[mask], teacher_logits[mask], labels[mask], temperature),
            terms.detach().sum(dim=-1),
        )
        weighted_sum = (terms * weights[:, None]).sum()
        if num_items_in_batch is None:
            return weighted_sum / mask.sum().clamp(min=1)
        return weighted_sum / torch.as_tensor(num_items_in_batch, device=weighted_sum.device)
