"""How a gate learns from the probes of a training run."""

from collections.abc import Iterable
from io import BytesIO
from typing import Any

import torch

from odp_callbacks.engine.teachers.saved_states import load_or_keep
from odp_callbacks.gates.protocols import Learner, Loggable, Stateful
from odp_callbacks.records import ProbeReport


class GateLearning:
    """Passes each report to a gate, and keeps the gate's state in checkpoints.

    Args:
        gate: The gate that was given to the callback. If it is None, the gate of the training is used once it is
            found.
    """

    def __init__(self, gate: object | None) -> None:
        self.gate = gate
        self._gate_was_given = gate is not None
        self._pending_state: dict[str, Any] | None = None
        self._dropped_states: list[str] = []

    def use_gate_of_training(
        self, training_gate: object | None, distilled_teachers: Iterable[str], measured_teachers: Iterable[str]
    ) -> None:
        """Use the gate that acts on the loss, unless another one was given to the callback.

        Args:
            training_gate: The gate that the module or trainer has, if any; it is ignored if it does not learn.
            distilled_teachers: Names of the teachers that the training distils from, where they are known.
            measured_teachers: Names of the teachers that the probes measure.

        Raises:
            ValueError: If the gate learns from probes that do not measure one of the training's teachers.
        """
        learner = training_gate if isinstance(training_gate, Learner) else None
        if not self._gate_was_given:
            self.gate = learner
        if learner is not None and learner is self.gate:
            measured = sorted(measured_teachers)
            if unmeasured := sorted(set(distilled_teachers) - set(measured)):
                raise ValueError(
                    f"`gate` learns from probes, which measure the teachers {measured}, but the training distils from "
                    f"{unmeasured[0]!r}; give the teachers the same names in training and in the callback."
                )
        self._restore_state()

    def observe(self, report: ProbeReport) -> dict[str, float]:
        """Let the gate learn from a probe, and return what it wants to be logged."""
        if not isinstance(self.gate, Learner):
            return {}
        gate: object = self.gate
        self.gate.observe(report)
        return dict(gate.scalars()) if isinstance(gate, Loggable) else {}

    def state_dict(self) -> dict[str, Any] | None:
        """Return the gate's state; None if it has none.

        What no checkpoint could hold raises an exception here, where it costs the gate's state alone.
        """
        if not isinstance(self.gate, Stateful):
            return None
        state = self.gate.state_dict()
        torch.save(state, BytesIO())
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the gate's state, now or as soon as the gate is found."""
        self._pending_state = state
        self._restore_state()

    def _restore_state(self) -> None:
        if self._pending_state is not None and isinstance(self.gate, Stateful):
            if problem := load_or_keep(self.gate, self._pending_state):
                self._dropped_states.append(f"the checkpoint's state of `gate` does not fit ({problem}); dropped it.")
            self._pending_state = None

    def dropped_states(self) -> list[str]:
        """Return a sentence about each state that fits no gate, once; asked when the training starts."""
        if self._pending_state is not None:
            self._pending_state = None
            self._dropped_states.append("the checkpoint has the state of a gate, but there is none now; dropped it.")
        sentences, self._dropped_states = self._dropped_states, []
        return sentences
