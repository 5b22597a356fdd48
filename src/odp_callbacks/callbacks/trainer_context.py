"""What a monitor needs to know of a trainer, and may ask of it, at one moment of the training."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.records import ProbeReport


@dataclass(frozen=True)
class TrainerContext:
    """A trainer as the monitor sees it; each callback builds one from its own trainer.

    Attributes:
        step: Number of optimizer steps taken.
        is_global_zero: Whether this is the process that writes files and pictures.
        processes: The processes that train together and share the questions of each probe.
        precision_context: Returns a context manager with the precision that the student is trained in.
        progress: Maps the seconds that each stage took in the last probe to a context manager. Entering it gives a
            function of a stage's name, the work done and the total work, which displays the progress.
        log: Sends metrics, and the report of a probe if there is one to draw, to the trainer's loggers.
        warn: Issues a warning in the first process.
        inform: Logs a piece of information in the first process.
        optimizers: The optimizers that train the student.
        is_training: Whether a training is under way; False in a validation on its own.
        trainer_state: The state that TRL passes to reward functions; None for a trainer that has none.
        planned_steps: Returns the optimizer step at which the training will end; None if that is not known.
        prepare: Finds the student as it is now, and prepares the monitor for it (:meth:`Monitor.prepare`).
    """

    step: int
    is_global_zero: bool
    processes: Processes
    precision_context: Callable[[], AbstractContextManager[Any]]
    progress: Callable[[Mapping[str, float]], AbstractContextManager[Callable[[str, int, int], None]]]
    log: Callable[[dict[str, float], ProbeReport | None], None]
    warn: Callable[[str], None]
    inform: Callable[[str], None]
    optimizers: Sequence[Optimizer] = ()
    is_training: bool = True
    trainer_state: Any = None
    prepare: Callable[[], None] = lambda: None
    planned_steps: Callable[[], int | None] = lambda: None
