"""The table of the teachers' own accuracy."""

import io
from dataclasses import replace

from rich.console import Console

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.records import TeacherResponse
from odp_callbacks.visualization.accuracy_table import accuracy_table, percentage_estimate
from odp_callbacks.visualization.html_report.page import render_page
from tests.helpers.records import example_report


def test_the_table_has_the_student_and_each_teacher_that_was_asked() -> None:
    report = example_report()
    assert accuracy_table(report) is None
    teacher = report.teachers[0]
    responses = tuple(
        TeacherResponse(teacher, rollout.question, "", float(number), bool(number), bool(number))
        for rollout in report.rollouts
        for number in range(2)
    )
    report = replace(report, teacher_responses=responses)
    console = Console(width=80, file=io.StringIO(), record=True)
    table = accuracy_table(report)
    assert table is not None
    console.print(table)
    text = console.export_text()
    assert "50.0%" in text
    assert "student" in text
    assert teacher in text
    assert report.teachers[1] not in text, "nobody asked it"
    assert max(map(len, text.splitlines())) <= 80
    page = render_page([("", report)], "title", 0.95)
    assert '<table id="accuracy">' in page
    assert '<table id="accuracy">' not in render_page([("", example_report())], "title", 0.95)


def test_a_figure_without_interval_says_why() -> None:
    nan = float("nan")
    assert percentage_estimate(Estimate(nan, nan, nan, 0, 0, note="no node")) == "no estimate\nno node"
    assert percentage_estimate(Estimate(1.0, nan, nan, 2, 4, note="2 questions")) == "100.0%\n2 questions"
    assert percentage_estimate(Estimate(0.1, -0.05, 0.25, 9, 9), signed=True) == "+10.0%\n-5 to 25"
