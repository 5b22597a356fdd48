"""One report from the parts of a probe that several processes measured."""

from collections.abc import Callable

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import merge


def merge_processes(
    context: TrainerContext, failures: FailureHandler, measure: Callable[[], ProbeReport | None]
) -> ProbeReport | None:
    """Measure in every process and merge what all of them measured into one report, the same in each.

    All processes finish measuring before they exchange anything, so that none waits for another in the middle of a
    probe. A process that fails sends its error; the questions of the others still count.

    Args:
        context: The trainer.
        failures: Warns about a process that failed; if it is strict, the failure is raised in every process.
        measure: Measures this process's questions; returns None if it has none.

    Returns:
        The merged report, or None if no process had a question.

    Raises:
        RuntimeError: If another process failed and either no process succeeded or ``failures`` is strict.
    """
    outcomes = context.processes.gather_outcomes(measure)
    reports = [report for report in outcomes.results if report is not None]
    if outcomes.messages and (failures.strict or not reports):
        raise outcomes.error()
    for rank, message in outcomes.messages.items():
        failures.warn_once(
            context, f"a probe failed in process {rank}; the questions of the other processes still count: {message}"
        )
    return merge(reports) if reports else None
