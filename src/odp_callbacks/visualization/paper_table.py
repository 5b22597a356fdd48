"""The figures of a measurement by the paper's protocol, tabulated like the paper's."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.paper.aggregates import CLASSES, class_difference, teacher_figures
from odp_callbacks.analysis.paper.difficulty import DIFFICULTIES, difficulty
from odp_callbacks.analysis.paper.oracle_filter import oracle_filter
from odp_callbacks.analysis.paper.predictor_correlations import path_correlations
from odp_callbacks.analysis.paper.records import PREDICTORS, PaperRecord
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes, score_nodes
from odp_callbacks.text import displayable
from odp_callbacks.visualization.table import CAPTION_WIDTH


def paper_table(record: PaperRecord, confidence: float = 0.95) -> Group:
    """Tabulate the paper's figures: teachers, classes, correlations, oracle filter, difficulty, and deviations.

    Args:
        record: A measurement by the protocol of arXiv:2605.10889.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        Tables that ``rich.print`` shows.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """
    nodes = score_nodes(record)
    return Group(
        _teachers(record, nodes, confidence),
        "",
        _correlations(nodes, confidence),
        "",
        _filters(nodes),
        "",
        _difficulties(record, nodes, confidence),
        "",
        _notes(record),
    )


def _teachers(record: PaperRecord, nodes: ScoredNodes, confidence: float) -> Table:
    """Each teacher on all, correct and incorrect paths."""
    headings = ("mean\ncosine", "interval", "positive", "SR-\nweighted", "teacher\nadvantage")
    table = _table("Protocol of arXiv:2605.10889: cosine on the logits", "teacher\n  paths", *headings)
    table.min_width = CAPTION_WIDTH
    for figures in teacher_figures(nodes, confidence):
        if figures.paths == CLASSES[0]:
            table.add_row(f"[bold]{escape(displayable(figures.teacher))}[/bold]")
        table.add_row(
            f"  {figures.paths}",
            _number(figures.cosine.value),
            _interval(figures.cosine),
            _share(figures.positive.value),
            _number(figures.weighted_cosine.value),
            _number(figures.advantage.value),
            end_section=figures.paths == CLASSES[-1],
        )
    difference = class_difference(nodes, confidence=confidence)
    p_value = "-" if np.isnan(difference.p_value) else f"{difference.p_value:.2g}"
    table.caption = (
        f"{len(record.questions)} questions, {len(nodes)} nodes, {record.targeted_rollouts:,} targeted rollouts.\n"
        f"Incorrect minus correct, mean of the teachers: {_number(difference.difference.value)}\n"
        f"{_interval(difference.difference)}, p = {p_value}. Intervals are over questions."
    )
    return table


def _correlations(nodes: ScoredNodes, confidence: float) -> Table:
    """Spearman correlations within a path."""
    title = "Spearman correlation with the cosine, within a path"
    table = _table(title, "predictor", "all teachers", "interval")
    table.min_width = CAPTION_WIDTH
    table.caption = "kl is KL(student‖teacher): the paper's 'forward KL', everybody else's reverse KL."
    estimates = path_correlations(nodes, confidence)
    for name in ("depth", *PREDICTORS):
        estimate = estimates["all", name]
        table.add_row(name.replace("_", " "), _number(estimate.value), _interval(estimate))
    return table


def _filters(nodes: ScoredNodes) -> Table:
    """The oracle filter of each teacher."""
    headings = ("kept", "SR range x cosine\nbefore", "\nafter")
    table = _table("Oracle filter: tokens with positive cosine", "teacher", *headings)
    for one in oracle_filter(nodes):
        table.add_row(escape(displayable(one.teacher)), _share(one.kept), _number(one.before), _number(one.after))
    return table


def _difficulties(record: PaperRecord, nodes: ScoredNodes, confidence: float) -> Table:
    """Mean cosine of each teacher by difficulty of the question."""
    table = _table("Mean cosine by difficulty (pass rate below 0.25, below 0.8, above)", "teacher", *DIFFICULTIES)
    table.min_width = CAPTION_WIDTH
    bins = np.array([difficulty(pass_rate) for pass_rate in nodes.pass_rate.tolist()], dtype=object)
    columns = [teacher_figures(nodes.select(bins == name), confidence) for name in DIFFICULTIES]
    for index, teacher in enumerate(record.teachers):
        cells = [_number(column[index * len(CLASSES)].cosine.value) for column in columns]
        table.add_row(escape(displayable(teacher)), *cells)
    counts = [sum(difficulty(question.pass_rate) == name for question in record.questions) for name in DIFFICULTIES]
    table.caption = "Questions: " + ", ".join(f"{n} {name}" for n, name in zip(counts, DIFFICULTIES, strict=True))
    return table


def _notes(record: PaperRecord) -> str:
    """Deviations from the paper, what it does not publish, and the questions that were left out."""
    lines = [
        *_list("Deviations from the paper", record.deviations or ("none",)),
        *_list("Not published by the paper, and done like this", record.unpublished),
        *_list("Questions left out", [f"{reason}: {count}" for reason, count in record.left_out.items()]),
    ]
    return escape("\n".join(lines))


def _list(title: str, entries: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"- {entry}" for entry in entries)] if entries else []


def _table(title: str, first: str, *headings: str) -> Table:
    """An empty table whose numbers are aligned to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.3f}"


def _share(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0%}"


def _interval(estimate: Estimate) -> str:
    return "-" if np.isnan(estimate.low) else f"({estimate.low:+.3f}, {estimate.high:+.3f})"
