"""Measure update gain and token influence on a set of rollouts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.update.gradient_rows import BatchDirections, UpdateGradients
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.functional.updates import leave_one_out_advantages
from odp_callbacks.records import Floats
from odp_callbacks.update_records import CLASSES, TokenInfluence, UpdateGram, UpdateRecord, gram_of_rows

MAXIMUM_GROUPS = 64
"""More questions than these share groups: the cost of an interval grows with the square of the number of groups."""
MINIMUM_GROUPS = 6
"""Fewer groups would leave an interval too few degrees of freedom."""
FOLDS = 4
"""Parts of the success gradient that the influence of a token is measured along; their spread gives its interval."""
BATCH_TOKENS = {"cpu": 1024}
"""Prompt and response tokens that go through the model at a time."""
BATCH_TOKENS_ELSEWHERE = 16384

Progress = Callable[[int], None]


@dataclass(frozen=True)
class UpdateMeasurement:
    """What was measured.

    Attributes:
        record: In the Euclidean geometry.
        preconditioned: Inner products in another geometry of the parameters, or None.
    """

    record: UpdateRecord
    preconditioned: UpdateGram | None


class UpdateMeter:
    """Measures rollouts of several questions.

    Args:
        gradients: Computes the gradients.
        success_threshold: Reward from which a rollout counts as correct.
        max_memory_bytes: Limit for the rows that are kept and for a batch; None: half of what is free.
    """

    def __init__(
        self, gradients: UpdateGradients, *, success_threshold: float = 1.0, max_memory_bytes: float | None = None
    ) -> None:
        self.gradients = gradients
        self.success_threshold = success_threshold
        self.max_memory_bytes = max_memory_bytes

    def measure(
        self,
        rollouts: Sequence[Rollout],
        *,
        influence: bool = True,
        square_roots: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> UpdateMeasurement:
        """Measure.

        Args:
            rollouts: Scored rollouts; those of one question share their ``question`` object.
            influence: Also measure every token's influence.
            square_roots: Of a preconditioner, for each LoRA parameter; also measure in its geometry.
            progress: Called with the number of rollouts that are done; with influence each counts twice.
        """
        teachers = tuple(self.gradients.teachers)
        parameters = lora_parameters(self.gradients.student)
        size = sum(p.numel() for p in parameters.values())
        question_of = self._question_of(rollouts)
        question_count = max(question_of, default=-1) + 1
        groups = self._group_count(question_count, size * (1 + len(teachers) * len(CLASSES)))
        group_of = [question * groups // max(question_count, 1) for question in question_of]
        advantages = self._advantages(rollouts, question_of)
        class_of = [CLASSES.index("correct" if r.reward >= self.success_threshold else "incorrect") for r in rollouts]

        success = torch.zeros(groups, size, dtype=torch.float32)
        directions = torch.zeros(groups, len(teachers), len(CLASSES), size, dtype=torch.float32)
        tokens = np.zeros((groups, len(CLASSES)))
        stored: list[tuple[list[int], BatchDirections]] = []
        done = 0
        for batch in self._batches(rollouts, [(g, c) for g, c in zip(group_of, class_of, strict=True)]):
            group, kind = group_of[batch[0]], class_of[batch[0]]
            rows, on_hidden = self.gradients.rows([rollouts[i] for i in batch], [advantages[i] for i in batch])
            flat = torch.cat([row.flatten(1) for row in rows.values()], dim=1).float().cpu()
            success[group] += flat[0]
            directions[group, :, kind] += flat[1:]
            tokens[group, kind] += sum(len(rollouts[i].response_ids) for i in batch)
            if influence:
                stored.append((batch, on_hidden))
            done += len(batch)
            if progress is not None:
                progress(done)
        first_of = [question_of.index(question) for question in range(question_count)]
        questions = np.bincount([group_of[i] for i in first_of], minlength=groups).astype(float)
        gram = _gram(questions, tokens, success, directions)
        preconditioned = None
        if square_roots is not None:
            scale = torch.cat([square_roots[name].flatten().cpu() for name in parameters])
            preconditioned = _gram(questions, tokens, success * scale, directions * scale)
        token_influence = None
        if influence and groups > 1:
            norms = directions.sum(dim=(0, 2)).double().norm(dim=-1).numpy()
            token_influence = self._influence(rollouts, stored, group_of, questions, success, norms, done, progress)
        return UpdateMeasurement(UpdateRecord(gram, token_influence), preconditioned)

    def _influence(
        self,
        rollouts: Sequence[Rollout],
        stored: Sequence[tuple[list[int], BatchDirections]],
        group_of: Sequence[int],
        questions: Floats,
        success: Tensor,
        norms: Floats,
        done: int,
        progress: Progress | None,
    ) -> TokenInfluence:
        groups = len(questions)
        folds = min(FOLDS, groups)
        fold_of_group = np.arange(groups) * folds // groups
        weight = np.bincount(fold_of_group, weights=questions, minlength=folds).astype(float)
        means = torch.stack(
            [success[torch.from_numpy(fold_of_group == fold)].sum(0) / weight[fold] for fold in range(folds)]
        )
        parameters = lora_parameters(self.gradients.student)
        count = sum(len(rollout.response_ids) for rollout in rollouts)
        teachers = len(self.gradients.teachers)
        by_fold = np.full((folds, count, teachers), np.nan, dtype=np.float32)
        logit_norm = np.zeros((count, teachers), dtype=np.float32)
        starts = np.concatenate([[0], np.cumsum([len(rollout.response_ids) for rollout in rollouts])])
        for batch, on_hidden in stored:
            own = int(fold_of_group[group_of[batch[0]]])
            others = [fold for fold in range(folds) if fold != own]
            tangents = {
                name: part.view(len(others), *p.shape)
                for (name, p), part in zip(
                    parameters.items(),
                    means[others].split([p.numel() for p in parameters.values()], dim=1),
                    strict=True,
                )
            }
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
            values = self.gradients.influences(
                [rollouts[i] for i in batch], tangents, on_hidden if self.gradients.model.splits else None
            )
            by_fold[np.array(others)[:, None], places] = values.permute(0, 2, 1).numpy()  # (S, N, K)
            logit_norm[places] = on_hidden.norms.T.numpy()
            done += len(batch)
            if progress is not None:
                progress(done)
        return TokenInfluence(
            rollout=np.repeat(np.arange(len(rollouts)), np.diff(starts)),
            depth=np.concatenate([np.arange(len(rollout.response_ids)) for rollout in rollouts]),
            by_fold=by_fold,
            fold_questions=weight,
            direction_norm=norms,
            logit_norm=logit_norm,
        )

    def _question_of(self, rollouts: Sequence[Rollout]) -> list[int]:
        place: dict[int, int] = {}
        return [place.setdefault(id(rollout.question), len(place)) for rollout in rollouts]

    def _advantages(self, rollouts: Sequence[Rollout], question_of: Sequence[int]) -> list[float]:
        """Reward less baseline, divided by the number of rollouts of the question: its gradient is their mean."""
        if not rollouts:
            return []
        rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        place = torch.tensor(question_of)
        advantages: list[float] = (leave_one_out_advantages(rewards, place) / torch.bincount(place)[place]).tolist()
        return advantages

    def _group_count(self, questions: int, row_numbers: int) -> int:
        """As many groups as memory allows, one for each question if there are few."""
        limit = free_bytes(torch.device("cpu"), self.max_memory_bytes) / 2
        affordable = int(limit // (4 * row_numbers))
        return max(min(questions, 1), min(questions, MAXIMUM_GROUPS, max(affordable, MINIMUM_GROUPS)))

    def _batches(self, rollouts: Sequence[Rollout], keys: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        """Batches of rollouts of one group and one class, of similar length."""
        device = next(self.gradients.student.parameters()).device.type
        limit = BATCH_TOKENS.get(device, BATCH_TOKENS_ELSEWHERE)
        lengths = [len(rollout.question.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
        order = sorted(range(len(rollouts)), key=lambda i: (keys[i], lengths[i]))
        batch: list[int] = []
        for i in order:
            if not rollouts[i].response_ids:
                continue
            if batch and (keys[i] != keys[batch[0]] or (len(batch) + 1) * lengths[i] > limit):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _gram(questions: Floats, tokens: Floats, success: Tensor, directions: Tensor) -> UpdateGram:
    return gram_of_rows(questions, tokens, success.double().numpy(), directions.double().numpy())
