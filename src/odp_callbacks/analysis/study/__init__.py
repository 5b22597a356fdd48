"""A study of the findings of arXiv:2605.10889 on several students and tasks, as pure functions of summaries.

A cell is one measurement of one student on one task. Its summary holds each figure with what the figure is when one
question is left out (:mod:`~odp_callbacks.analysis.study.figures`). From the summaries alone, every finding gets a
contrast, an interval and a verdict (:mod:`~odp_callbacks.analysis.study.findings`).
"""
