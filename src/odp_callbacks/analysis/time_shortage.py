"""What a probe left out because its time was too short, as a sentence."""

from odp_callbacks.records import ProbeReport

NOT_DONE = {
    "unsampled_questions": "{count} questions were not sampled",
    "questions_without_update": "update gain leaves out {count} questions",
    "updates_without_influence": "the influence of tokens was not measured",
    "updates_without_rules": "rules were not measured",
    "questions_without_nodes": "single tokens of {count} questions were not measured",
    "questions_without_node_gradients": "the gradients of single tokens of {count} questions were not computed",
    "nodes_without_step_alignment": "the step alignment was not measured",
}
"""Entries of :attr:`ProbeReport.left_out` that mean that there was no time, and what each says."""


def time_shortage(report: ProbeReport) -> str:
    """Say what there was no time for, and how many seconds would about do; empty if there was time for all.

    Args:
        report: The report of a probe with a limit of its seconds.

    Examples:
        >>> settings = {"response_limit": 64, "max_new_tokens": 256}
        >>> report = ProbeReport(("base",), (), (), (), {}, 0, 0, {"rollouts": 5.0}, settings)
        >>> time_shortage(report)
        'for lack of time, responses were cut at 64 of 256 tokens; about 20 s would do for all.'
    """
    limit, wanted = response_limit(report), report.settings.get("max_new_tokens", 0)
    shortages = [] if limit is None else [f"responses were cut at {limit:,} of {wanted:,} tokens"]
    shortages += [
        text.format(count=report.left_out[name]) for name, text in NOT_DONE.items() if report.left_out.get(name)
    ]
    if not shortages:
        return ""
    factor = 1.0 if limit is None else wanted / limit
    questions = len({rollout.question for rollout in report.rollouts})
    unsampled = report.left_out.get("unsampled_questions", 0)
    measured = questions - report.left_out.get("questions_without_update", 0)
    factor *= max(1, questions + unsampled) / max(1, measured if report.updates else questions)
    seconds = factor * sum(report.stage_seconds.values())
    joined = shortages[0] if len(shortages) == 1 else f"{', '.join(shortages[:-1])} and {shortages[-1]}"
    return f"for lack of time, {joined}; about {seconds:,.0f} s would do for all."


def response_limit(report: ProbeReport) -> int | None:
    """The length at which all responses were cut for lack of time; None if they were not."""
    limit = report.settings.get("response_limit")  # the shortest, if several processes or probes were cut
    return limit if isinstance(limit, int) else None
