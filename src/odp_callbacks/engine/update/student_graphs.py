"""Forward passes of a student that are ready for backward passes, with as much of the graph as memory allows."""

from collections.abc import Callable, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext, suppress

from torch import Tensor, nn

from odp_callbacks.engine.gradients.graph_memory import Result, in_less_memory
from odp_callbacks.engine.gradients.graph_trial import graph_verdict
from odp_callbacks.engine.gradients.layer_sizes import linear_features
from odp_callbacks.engine.gradients.layer_tape import LayerTape, UnchainedLayersError, recomputable_layers
from odp_callbacks.engine.update.backward import WholeGraph
from odp_callbacks.engine.update.batches import tokens_in_graph
from odp_callbacks.engine.update.layer_recomputation import recomputed_layers


class StudentGraphs:
    """Chooses how the graph of a forward pass is kept.

    Args:
        student: Student with LoRA, in evaluation mode.
        max_memory_bytes: Limit for a graph; None for half of what is free.

    Attributes:
        max_memory_bytes: The limit.
    """

    def __init__(self, student: nn.Module, max_memory_bytes: float | None = None) -> None:
        self.student, self.max_memory_bytes = student, max_memory_bytes
        self._verdict, self._layers = graph_verdict(student), tuple(recomputable_layers(student).values())
        self._linear_features = linear_features(student)

    def of(
        self, run: Callable[[], Tensor], tokens: int, leaves: Mapping[str, Tensor] | None = None
    ) -> LayerTape | WholeGraph:
        """Run the student, and keep what the backward passes need: everything if it fits, else the layers' inputs.

        Layers are also computed again where the student asks for it by gradient checkpointing, and where its layers
        spoil their graph.

        Args:
            run: Runs the student and returns what is differentiated.
            tokens: Tokens of the batch, with its padding.
            leaves: Parameters that ``run`` uses in place of the student's own.

        Raises:
            ValueError: If neither way gives the student's gradients.
        """
        verdict, device = self._verdict, next(self.student.parameters()).device
        recomputes = (
            not verdict.reusable
            or any(getattr(layer, "gradient_checkpointing", False) for layer in self._layers)
            or tokens > tokens_in_graph(device, self._linear_features, self.max_memory_bytes)
        )
        if recomputes and not verdict.why_no_tape:
            with suppress(UnchainedLayersError):
                return LayerTape(self.student, run, leaves, fresh_graphs=not verdict.reusable)
        verdict.require_reusable()
        return WholeGraph(run, leaves)

    def recomputed_layers(self) -> AbstractContextManager[None]:
        """Within the block, autograd recomputes layers where the student asks for it and :meth:`of` cannot."""
        return recomputed_layers(self.student) if self._verdict.why_no_tape else nullcontext()

    def in_less_memory(self, function: Callable[[], Result], rollouts: Sized) -> Result:
        """Call ``function``, and for a single rollout that does not fit into memory once more with the smallest graph.

        Args:
            function: Uses these graphs.
            rollouts: Those that it measures; more than one are better measured in smaller batches.
        """

        def with_limit(limit: float | None) -> Result:
            own, self.max_memory_bytes = self.max_memory_bytes, limit
            try:
                return function()
            finally:
                self.max_memory_bytes = own

        return function() if len(rollouts) > 1 else in_less_memory(with_limit, self.max_memory_bytes)
