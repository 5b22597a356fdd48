"""Which scalars a callback sends to the loggers, whatever trainer it has."""

from collections.abc import Collection, Mapping

from odp_callbacks.analysis.scalar_selection import ROOT, ScalarSelection
from odp_callbacks.callbacks.headlines import LATER_FIGURES
from odp_callbacks.callbacks.monitor import Monitor
from odp_callbacks.callbacks.names import named_metrics, root_of
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.gates.protocols import Loggable
from odp_callbacks.visualization.tensorboard_tags import pinned_cards

ADDRESS = "http://localhost:6006"
"""Where TensorBoard is, unless it is told otherwise."""


class LoggedScalars:
    """The scalars of one callback.

    Args:
        monitor: The callback's monitor.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        gain = "update_gain" if monitor.config.update else "predicted_gain"
        self.selection = ScalarSelection(tuple(monitor.teachers), monitor.schedule.log, gain)

    @property
    def root(self) -> str:
        """How the names of the callback's scalars begin."""
        return root_of(self.monitor.schedule.name)

    def selected(self, metrics: Mapping[str, float], monitored: Collection[str] = ()) -> dict[str, float]:
        """The scalars that are logged, under the callback's own names, also those that are NaN.

        Args:
            metrics: All scalars of a probe or of a step.
            monitored: Names of scalars that something in the trainer monitors.
        """
        besides = [f"{ROOT}/{name.removeprefix(f'{self.root}/')}" for name in monitored]
        return named_metrics(self.selection.selected(metrics, besides), self.monitor.schedule.name)

    def for_tensorboard(self, metrics: Mapping[str, float], monitored: Collection[str] = ()) -> dict[str, float]:
        """As :meth:`selected`, with what TensorBoard draws beside the main scalars, in runs and groups of its own.

        These are the change of the reward, beside the sum of the gains, and the ends of further intervals.

        Args:
            metrics: All scalars of a probe or of a step.
            monitored: Names of scalars that something in the trainer monitors.
        """
        names = named_metrics(dict.fromkeys(self.selection.drawn(), 0.0), self.monitor.schedule.name)
        return self.selected(metrics, [*monitored, *names])

    def columns(self, monitored: Collection[str] = ()) -> list[str]:
        """Names of the main scalars that this training can have, known before it starts.

        Args:
            monitored: Names of scalars that something in the trainer monitors.
        """
        schedule = self.monitor.schedule
        names = self.selection.columns(
            steps=schedule.step_gain_every_n_steps is not None,
            training=schedule.update_every_n_steps is not None,
            geometry=schedule.optimizer_geometry,
            gate=isinstance(self.monitor.gate_learning.gate, Loggable),
        )
        return list(dict.fromkeys([*named_metrics(dict.fromkeys(names, 0.0), schedule.name), *monitored]))

    def explain(self, context: TrainerContext, metrics: Mapping[str, float], *, tensorboard: bool) -> None:
        """Say once how to see the figures of the first probe, and which of those that are wanted it does not have.

        Args:
            context: The trainer.
            metrics: All scalars of a probe.
            tensorboard: Whether one of the trainer's loggers writes to TensorBoard.
        """
        later = tuple(name for name in (*LATER_FIGURES, "pooled/"))
        missing = [name for name in self.selection.without_match(metrics) if not name.startswith(later)]
        if missing:
            message = f"`log` names {missing[0]!r}, but the probes have no figure whose name begins like that."
            self.monitor.failures.warn_once(context, message)
        if tensorboard:
            address = ADDRESS + pinned_cards(self.root, self.selection.gain)
            message = f"TensorBoard with the main figures pinned on top: {address}"
            self.monitor.failures.inform_once(context, message)
