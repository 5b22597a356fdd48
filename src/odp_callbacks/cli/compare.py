"""``odp-callbacks compare``: the predicted gains of two runs or two checkpoints, and their differences."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.summaries import SPLITS, summarise
from odp_callbacks.cli.arguments import add_confidence_argument, add_json_argument, command_parser
from odp_callbacks.cli.results import print_json, terminal_text
from odp_callbacks.cli.saved_records import load_reports
from odp_callbacks.records import ProbeReport


@dataclass(frozen=True)
class Difference:
    """The predicted gains of one teacher in two reports.

    Attributes:
        teacher: The teacher's name.
        rollouts: The class of rollouts: all, correct or incorrect ones.
        first: Predicted gain in the first report.
        second: Predicted gain in the second report.
        difference: The second less the first.
        low: Lower end of the difference's interval.
        high: Upper end of the difference's interval.
        verdict: Which is higher, or that the interval includes 0.
    """

    teacher: str
    rollouts: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    verdict: str


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks compare``, and run it."""
    parser = command_parser("compare", "Compare two runs, or two checkpoints of one run.")
    parser.add_argument("first", type=str, help="Folder of records.")
    parser.add_argument("second", type=str, help="Folder of records.")
    add_confidence_argument(parser)
    add_json_argument(parser)
    options = parser.parse_args(list(arguments))
    check_confidence(options.confidence)
    first, second = (load_reports([folder])[-1][1] for folder in (options.first, options.second))
    differences = compare_reports(first, second, options.confidence)
    if options.json:
        print_json([asdict(difference) for difference in differences])
    else:
        Console().print(differences_table(differences))
    return 0


def compare_reports(first: ProbeReport, second: ProbeReport, confidence: float = 0.95) -> list[Difference]:
    """Compare the predicted gains of the teachers that two reports share, as if the two were independent.

    Args:
        first: A report.
        second: Another report.
        confidence: Level of the intervals.

    Raises:
        ValueError: If no teacher has the same name in both.
    """
    first_gains, second_gains = (
        {(summary.teacher, summary.split): summary.figures["predicted_gain"] for summary in summarise(one, confidence)}
        for one in (first, second)
    )
    differences = []
    for (teacher, split), before in first_gains.items():
        if split not in SPLITS or (teacher, split) not in second_gains:
            continue
        after = second_gains[teacher, split]
        value = after.value - before.value
        half_width = math.hypot(before.half_width, after.half_width)
        verdict = "second higher" if value > half_width else "first higher" if -value > half_width else "cannot tell"
        differences.append(
            Difference(
                teacher, split, before.value, after.value, value, value - half_width, value + half_width, verdict
            )
        )
    if not differences:
        raise ValueError("`first` and `second` have no teacher in common; a teacher must have one name in both.")
    return differences


def differences_table(differences: Sequence[Difference]) -> Table:
    """The differences as a table for a terminal."""
    table = Table(box=SIMPLE_HEAVY, title="Predicted gain, second less first", show_edge=False)
    for heading in ("teacher", "rollouts", "first", "second", "difference", ""):
        table.add_column(heading, justify="left" if heading in ("teacher", "rollouts", "") else "right")
    for row in differences:
        table.add_row(
            terminal_text(row.teacher),
            row.rollouts,
            f"{row.first:+.3f}",
            f"{row.second:+.3f}",
            f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})",
            row.verdict,
        )
    table.caption = (
        "The intervals treat the runs as independent: if both measured the same questions, they are too wide."
    )
    return table
