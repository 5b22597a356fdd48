"""Measures a probe's questions, in all processes together."""

from typing import TYPE_CHECKING, Any

from odp_callbacks.callbacks.constant_reward import warn_of_constant_reward
from odp_callbacks.callbacks.missing_gains import inform_of_missing_gains
from odp_callbacks.callbacks.report_merging import merge_processes
from odp_callbacks.callbacks.shortage import inform_of_shortage
from odp_callbacks.callbacks.time_budget import ProbeLimit
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.rewards import RewardHost
from odp_callbacks.engine.user_defaults import remembering_user_defaults
from odp_callbacks.records import ProbeReport

if TYPE_CHECKING:
    from odp_callbacks.callbacks.monitor import Monitor


def measure_questions(monitor: "Monitor", context: TrainerContext, batch: Any, limit: ProbeLimit) -> ProbeReport:
    """Measure the next questions of a monitor.

    Args:
        monitor: The monitor.
        context: The trainer.
        batch: The batch, whose rows are the questions where there are no ``prompts``.
        limit: How long the probe may take.

    Returns:
        The report on the questions of all processes.
    """
    seed = monitor.next_seed()

    def measure_own_share() -> ProbeReport | None:
        question_ids, rows = monitor.questions.next_questions(context.processes, batch, context.step)
        if not rows:
            return None
        context.prepare()
        probe = monitor.probe
        assert probe is not None
        probe.reward_host = RewardHost(context.trainer_state, context.step)
        last_seconds = {} if monitor.last_report is None else monitor.last_report.stage_seconds
        with remembering_user_defaults(), context.precision_context(), context.progress(last_seconds) as progress:
            return probe.run(
                rows,
                seed=seed,
                ids=question_ids,
                seconds=limit.seconds,
                progress=progress,
                preconditioner=monitor.preconditioner(context),
            )

    report = merge_processes(context, monitor.failures, measure_own_share)
    assert report is not None, "a probe has questions"
    warn_of_constant_reward(context, monitor.failures, report)
    inform_of_missing_gains(context, monitor.failures, report)
    inform_of_shortage(context, report, limit)
    return report
