"""Says in the log what a probe left out because its time was limited."""

from odp_callbacks.analysis.time_shortage import time_shortage
from odp_callbacks.callbacks.time_budget import ProbeLimit
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.records import ProbeReport


def inform_of_shortage(context: TrainerContext, report: ProbeReport, limit: ProbeLimit) -> None:
    """Say what there was no time for, and why there was no more time; nothing if there was time for all.

    Args:
        context: The trainer, which writes the message.
        report: The report of a probe.
        limit: The limit of its time.
    """
    if sentence := time_shortage(report):
        given = "" if limit.seconds is None else f" It could take {limit.seconds:.3g} s, {limit.reason}."
        context.inform(f"odp-callbacks: the probe at step {context.step}: {sentence}{given}")
