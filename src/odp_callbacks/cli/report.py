"""``odp-callbacks report``: build the HTML report of saved records."""

from collections.abc import Sequence

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.cli.arguments import add_json_argument, command_parser
from odp_callbacks.cli.results import result_console, show_ranking
from odp_callbacks.cli.saved_records import load_reports
from odp_callbacks.files import check_can_be_written, local_path


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks report``, and run it."""
    parser = command_parser("report", "Build the HTML report of saved records.")
    parser.add_argument(
        "records",
        nargs="+",
        type=str,
        help="Folders of records. Several are the probes of one run, in this order; a folder that holds several folders"
        " of records, such as that of a demo, stands for all of them.",
    )
    parser.add_argument("--output", type=str, default="report.html", help="The HTML file. (default: report.html)")
    parser.add_argument(
        "--confidence", type=float, help="Level of the intervals. (default: that of the last probe's callback, or 0.95)"
    )
    add_json_argument(parser)
    options = parser.parse_args(list(arguments))
    if options.confidence is not None:
        check_confidence(options.confidence)
    page = local_path("output", options.output)
    check_can_be_written("output", page.parent)
    reports = load_reports(options.records)
    show_ranking(
        reports,
        page,
        reports[-1][1].confidence if options.confidence is None else options.confidence,
        result_console(options.json),
        options.json,
    )
    return 0
