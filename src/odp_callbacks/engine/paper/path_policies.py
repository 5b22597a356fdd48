"""The policies of the student and of every teacher along representative paths."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.analysis.paper.enrichment import worth_enriching
from odp_callbacks.analysis.paper.prefix_tree import Integers
from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.teachers import Teacher, teacher_logits
from odp_callbacks.functional.distillation_losses import distillation_logit_gradient, node_predictors
from odp_callbacks.records import Floats

MAXIMUM_ELEMENTS = 2**26
"""Numbers in the logits of one model at a time."""


@dataclass(frozen=True)
class PathPolicies:
    """What is kept of the policies at the ``T`` nodes of a path, for ``K`` teachers.

    Attributes:
        gradient_size: ``(K, T)``, norm of the GKD gradient on all logits.
        difference: ``(K, T)``, total variation of the two policies: half the sum of ``|P_te - P_theta|``.
        predictors: For each of :data:`~odp_callbacks.analysis.paper.records.PREDICTORS`, ``(K, T)``.
        candidates: For each node, the tokens that are worth enriching.
    """

    gradient_size: Floats
    difference: Floats
    predictors: Mapping[str, Floats]
    candidates: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PathReader:
    """Computes policies along paths; each teacher costs one forward pass.

    Attributes:
        student: The student, in evaluation mode.
        teachers: The teachers by name.
        temperature: Divides all logits.
    """

    student: nn.Module
    teachers: Mapping[str, Teacher]
    temperature: float

    def policies(self, question: Question, path: tuple[int, ...], threshold: float) -> PathPolicies:
        """Read a path for ranking and enrichment.

        Args:
            question: The path's question, with the teachers' prompts.
            path: ``T`` tokens.
            threshold: Probability above which a token is worth enriching.
        """
        columns: dict[str, list[Floats]] = {}
        candidates: list[tuple[int, ...]] = []
        for _, student_logits, of_teachers in self._logits(question, path):
            for name, values in self._figures(student_logits, of_teachers).items():
                columns.setdefault(name, []).append(values)
            policy = self._probabilities(student_logits)
            others = np.stack(
                [_padded(self._probabilities(logits), policy.shape[-1]) for logits in of_teachers]
            )  # (K, N, V)
            worth = worth_enriching(policy, others, threshold)
            candidates += [tuple(np.flatnonzero(row).tolist()) for row in worth]
        figures = {name: np.concatenate(parts, axis=1) for name, parts in columns.items()}
        return PathPolicies(figures.pop("gradient_size"), figures.pop("difference"), figures, tuple(candidates))

    def log_probabilities(
        self, question: Question, path: tuple[int, ...], depth: Integers, token: Integers
    ) -> tuple[Floats, Floats]:
        """Log-probabilities of tokens at nodes of a path.

        Args:
            question: The path's question, with the teachers' prompts.
            path: ``T`` tokens.
            depth: ``(C,)``, depths in ascending order.
            token: ``(C,)``.

        Returns:
            The student's, ``(C,)``, and the teachers', ``(K, C)``, in nats; -inf beyond a teacher's vocabulary.
        """
        student_columns: list[Floats] = []
        teacher_columns: list[Floats] = []
        for depths, student_logits, of_teachers in self._logits(question, path):
            chosen = (depth >= depths.start) & (depth < depths.stop)
            rows, tokens = torch.from_numpy(depth[chosen] - depths.start), torch.from_numpy(token[chosen])
            student_columns.append(self._gather(student_logits, rows, tokens))
            teacher_columns.append(np.stack([self._gather(logits, rows, tokens) for logits in of_teachers]))
        return np.concatenate(student_columns), np.concatenate(teacher_columns, axis=1)

    def _logits(self, question: Question, path: tuple[int, ...]) -> Iterator[tuple[range, Tensor, list[Tensor]]]:
        """Depths in chunks, with the logits of the student ``(N, V)`` and of each teacher ``(N, V')`` there."""
        chunk = max(1, MAXIMUM_ELEMENTS // vocabulary_size(self.student))
        for start in range(0, len(path), chunk):
            depths = range(start, min(start + chunk, len(path)))
            with torch.no_grad():
                (student_logits,) = response_logits(self.student, [question.prompt_ids], [path], [list(depths)])
            of_teachers = [
                teacher_logits(
                    teacher,
                    self.student,
                    [question.teacher_prompt_ids[name]],
                    [path],
                    [list(depths)],
                    [student_logits],
                )[0]
                for name, teacher in self.teachers.items()
            ]
            yield depths, student_logits, of_teachers

    def _figures(self, student_logits: Tensor, of_teachers: Sequence[Tensor]) -> dict[str, Floats]:
        """The ranking's figures and the predictors at ``N`` nodes, ``(K, N)`` each."""
        rows: dict[str, list[Floats]] = {}
        for logits in of_teachers:
            # The student's logits beyond the teacher's vocabulary are padding rows.
            own, other = _wide(student_logits[..., : logits.shape[-1]]), _wide(logits)
            gradient = distillation_logit_gradient(own, other, "reverse_kl", temperature=self.temperature)
            difference = (torch.softmax(own / self.temperature, -1) - torch.softmax(other / self.temperature, -1)).abs()
            predictors = node_predictors(own, other, self.temperature)
            figures = {
                "gradient_size": gradient.norm(dim=-1),
                "difference": difference.sum(dim=-1) / 2,
                "kl": predictors["reverse_kl"],
                "js": predictors["js"],
                "l2": difference.norm(dim=-1),
                "policy_cosine": predictors["cosine"],
            }
            for name, values in figures.items():
                rows.setdefault(name, []).append(values.double().cpu().numpy())
        return {name: np.stack(values) for name, values in rows.items()}

    def _probabilities(self, logits: Tensor) -> Floats:
        return torch.softmax(_wide(logits) / self.temperature, dim=-1).cpu().numpy()

    def _gather(self, logits: Tensor, rows: Tensor, tokens: Tensor) -> Floats:
        """Log-probabilities ``(C,)`` of tokens in rows of logits ``(N, V)``; -inf for a token that has no logit."""
        log_probabilities = torch.log_softmax(_wide(logits) / self.temperature, dim=-1).cpu()
        known = tokens < log_probabilities.shape[-1]
        values = log_probabilities[rows, tokens.clamp(max=log_probabilities.shape[-1] - 1)].double()
        gathered: Floats = torch.where(known, values, -torch.inf).numpy()
        return gathered


def _wide(logits: Tensor) -> Tensor:
    """Logits in at least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _padded(probabilities: Floats, width: int) -> Floats:
    """Probabilities ``(N, V')`` with zeros for the tokens that a teacher lacks, ``(N, width)``."""
    return np.pad(probabilities, ((0, 0), (0, width - probabilities.shape[-1])))
