"""``odp-callbacks compare``: the gains of teachers in two runs or two checkpoints, and their differences."""

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
from odp_callbacks.visualization.wording import figure_title, shared_gain_figure


@dataclass(frozen=True)
class Difference:
    """The gains of one teacher in two reports.

    Attributes:
        teacher: The teacher's name.
        rollouts: The class of rollouts: all, correct or incorrect ones.
        figure: Which gain: the update gain if both reports have it, otherwise the predicted gain.
        first: Gain in the first report.
        second: Gain in the second report.
        difference: The second less the first.
        low: Lower end of the difference's interval.
        high: Upper end of the difference's interval.
        verdict: Which is higher, or that the interval includes 0.
    """

    teacher: str
    rollouts: str
    figure: str
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
    first, second = (_last_report(name, getattr(options, name)) for name in ("first", "second"))
    differences = compare_reports(first, second, options.confidence)
    if options.json:
        print_json([asdict(difference) for difference in differences])
    else:
        Console().print(differences_table(differences))
    return 0


def _last_report(argument: str, folder: str) -> ProbeReport:
    """The last probe in a folder.

    Raises:
        ValueError: If it has measured nothing.
    """
    report = load_reports([folder])[-1][1]
    if not report.nodes and not report.updates:
        raise ValueError(
            f"`{argument}` is {folder!r}, a probe that measured neither an update nor nodes, so there is nothing to "
            "compare."
        )
    return report


def compare_reports(first: ProbeReport, second: ProbeReport, confidence: float = 0.95) -> list[Difference]:
    """Compare the gains of the teachers that two reports share, as if the two were independent.

    Args:
        first: A report.
        second: Another report.
        confidence: Level of the intervals.

    Raises:
        ValueError: If no teacher has the same name in both, or no gain was measured in both.
    """
    first_summaries, second_summaries = summarise(first, confidence), summarise(second, confidence)
    figure = shared_gain_figure(first_summaries, second_summaries)
    if not figure:
        raise ValueError(
            "`first` and `second` have no gain in common: one measured only the update, the other only nodes. Measure "
            "one of them again."
        )
    first_gains, second_gains = (
        {(summary.teacher, summary.split): summary.figures[figure] for summary in summaries}
        for summaries in (first_summaries, second_summaries)
    )
    differences = []
    for (teacher, split), before in first_gains.items():
        if split not in SPLITS or (teacher, split) not in second_gains:
            continue
        after = second_gains[teacher, split]
        change = after.minus_independent(before)
        verdict = "second higher" if change.low > 0 else "first higher" if change.high < 0 else "cannot tell"
        differences.append(
            Difference(
                teacher,
                split,
                figure,
                before.value,
                after.value,
                change.value,
                change.low,
                change.high,
                verdict,
            )
        )
    if not differences:
        raise ValueError("`first` and `second` have no teacher in common; a teacher must have one name in both.")
    return differences


def differences_table(differences: Sequence[Difference]) -> Table:
    """The differences as a table for a terminal."""
    name = figure_title(differences[0].figure)
    table = Table(box=SIMPLE_HEAVY, title=f"{name[0].upper()}{name[1:]}, second less first", show_edge=False)
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
