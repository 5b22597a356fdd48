"""What commands print: a table for a reader, or JSON for a script."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from odp_callbacks.analysis.ranking import rank
from odp_callbacks.cli.teacher_accuracy import accuracy_as_json
from odp_callbacks.records import ProbeReport
from odp_callbacks.text import printable
from odp_callbacks.visualization.accuracy_table import accuracy_table
from odp_callbacks.visualization.html_report import write_report
from odp_callbacks.visualization.table import summary_table


def result_console(as_json: bool) -> Console:
    """A console for what is not the result: with JSON on standard output, it writes to standard error."""
    return Console(stderr=as_json)


def show_ranking(
    reports: Sequence[tuple[str, ProbeReport]], page: Path, confidence: float, console: Console, as_json: bool
) -> None:
    """Write the HTML report, and print how the teachers of the last probe rank.

    Args:
        reports: Probes and their names, in the order in which they were measured.
        page: The HTML file to write.
        confidence: Level of the intervals.
        console: Where the table is printed.
        as_json: Print the ranking as JSON on standard output instead.
    """
    last_report = reports[-1][1]
    write_report(list(reports) if len(reports) > 1 else last_report, page, confidence=confidence)
    ranking = rank(last_report, confidence)
    if as_json:
        classes = {
            split: [asdict(ranked_teacher) for ranked_teacher in ranked_teachers]
            for split, ranked_teachers in ranking.classes.items()
        }
        printed = {"answer": ranking.answer, "report": str(page), "classes": classes}
        if accuracy := accuracy_as_json(last_report, confidence):
            printed["accuracy"] = accuracy
        print_json(printed)
        return
    console.print(summary_table(last_report, confidence))
    if (own_accuracy := accuracy_table(last_report, confidence)) is not None:
        console.print("", own_accuracy)
    console.print(f"\n[bold]{terminal_text(ranking.answer)}[/bold]\nThe report: {terminal_text(page)}")


def print_json(value: Any) -> None:
    """Print a value as JSON, with null where a number is not finite."""
    print(json.dumps(_finite(value)))


def terminal_text(value: object) -> str:
    """Text that a rich console prints as it is: control characters and markup have no effect."""
    return escape(printable(str(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
