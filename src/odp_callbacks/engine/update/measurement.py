"""Measure update gain and token influence on a set of rollouts."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.attention_plans import without_attention_plans
from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.unit_costs import work_of_sequences
from odp_callbacks.engine.update.batch_directions import BatchDirections
from odp_callbacks.engine.update.batches import (
    batches_of_rollouts,
    in_smaller_batches,
    parts_within,
    tokens_in_memory,
)
from odp_callbacks.engine.update.failures import measured_or_none
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.gradient_sums import GradientSums, device_of_sums
from odp_callbacks.engine.update.response_tokens import Rule
from odp_callbacks.engine.update.rollout_places import RolloutPlaces
from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.engine.update.rule_measurement import RuleMeter, features_of_batches, places_of
from odp_callbacks.engine.update.update_time import INFLUENCE, UpdateTime
from odp_callbacks.records import Floats
from odp_callbacks.update_records import CLASSES, RuleProducts, TokenInfluence, UpdateGram, UpdateRecord

MAXIMUM_GROUPS = 64
"""More questions than these share groups: the cost of an interval grows with the square of the number of groups."""
MINIMUM_GROUPS = 6
"""Fewer groups would leave an interval too few degrees of freedom."""
FOLDS = 4
"""Parts of the success gradient that the influence of a token is measured along; their spread gives its interval."""

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
        self._bytes_beside_sums = max_memory_bytes

    @without_attention_plans()
    def measure(
        self,
        rollouts: Sequence[Rollout],
        *,
        influence: bool = True,
        rules: Mapping[str, Rule] | None = None,
        square_roots: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
        time: UpdateTime | None = None,
    ) -> UpdateMeasurement | None:
        """Measure; None if there is no time for one question.

        Args:
            rollouts: Scored rollouts; those of one question share their ``question`` object.
            influence: Also measure every token's influence.
            rules: Also measure the directions of these rules; the gradients must compute the tokens' features.
            square_roots: Of a preconditioner, for each LoRA parameter; also measure in its geometry.
            progress: Called with the number of rollouts that are done; each counts once more with influence, and once
                more for each rule.
            time: How long it may take; None for no limit. Where it is too short, whole questions are left out, and
                before that rules and influences; the record has what was measured.
        """
        time = time or UpdateTime()
        teachers = tuple(self.gradients.teachers)
        parameters = self.gradients.parameters
        size = sum(p.numel() for p in parameters.values())
        question_count = len(set(question_indices(rollouts)))
        rows_of_group = 1 + len(teachers) * (len(CLASSES) + bool(rules))
        groups = self._group_count(question_count, size * rows_of_group)
        sketch = self._sketch(groups * rows_of_group)
        folds = max(1, min(FOLDS, groups)) if influence else 1
        places = RolloutPlaces.of(rollouts, time.order(question_count), self.success_threshold, groups, folds)
        device, self._bytes_beside_sums = self._device_of_sums(
            size, groups * rows_of_group * (1 + bool(square_roots)) + folds + len(teachers), sketch, bool(rules)
        )
        sums = GradientSums(groups, folds, len(teachers), parameters, sketch, square_roots, device)
        stored: list[tuple[list[int], BatchDirections]] = []
        measured: set[int] = set()
        done = 0
        for part in time.parts(self._work(rollouts, places)):
            measured |= set(part)
            for batch, rows, on_hidden in self._gradients(rollouts, places, set(part)):
                for (group, kind), of_segment in rows.items():
                    inside = [i for i in batch if (places.group[i], places.kind[i]) == (group, kind)]
                    count = sum(len(rollouts[i].response_ids) for i in inside)
                    sums.add(group, kind, places.fold[inside[0]], of_segment, count)
                if influence or rules:
                    stored.append((batch, on_hidden.cpu()))
                done += len(batch)
                if progress is not None:
                    progress(done)
        if question_count and not measured:
            return None
        # What follows sees the rollouts of the measured questions alone.
        kept = [index for index, question in enumerate(places.question) if question in measured]
        new_index = {index: place for place, index in enumerate(kept)}
        stored = [([new_index[index] for index in batch], directions) for batch, directions in stored]
        groups = min(groups, len(measured))
        rollouts, places = [rollouts[index] for index in kept], places.subset(kept, groups)
        gram, preconditioned = sums.grams(places.questions_by(places.group, groups))
        if places.folds > 1:
            gram = replace(gram, folds=places.fold_of_group)
            preconditioned = None if preconditioned is None else replace(preconditioned, folds=places.fold_of_group)
        token_influence = None
        if influence and groups > 1:
            norms = sums.directions.double().norm(dim=-1).cpu().numpy()
            counts = torch.from_numpy(places.questions_by(places.fold, places.folds)).to(device)
            means = sums.success[: places.folds] / counts[:, None]
            token_influence = measured_or_none(
                lambda: self._influence(rollouts, stored, places, means.float(), norms, done, progress, time),
                "the influence of tokens",
            )
            done *= 2
        features, products = features_of_batches(rollouts, stored), None
        if rules and features is not None:

            def of_rules() -> RuleProducts | None:
                meter = RuleMeter(self.gradients, rules, rollouts, places.correct, places.group, stored, features)
                return meter.measure(sums.rows.first(groups), progress, done, time)

            products = measured_or_none(of_rules, "the gain of rules")
        record = UpdateRecord(gram, token_influence, features, products)
        record = record.with_rollouts(np.array(kept, dtype=np.int64))
        return UpdateMeasurement(record, preconditioned, sums.directions.cpu())

    def _work(self, rollouts: Sequence[Rollout], places: RolloutPlaces) -> list[float]:
        """The work for the rollouts of each question."""
        work = [0.0] * (1 + max(places.question, default=-1))
        of_rollouts = work_of_sequences(self.gradients.student, [len(rollout.sequence) for rollout in rollouts])
        for of_rollout, question in zip(of_rollouts, places.question, strict=True):
            work[question] += of_rollout
        return work

    def _gradients(
        self, rollouts: Sequence[Rollout], places: RolloutPlaces, questions: set[int]
    ) -> Iterator[tuple[list[int], dict[tuple[int, int], Tensor], BatchDirections]]:
        """Yield batches of one fold: their rollouts, their gradients by group and class, and their directions."""
        gradients, question_of = self.gradients, places.question
        groups = list(zip(places.group, places.kind, strict=True))
        segments = [group * len(CLASSES) + kind for group, kind in groups]
        successes = {question for question, advantage in zip(question_of, places.advantage, strict=True) if advantage}
        # Questions without a success gradient stay together: their batches need no backward for it.
        keys: list[tuple[object, ...]] = [
            (fold, question not in successes) for fold, question in zip(places.fold, question_of, strict=True)
        ]
        memory = free_bytes(next(gradients.student.parameters()).device, self._bytes_beside_sums) / 4
        row_bytes = 4 * (1 + len(gradients.teachers)) * sum(p.numel() for p in gradients.parameters.values())

        def measured(batch: list[int]) -> tuple[dict[tuple[int, int], Tensor], BatchDirections]:
            inside = sorted({groups[i] for i in batch})
            chosen, advantages = [rollouts[i] for i in batch], [places.advantage[i] for i in batch]
            numbers = [inside.index(groups[i]) for i in batch]
            rows, on_hidden = gradients.graphs.in_less_memory(
                lambda: gradients.segment_rows(chosen, advantages, numbers), chosen
            )
            return dict(zip(inside, rows, strict=True)), on_hidden

        for batch in batches_of_rollouts(
            rollouts,
            question_of,
            segments,
            keys,
            among=[index for index, question in enumerate(question_of) if question in questions],
            max_tokens=tokens_in_memory(gradients.student, self._bytes_beside_sums),
            max_segments=1 if gradients.no_segments else max(1, int(memory // row_bytes)),
        ):
            for part, (rows, on_hidden) in in_smaller_batches(measured, batch):
                yield part, rows, on_hidden

    def _influence(
        self,
        rollouts: Sequence[Rollout],
        stored: Sequence[tuple[list[int], BatchDirections]],
        places: RolloutPlaces,
        means: Tensor,
        norms: Floats,
        done: int,
        progress: Progress | None,
        time: UpdateTime,
    ) -> TokenInfluence | None:
        """Measure every token's influence; None if there is no time for all of them."""
        folds = places.folds
        of_rollouts = work_of_sequences(self.gradients.student, [len(rollout.sequence) for rollout in rollouts])
        work = [sum(of_rollouts[index] for index in batch) for batch, _ in stored]
        parameters = self.gradients.parameters
        count = sum(len(rollout.response_ids) for rollout in rollouts)
        teachers = len(self.gradients.teachers)
        by_fold = np.full((folds, count, teachers), np.nan, dtype=np.float32)
        logit_norm = np.zeros((count, teachers), dtype=np.float32)
        starts = np.concatenate([[0], np.cumsum([len(rollout.response_ids) for rollout in rollouts])])
        for number, (batch, on_hidden) in enumerate(stored):
            if not time.allows(INFLUENCE, sum(work[number:])):
                return None
            start = time.deadline.elapsed_seconds
            own_fold = places.fold[batch[0]]
            others = [fold for fold in range(folds) if fold != own_fold]
            tangents = {
                name: part.view(len(others), *p.shape)
                for (name, p), part in zip(
                    parameters.items(),
                    means[others].split([p.numel() for p in parameters.values()], dim=1),
                    strict=True,
                )
            }
            for part, values in self._pushed_forward(rollouts, batch, tangents, on_hidden):
                tokens = places_of(part, starts)
                by_fold[np.array(others)[:, None], tokens] = values.permute(0, 2, 1).numpy()  # (S, N, K)
            logit_norm[places_of(batch, starts)] = on_hidden.norms.T.numpy()
            time.costs.record(INFLUENCE, work[number], time.deadline.elapsed_seconds - start)
            done += len(batch)
            if progress is not None:
                progress(done)
        return TokenInfluence(
            rollout=np.repeat(np.arange(len(rollouts)), np.diff(starts)),
            depth=np.concatenate([np.arange(len(rollout.response_ids)) for rollout in rollouts]),
            by_fold=by_fold,
            fold_questions=places.questions_by(places.fold, folds),
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
        ends = np.cumsum([len(rollouts[i].response_ids) for i in batch])
        last_of = dict(zip(batch, ends.tolist(), strict=True))

        def influences(part: list[int]) -> Tensor:
            tokens = torch.cat([torch.arange(last_of[i] - len(rollouts[i].response_ids), last_of[i]) for i in part])
            known = on_hidden.part(tokens) if self.gradients.model.splits else None
            chosen = [rollouts[i] for i in part]
            return self.gradients.graphs.in_less_memory(
                lambda: self.gradients.influences(chosen, tangents, known), chosen
            )

        # Several rollouts at a time only as far as all directions still go through together.
        directions = 1 + len(next(iter(tangents.values())))
        lengths = [len(rollouts[i].question.prompt_ids) + len(rollouts[i].response_ids) for i in batch]
        bytes_of_token = self.gradients.tangent_memory.bytes_of_token
        memory = free_bytes(self.gradients.tangent_memory.device, self._bytes_beside_sums)
        for fitting in parts_within(batch, lengths, memory / (directions * bytes_of_token)):
            yield from in_smaller_batches(influences, fitting)

    def _device_of_sums(
        self, size: int, rows: int, sketch: RowSketch, with_rules: bool
    ) -> tuple[torch.device, float | None]:
        """Where the sums of gradients are kept, and the limit in bytes that batches beside them have."""
        student, limit = self.gradients.tangent_memory.device, self.max_memory_bytes
        if sketch.error:
            return torch.device("cpu"), limit
        numbers = size * rows * (2 if with_rules else 1)  # the sums of a rule stand beside those of all tokens
        device = device_of_sums(student, numbers, limit)
        if limit is not None and device == student and device.type != "cpu":
            limit -= 4 * numbers
        return device, limit

    def _group_count(self, questions: int, row_numbers: int) -> int:
        """As many groups as memory allows, one for each question if there are few."""
        limit = free_bytes(torch.device("cpu"), self.max_memory_bytes) / 2
        affordable = int(limit // (4 * row_numbers))
        return max(min(questions, 1), min(questions, MAXIMUM_GROUPS, max(affordable, MINIMUM_GROUPS)))

    def _sketch(self, rows: int) -> RowSketch:
        """A sketch with as many columns as memory allows for so many rows; usually it keeps all."""
        sizes = [p.numel() for p in self.gradients.parameters.values()]
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
