"""Says in the log why a probe has no update gain."""

from odp_callbacks.analysis.ranking import missing_gains
from odp_callbacks.analysis.update_gain import withheld_because
from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.records import ProbeReport


def inform_of_missing_gains(context: TrainerContext, failures: FailureHandler, report: ProbeReport) -> None:
    """Say once why teachers have no update gain, unless a warning has said that all rewards are equal.

    Args:
        context: The trainer, which writes the message.
        failures: Remembers whether the message was written before.
        report: The report of a probe.
    """
    if not report.updates or len({rollout.reward for rollout in report.rollouts}) == 1:
        return
    grams = [update.gram for update in report.updates]
    notes = {teacher: withheld_because(grams, index) for index, teacher in enumerate(report.teachers)}
    if sentence := missing_gains(notes):
        failures.inform_once(context, sentence)
