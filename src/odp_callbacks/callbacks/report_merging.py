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
    own_error: Exception | None = None
    own_report: ProbeReport | None = None
    try:
        own_report = measure()
    except Exception as error:
        if context.processes.size == 1:
            raise
        own_error = error
    own_message = None if own_error is None else f"{type(own_error).__name__}: {own_error}"
    gathered = context.processes.gather((own_report, own_message))
    messages = {rank: message for rank, (_, message) in enumerate(gathered) if message is not None}
    reports = [report for report, _ in gathered if report is not None]
    if messages and (failures.strict or not reports):
        if own_error is not None:
            raise own_error
        rank, message = next(iter(messages.items()))
        raise RuntimeError(f"in process {rank}: {message}")
    for rank, message in messages.items():
        failures.warn_once(
            context, f"a probe failed in process {rank}; the questions of the other processes still count: {message}"
        )
    return merge(reports) if reports else None
