"""The table of the paper's protocol shows the figures, the deviations and no number that is undefined."""

from dataclasses import replace
from io import StringIO

import numpy as np
from rich.console import Console

from odp_callbacks.analysis.paper.aggregates import class_difference, teacher_figures
from odp_callbacks.analysis.paper.scored_nodes import score_nodes
from odp_callbacks.visualization.paper_table import paper_table
from tests.helpers.paper import example_record


def printed(record, width=80):
    console = Console(width=width, record=True, file=StringIO())
    console.print(paper_table(record))
    return console.export_text()


def test_the_table_shows_every_figure_in_80_columns():
    record = example_record()
    text, nodes = printed(record), score_nodes(record)
    for figures in teacher_figures(nodes):
        (line,) = (
            line
            for line in text.split(figures.teacher)[1].splitlines()
            if line.split()[:1] == [figures.paths] and f"{figures.cosine.value:+.3f}" in line
        )
        assert f"({figures.cosine.low:+.3f}, {figures.cosine.high:+.3f})" in line
        assert f"{figures.positive.value:.0%}" in line
        assert f"{figures.weighted_cosine.value:+.3f}" in line
        assert f"{figures.advantage.value:+.3f}" in line
    assert f"{class_difference(nodes).difference.value:+.3f}" in text
    assert all(f"- {sentence}" in text for sentence in (*record.deviations, *record.unpublished))
    assert "reverse KL" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_name_with_markup_is_shown_as_it_is():
    record = replace(example_record(), teachers=("[red]one[/red]", "two"))
    assert "[red]one[/red]" in printed(record)


def test_without_questions_nothing_is_claimed():
    text = printed(replace(example_record(), questions=(), left_out={"pass rate 0": 3}))
    assert "nan" not in text
    assert "pass rate 0: 3" in text
    assert not np.any([digit in text.split("0 questions")[0] for digit in ("+0.", "-0.")])
