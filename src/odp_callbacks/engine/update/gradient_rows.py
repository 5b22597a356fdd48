r"""Success gradients and distillation gradients of a batch of rollouts, on the LoRA parameters.

For a rollout with the tokens :math:`y_t` the direction of success on the logits of position t is
:math:`(r - b)(e_{y_t} - p_t) / \tau`, the distillation direction of a teacher is :math:`d_t`. Both go back through one
graph: first through the head, a few hundred positions at a time, then through the body. Forward mode gives the
influence of every token: the tangent of the hidden states along a success gradient, times the token's direction.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.layer_tape import LayerTape
from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import Teacher
from odp_callbacks.engine.update.backward import WholeGraph
from odp_callbacks.engine.update.batch_directions import BatchDirections, DirectionsOfBatches
from odp_callbacks.engine.update.forward_mode import TangentMemory, tangents_of_states
from odp_callbacks.engine.update.lora_segments import SegmentedLoraLinears, SegmentSums, segment_gradients
from odp_callbacks.engine.update.segment_trial import why_no_segments
from odp_callbacks.engine.update.split_model import SplitModel, head_has_lora
from odp_callbacks.engine.update.student_graphs import StudentGraphs
from odp_callbacks.engine.update.token_layout import TokenLayout
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.text import short_reason


class UpdateGradients:
    """Gradients and token influences of batches of rollouts.

    Args:
        student: Student with LoRA, in evaluation mode.
        tokenizer: Its tokenizer.
        teachers: By name.
        direction: Descent direction of the distillation loss on the logits.
        temperature: Of the policy that was sampled.
        features: Also compute what rules may ask about each token.
        max_memory_bytes: Limit for a graph; None for half of what is free. Where the graph of all layers does not fit,
            layers are computed again in the backward passes.

    Attributes:
        model: The student, body and head apart.
        parameters: The student's LoRA parameters by name, as they were at the start.
        tangent_memory: What directions take on their way forward.
        graphs: Keeps as much of a forward pass of the student as memory allows.
        no_segments: Why each segment of a batch needs passes of its own; empty if one pass serves all.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        teachers: Mapping[str, Teacher],
        direction: Direction,
        temperature: float,
        *,
        features: bool = False,
        max_memory_bytes: float | None = None,
    ) -> None:
        self.student, self.tokenizer, self.teachers = student, tokenizer, teachers
        self.direction, self._features = direction, features
        self._forward_mode = True
        self.parameters = lora_parameters(student)
        self.tangent_memory = TangentMemory.of(student, self.parameters)
        # LoRA parameters of the head do not act through the hidden states: then the head belongs to the body.
        self.model = SplitModel(student, split=not head_has_lora(student))
        self._directions = DirectionsOfBatches(
            self.model, tokenizer, teachers, direction, temperature, features, max_memory_bytes
        )
        self._linears = SegmentedLoraLinears(student)
        self.graphs = StudentGraphs(student, max_memory_bytes)
        self.no_segments = why_no_segments(self.model, self._linears)

    def rows(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float]
    ) -> tuple[dict[str, Tensor], BatchDirections]:
        """Compute the gradients of one batch.

        Args:
            rollouts: ``B`` rollouts with at least one token each.
            advantages: ``B`` factors of the success gradient: reward less baseline, over the rollouts of its question.

        Returns:
            For each LoRA parameter ``(1 + K, *shape)`` in float32 or wider: the success gradient, then the
            distillation gradient of each teacher, summed over the batch. And the directions on the hidden states.
        """
        rows, directions = self.segment_rows(rollouts, advantages, [0] * len(rollouts))
        parts = rows[0].split([p.numel() for p in self.parameters.values()], dim=1)
        return {
            name: part.view(-1, *p.shape) for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }, directions

    def segment_rows(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], segments: Sequence[int]
    ) -> tuple[Tensor, BatchDirections]:
        """Compute the gradients of the segments of one batch.

        Args:
            rollouts: ``B`` rollouts with at least one token each.
            advantages: As in :meth:`rows`.
            segments: ``B`` numbers from 0: the segment of each rollout.

        Returns:
            ``(S, 1 + K, P)`` in float32 or wider: for each segment its success gradient, then the distillation gradient
            of each teacher. And the directions on the hidden states.
        """
        layout = None if self.no_segments else self._layout(rollouts, segments)
        if layout is None:
            return self._segment_rows_apart(rollouts, advantages, segments)
        teacher_states = self._directions.teacher_states(rollouts, segments)
        with self._recording(layout, segments) as sums:
            graph = self.graphs.of(lambda: self.model.run(layout), layout.ids.numel())
            hidden = graph.outputs.detach()
            directions = self._directions.on_hidden_states(hidden, rollouts, advantages, teacher_states)
            return segment_gradients(graph, sums, directions.cotangents, 1 + max(segments)), directions

    def weighted_rows(
        self, rollouts: Sequence[Rollout], directions: BatchDirections, weights: Tensor, segments: Sequence[int]
    ) -> Tensor:
        """Compute the distillation gradients of the segments of one batch, with a weight for each token.

        Args:
            rollouts: ``B`` rollouts with at least one token each.
            directions: Of the same batch, from :meth:`segment_rows`.
            weights: ``(K, N)``, of the batch's tokens in each teacher's gradient.
            segments: ``B`` numbers from 0: the segment of each rollout.

        Returns:
            ``(S, K, P)`` in float32 or wider.
        """
        teachers = directions.cotangents[1:]
        weighted = teachers * weights.to(teachers)[..., None]
        layout = None if self.no_segments else self._layout(rollouts, segments)
        if layout is not None:
            with self._recording(layout, segments) as sums:
                graph = self.graphs.of(lambda: self.model.run(layout), layout.ids.numel())
                return segment_gradients(graph, sums, weighted, 1 + max(segments))
        leaves = self._leaves()
        of_rollouts = weighted.split([len(rollout.response_ids) for rollout in rollouts], dim=1)
        rows = []
        for segment in range(1 + max(segments)):
            inside = [index for index, own in enumerate(segments) if own == segment]
            with self._graph_of_rollouts([rollouts[index] for index in inside], leaves) as graph:
                rows.append(graph.flat_gradients(torch.cat([of_rollouts[index] for index in inside], dim=1)))
        return torch.stack(rows)

    @contextmanager
    def _graph_of_rollouts(
        self, rollouts: Sequence[Rollout], leaves: Mapping[str, Tensor]
    ) -> Iterator[LayerTape | WholeGraph]:
        """Run the student over rollouts, ready for backward passes within the block."""
        tokens = len(rollouts) * max(len(rollout.sequence) for rollout in rollouts)
        with torch.inference_mode(False), torch.enable_grad(), self.graphs.recomputed_layers():
            yield self.graphs.of(lambda: self._hidden_states(rollouts, leaves), tokens, leaves)

    @contextmanager
    def _recording(self, layout: TokenLayout, segments: Sequence[int]) -> Iterator[SegmentSums]:
        """Within the block, the student's forward passes over a layout remember what its segments' gradients need."""
        segment_of_row = torch.zeros(len(layout.ids), dtype=torch.long)
        segment_of_row[layout.row_of_response] = torch.tensor(segments)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self.graphs.recomputed_layers(),
            self._linears.recording(segment_of_row.to(next(self.student.parameters()).device)) as sums,
        ):
            yield sums

    def _segment_rows_apart(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], segments: Sequence[int]
    ) -> tuple[Tensor, BatchDirections]:
        """The same by passes for each segment, for parameters that are no weights of linear layers."""
        leaves = self._leaves()
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        rows: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = [(torch.empty(0),) * 3] * len(rollouts)
        for segment in range(1 + max(segments)):
            inside = [index for index, own in enumerate(segments) if own == segment]
            chosen = [rollouts[index] for index in inside]
            teacher_states = self._directions.teacher_states(chosen, [0] * len(chosen))
            with self._graph_of_rollouts(chosen, leaves) as graph:
                directions = self._directions.on_hidden_states(
                    graph.outputs.detach(), chosen, [advantages[index] for index in inside], teacher_states
                )
                rows.append(graph.flat_gradients(directions.cotangents))
            sizes = [lengths[index] for index in inside]
            features = torch.zeros(0, *directions.norms.shape) if directions.features is None else directions.features
            of_rollouts = zip(
                directions.cotangents.split(sizes, 1),
                directions.norms.split(sizes, 1),
                features.split(sizes, 2),
                strict=True,
            )
            for index, part in zip(inside, of_rollouts, strict=True):
                parts[index] = part
        cotangents, norms, features_of = zip(*parts, strict=True)
        return torch.stack(rows), BatchDirections(
            torch.cat(cotangents, dim=1),
            torch.cat(norms, dim=1),
            torch.cat(features_of, dim=2) if self._features else None,
        )

    def influences(
        self, rollouts: Sequence[Rollout], tangents: Mapping[str, Tensor], directions: BatchDirections | None = None
    ) -> Tensor:
        r"""Inner product of each token's distillation gradient with directions on the LoRA parameters.

        :math:`\langle s, J_t^\top d_t \rangle = \langle J_t s, d_t \rangle`: one forward-mode pass for all tokens and
        teachers of the batch.

        Args:
            rollouts: ``B`` rollouts.
            tangents: For each LoRA parameter ``(S, *shape)``: ``S`` directions.
            directions: Of the same batch, from :meth:`rows`; None computes them again.

        Returns:
            ``(S, K, N)`` float64 on the CPU.
        """
        with torch.inference_mode(False), torch.no_grad():
            if directions is None:
                hidden = self._hidden_states(rollouts, self._detached_parameters())
                teacher_states = self._directions.teacher_states(rollouts, [0] * len(rollouts))
                directions = self._directions.on_hidden_states(hidden, rollouts, [0.0] * len(rollouts), teacher_states)
            if self._forward_mode:
                try:
                    return self._influences_by_forward_mode(rollouts, tangents, directions)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError) as error:
                    self._forward_mode = False
                    warnings.warn(
                        "the student has a layer without forward-mode derivatives, so the influence of tokens takes "
                        f"one backward for each token: {short_reason(error)}",
                        stacklevel=2,
                    )
            return self._influences_by_backward(rollouts, tangents, directions)

    def _influences_by_forward_mode(
        self, rollouts: Sequence[Rollout], tangents: Mapping[str, Tensor], directions: BatchDirections
    ) -> Tensor:
        """Push the tangents forward once for all tokens, ``(S, K, N)``."""
        layout = self._layout(rollouts, [0] * len(rollouts))

        def states(values: dict[str, Tensor]) -> Tensor:
            return self._hidden_states(rollouts, values) if layout is None else self.model.run(layout, values)

        tokens = len(rollouts) * max(len(rollout.sequence) for rollout in rollouts)
        at_a_time = self.tangent_memory.directions(tokens, self.graphs.max_memory_bytes)
        moved = tangents_of_states(
            states,
            self.student,
            self._detached_parameters(),
            tangents,
            at_a_time=at_a_time,
            scores=self.tangent_memory.scores(self.graphs.max_memory_bytes),
        )  # (S, N, H)
        return torch.einsum("snh,knh->skn", moved, directions.cotangents[1:].to(moved)).double().cpu()

    def _influences_by_backward(
        self, rollouts: Sequence[Rollout], tangents: Mapping[str, Tensor], directions: BatchDirections
    ) -> Tensor:
        """Send each token's directions back on their own, ``(S, K, N)``."""
        leaves = self._leaves()
        teachers = directions.cotangents[1:]
        influences = torch.zeros(len(next(iter(tangents.values()))), *teachers.shape[:2], dtype=torch.float64)
        flat = torch.cat([tangents[name].flatten(1).double().cpu() for name in leaves], dim=1)  # (S, P)
        with self._graph_of_rollouts(rollouts, leaves) as graph:
            for token in range(len(graph.outputs)):
                of_token = torch.zeros_like(teachers)
                of_token[:, token] = teachers[:, token]
                influences[..., token] = flat @ graph.flat_gradients(of_token).double().mT
        return influences

    def _detached_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def _leaves(self) -> dict[str, Tensor]:
        """The parameters as leaves of a graph, which the student's own parameters stay out of."""
        return {name: p.requires_grad_() for name, p in self._detached_parameters().items()}

    def _hidden_states(self, rollouts: Sequence[Rollout], parameters: Mapping[str, Tensor]) -> Tensor:
        """Hidden states of the student ``(N, H)`` at the positions that choose the response tokens."""
        positions = [rollout.positions(range(len(rollout.response_ids))) for rollout in rollouts]
        return self.model.hidden_states([r.sequence[:-1] for r in rollouts], positions, parameters)

    def _layout(self, rollouts: Sequence[Rollout], keys: Sequence[int]) -> TokenLayout | None:
        """One batch of the student; rollouts of a question with the same key may share their prompt."""
        prompts = [rollout.question.prompt_ids for rollout in rollouts]
        return self.model.layout(prompts, [rollout.response_ids for rollout in rollouts], keys)
