"""Measure update gain and token influence on a set of rollouts."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.gradients.layer_sizes import layer_sizes
from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.update.batch_directions import BatchDirections
from odp_callbacks.engine.update.batches import (
    batches_of_rollouts,
    in_smaller_batches,
    parts_within,
    tokens_in_memory,
)
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.module_products import with_module_products
from odp_callbacks.engine.update.response_tokens import Rule
from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.engine.update.rule_measurement import RuleMeter, features_of_batches, places_of
from odp_callbacks.engine.update.update_rows import UpdateRows
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.functional.updates import leave_one_out_advantages
from odp_callbacks.records import Floats
from odp_callbacks.update_records import CLASSES, TokenInfluence, UpdateGram, UpdateRecord

MAXIMUM_GROUPS = 64
"""More questions than these share groups: the cost of an interval grows with the square of the number of groups."""
MINIMUM_GROUPS = 6
"""Fewer groups would leave an interval too few degrees of freedom."""
FOLDS = 4
"""Parts of the success gradient that the influence of a token is measured along; their spread gives its interval."""

ATTENTION_BYTES = 16
"""Memory of the plain attention kernel for each pair of tokens, head and direction of forward mode."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class UpdateMeasurement:
    """What was measured.

    Attributes:
        record: In the Euclidean geometry.
        preconditioned: Inner products in another geometry of the parameters, or None.
        directions: ``(K, P)`` float32 on the CPU, each teacher's distillation gradient summed over all rollouts.
    """

    record: UpdateRecord
    preconditioned: UpdateGram | None
    directions: Tensor


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
        rules: Mapping[str, Rule] | None = None,
        square_roots: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> UpdateMeasurement:
        """Measure.

        Args:
            rollouts: Scored rollouts; those of one question share their ``question`` object.
            influence: Also measure every token's influence.
            rules: Also measure the directions of these rules; the gradients must compute the tokens' features.
            square_roots: Of a preconditioner, for each LoRA parameter; also measure in its geometry.
            progress: Called with the number of rollouts that are done; each counts once more with influence, and once
                more for each rule.
        """
        teachers = tuple(self.gradients.teachers)
        parameters = lora_parameters(self.gradients.student)
        size = sum(p.numel() for p in parameters.values())
        question_of = question_indices(rollouts)
        question_count = max(question_of, default=-1) + 1
        rows_of_group = 1 + len(teachers) * (len(CLASSES) + bool(rules))
        groups = self._group_count(question_count, size * rows_of_group)
        sketch = self._sketch(groups * rows_of_group)
        group_of = [question * groups // max(question_count, 1) for question in question_of]
        advantages = self._advantages(rollouts, question_of)
        class_of = [CLASSES.index("correct" if r.reward >= self.success_threshold else "incorrect") for r in rollouts]

        folds = min(FOLDS, groups) if influence else 1
        fold_of_group = np.arange(groups) * folds // groups
        fold_of = fold_of_group[group_of].tolist()
        sums = UpdateRows(groups, len(teachers), sketch)
        scaled = None if square_roots is None else UpdateRows(groups, len(teachers), sketch)
        scale = None if square_roots is None else torch.cat([square_roots[name].flatten().cpu() for name in parameters])
        summed = torch.zeros(len(teachers), size)
        of_folds = torch.zeros(folds, size)
        stored: list[tuple[list[int], BatchDirections]] = []
        done = 0
        for batch, rows, on_hidden in self._gradients(rollouts, question_of, group_of, class_of, fold_of, advantages):
            for (group, kind), of_segment in rows.items():
                inside = [i for i in batch if (group_of[i], class_of[i]) == (group, kind)]
                count, of_segment = sum(len(rollouts[i].response_ids) for i in inside), of_segment.float().cpu()
                sums.add(group, kind, of_segment, count)
                if scaled is not None and scale is not None:
                    scaled.add(group, kind, of_segment * scale, count)
                summed += of_segment[1:]
                of_folds[fold_of[inside[0]]] += of_segment[0]
            if influence or rules:
                stored.append((batch, on_hidden.cpu()))
            done += len(batch)
            if progress is not None:
                progress(done)
        first_of = [question_of.index(question) for question in range(question_count)]
        questions = np.bincount([group_of[i] for i in first_of], minlength=groups).astype(float)
        columns = dict(zip(parameters, sketch.widths, strict=True))
        gram, preconditioned = (
            None
            if of_geometry is None
            else with_module_products(of_geometry.gram(questions), of_geometry.success, of_geometry.directions, columns)
            for of_geometry in (sums, scaled)
        )
        assert gram is not None
        if folds > 1:
            gram = replace(gram, folds=fold_of_group)
            preconditioned = None if preconditioned is None else replace(preconditioned, folds=fold_of_group)
        token_influence = None
        if influence and groups > 1:
            norms = summed.double().norm(dim=-1).numpy()
            weight = np.bincount([fold_of[i] for i in first_of], minlength=folds).astype(float)
            of_folds /= torch.from_numpy(weight).float()[:, None]
            token_influence = self._influence(rollouts, stored, fold_of, weight, of_folds, norms, done, progress)
            done *= 2
        features, products = features_of_batches(rollouts, stored), None
        if rules and features is not None:
            correct = [CLASSES[kind] == "correct" for kind in class_of]
            meter = RuleMeter(self.gradients, rules, rollouts, correct, group_of, stored, features)
            products = meter.measure(sums, progress, done)
        record = UpdateRecord(gram, token_influence, features, products)
        return UpdateMeasurement(record, preconditioned, summed)

    def _gradients(
        self,
        rollouts: Sequence[Rollout],
        question_of: Sequence[int],
        group_of: Sequence[int],
        class_of: Sequence[int],
        fold_of: Sequence[int],
        advantages: Sequence[float],
    ) -> Iterator[tuple[list[int], dict[tuple[int, int], Tensor], BatchDirections]]:
        """Yield batches of one fold: their rollouts, their gradients by group and class, and their directions."""
        gradients = self.gradients
        places = list(zip(group_of, class_of, strict=True))
        segments = [group * len(CLASSES) + kind for group, kind in places]
        successes = {question for question, advantage in zip(question_of, advantages, strict=True) if advantage}
        # Questions without a success gradient stay together: their batches need no backward for it.
        keys: list[tuple[object, ...]] = [
            (fold, question not in successes) for fold, question in zip(fold_of, question_of, strict=True)
        ]
        memory = free_bytes(next(gradients.student.parameters()).device, self.max_memory_bytes) / 4
        row_bytes = (
            4 * (1 + len(gradients.teachers)) * sum(p.numel() for p in lora_parameters(gradients.student).values())
        )

        def measured(batch: list[int]) -> tuple[dict[tuple[int, int], Tensor], BatchDirections]:
            inside = sorted({places[i] for i in batch})
            rows, on_hidden = gradients.segment_rows(
                [rollouts[i] for i in batch],
                [advantages[i] for i in batch],
                [inside.index(places[i]) for i in batch],
            )
            return dict(zip(inside, rows, strict=True)), on_hidden

        for batch in batches_of_rollouts(
            rollouts,
            question_of,
            segments,
            keys,
            max_tokens=tokens_in_memory(gradients.student, self.max_memory_bytes),
            max_segments=1 if gradients.no_segments else max(1, int(memory // row_bytes)),
        ):
            for part, (rows, on_hidden) in in_smaller_batches(measured, batch):
                yield part, rows, on_hidden

    def _influence(
        self,
        rollouts: Sequence[Rollout],
        stored: Sequence[tuple[list[int], BatchDirections]],
        fold_of: Sequence[int],
        weight: Floats,
        means: Tensor,
        norms: Floats,
        done: int,
        progress: Progress | None,
    ) -> TokenInfluence:
        folds = len(weight)
        parameters = lora_parameters(self.gradients.student)
        count = sum(len(rollout.response_ids) for rollout in rollouts)
        teachers = len(self.gradients.teachers)
        by_fold = np.full((folds, count, teachers), np.nan, dtype=np.float32)
        logit_norm = np.zeros((count, teachers), dtype=np.float32)
        starts = np.concatenate([[0], np.cumsum([len(rollout.response_ids) for rollout in rollouts])])
        for batch, on_hidden in stored:
            own = fold_of[batch[0]]
            others = [fold for fold in range(folds) if fold != own]
            tangents = {
                name: part.view(len(others), *p.shape)
                for (name, p), part in zip(
                    parameters.items(),
                    means[others].split([p.numel() for p in parameters.values()], dim=1),
                    strict=True,
                )
            }
            for part, values in self._pushed_forward(rollouts, batch, tangents, on_hidden):
                places = places_of(part, starts)
                by_fold[np.array(others)[:, None], places] = values.permute(0, 2, 1).numpy()  # (S, N, K)
            logit_norm[places_of(batch, starts)] = on_hidden.norms.T.numpy()
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

    def _pushed_forward(
        self,
        rollouts: Sequence[Rollout],
        batch: list[int],
        tangents: dict[str, Tensor],
        on_hidden: BatchDirections,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield parts of a batch and the influences ``(S, K, N)`` of their tokens."""
        student = self.gradients.student
        ends = np.cumsum([len(rollouts[i].response_ids) for i in batch])
        last_of = dict(zip(batch, ends.tolist(), strict=True))

        def influences(part: list[int]) -> Tensor:
            tokens = torch.cat([torch.arange(last_of[i] - len(rollouts[i].response_ids), last_of[i]) for i in part])
            known = on_hidden.part(tokens) if self.gradients.model.splits else None
            return self.gradients.influences([rollouts[i] for i in part], tangents, known)

        directions = 1 + len(next(iter(tangents.values())))
        lengths = [len(rollouts[i].question.prompt_ids) + len(rollouts[i].response_ids) for i in batch]
        memory = free_bytes(next(student.parameters()).device, self.max_memory_bytes)
        pairs = memory / (ATTENTION_BYTES * layer_sizes(student).heads * directions)
        for fitting in parts_within(batch, [length**2 for length in lengths], pairs):
            yield from in_smaller_batches(influences, fitting)

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

    def _sketch(self, rows: int) -> RowSketch:
        """A sketch with as many columns as memory allows for so many rows; usually it keeps all."""
        sizes = [p.numel() for p in lora_parameters(self.gradients.student).values()]
        limit = free_bytes(torch.device("cpu"), self.max_memory_bytes) / 2
        sketch = RowSketch(sizes, limit / (4 * max(rows, 1) * sum(sizes)))
        if sketch.error:
            warnings.warn(
                f"the gradients of {sum(sizes):,} LoRA parameters do not fit into memory, so {sum(sketch.widths):,} "
                "random sums of them are kept; products of gradients have a standard error of at most "
                f"{sketch.error:.1%} of the product of their norms. A larger `max_memory_bytes` avoids it.",
                stacklevel=2,
            )
        return sketch
