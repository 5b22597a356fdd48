"""``odp-callbacks study``: the questions of arXiv:2605.10889 asked of several students on several tasks."""

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from odp_callbacks.analysis.study.figures import CellSummary
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.cli.arguments import command_parser
from odp_callbacks.cli.launched_processes import (
    ALONE,
    launched_processes,
    measured_together,
    prepared_together,
)
from odp_callbacks.cli.results import terminal_text
from odp_callbacks.cli.study.page import write_study_page
from odp_callbacks.cli.study.plan import StudyOptions, Unit, study_options
from odp_callbacks.cli.study.units import StudyFolder
from odp_callbacks.files import local_path, write_atomically
from odp_callbacks.storage.study_summaries import load_summaries, save_summaries
from odp_callbacks.text import first_line

SUMMARIES_FILE = "summaries.json"


@dataclass
class Progress:
    """How far a study is.

    Attributes:
        done: Units that are finished.
        left: Units for which there was no time.
        failed: Units that failed.
        blocked: Units that need one that failed.
    """

    done: list[Unit] = field(default_factory=list)
    left: list[Unit] = field(default_factory=list)
    failed: list[Unit] = field(default_factory=list)
    blocked: list[Unit] = field(default_factory=list)


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks study``, and run it."""
    parser = command_parser("study", "Do the findings of arXiv:2605.10889 hold for these students and tasks?")
    parser.add_class_arguments(StudyOptions)
    given = parser.parse_args(list(arguments)).as_dict()
    del given["config"]
    with launched_processes() as processes:
        return run_study(study_options(given), Console(), processes=processes)


def run_study(
    options: StudyOptions,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
    *,
    processes: Processes = ALONE,
) -> int:
    """Measure what is not measured yet, as far as time allows, and build the page.

    Args:
        options: The arguments of the command.
        console: Where progress is shown.
        clock: Returns the time in seconds.
        processes: The processes that share the pairs of a student and a task; the first one builds the page.

    Returns:
        The exit code: 1 if a unit failed, otherwise 0.

    Raises:
        ValueError: If an option does not work, or the folder holds units with other options.
    """
    prepared_together(processes, options.check)
    progress = Progress()
    if options.records is not None:
        cells = load_summaries(options.records)
    else:
        folder = StudyFolder(options, local_path("output", options.output))
        units = options.units()

        def check() -> None:
            for unit in units:
                folder.check(unit)

        def measure() -> Progress:
            _measure_units(folder, own_units(units, processes), progress, console, clock)
            return progress

        prepared_together(processes, check)
        progress = _all_progress(measured_together(processes, measure))
        cells = _summaries(folder, units)
        if processes.rank == 0:
            save_summaries(cells, folder.output / SUMMARIES_FILE)
    if processes.rank > 0:
        return 1 if progress.failed else 0
    if cells:
        write_study_page(cells, options.page_path(), options.confidence)
        console.print(terminal_text(f"the page: {options.page_path()}"))
    _say_what_is_left(progress, console)
    return 1 if progress.failed else 0


def own_units(units: Sequence[Unit], processes: Processes) -> list[Unit]:
    """The units that a process measures: all those of some pairs of a student and a task, which need each other.

    Examples:
        >>> units = [Unit(student, task, "update") for student in ("small", "large") for task in ("sums", "words")]
        >>> [str(unit) for unit in own_units(units, Processes(1, 3))]
        ['update of small on words']
    """
    pairs = list(dict.fromkeys((unit.student, unit.task) for unit in units))
    own = set(pairs[processes.rank :: processes.size])
    return [unit for unit in units if (unit.student, unit.task) in own]


def _all_progress(parts: Sequence[Progress]) -> Progress:
    """How far all processes together are."""
    return Progress(**{name: [unit for part in parts for unit in getattr(part, name)] for name in vars(parts[0])})


def _measure_units(
    folder: StudyFolder, units: Sequence[Unit], progress: Progress, console: Console, clock: Callable[[], float]
) -> None:
    """Measure unit after unit; a unit that fails is reported, and the others go on."""
    start = clock()
    limit = float("inf") if folder.options.hours is None else 3600 * folder.options.hours
    for number, unit in enumerate(units, 1):
        if folder.is_done(unit):
            progress.done.append(unit)
        elif unit.needed in (*progress.failed, *progress.blocked):
            progress.blocked.append(unit)
        elif clock() - start >= limit or unit.needed in progress.left:
            progress.left.append(unit)
        else:
            place = f"{number} of {len(units)}"
            console.print(terminal_text(f"{place}: {unit} ({(clock() - start) / 60:.1f} min since the start)"))
            _measure(folder, unit, progress, console)


def _measure(folder: StudyFolder, unit: Unit, progress: Progress, console: Console) -> None:
    failure_file = folder.failure_file(unit)
    try:
        folder.measure(unit, console)
    except Exception as error:  # whatever it is, it is this unit's, and the others may work
        progress.failed.append(unit)
        failure_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure_file, traceback.format_exc())
        reason = first_line(error)
        console.print(terminal_text(f"{unit} failed: {reason} (more in {failure_file})"))
    else:
        failure_file.unlink(missing_ok=True)
        progress.done.append(unit)
    gc.collect()  # a peft model refers to itself, and the next unit loads another one


def _summaries(folder: StudyFolder, units: Sequence[Unit]) -> list[CellSummary]:
    """The summaries of all units that have one."""
    return [summary for unit in units if (summary := folder.summary(unit)) is not None]


def _say_what_is_left(progress: Progress, console: Console) -> None:
    reasons = {
        "no time for": progress.left,
        "failed": progress.failed,
        "not started, because what they need failed": progress.blocked,
    }
    for reason, units in reasons.items():
        if units:
            names = "; ".join(map(str, units))
            console.print(terminal_text(f"{reason}: {names}"))
    if any(reasons.values()):
        console.print("The same command goes on from here.")
