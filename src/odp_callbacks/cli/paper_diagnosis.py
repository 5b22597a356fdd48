"""``odp-callbacks diagnose --protocol paper``: the protocol of arXiv:2605.10889, interrupted and resumed at will."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from odp_callbacks.analysis.paper.aggregates import class_difference, teacher_figures
from odp_callbacks.analysis.paper.oracle_filter import oracle_filter
from odp_callbacks.analysis.paper.predictor_correlations import path_correlations
from odp_callbacks.analysis.paper.records import PaperRecord, merge_paper_records
from odp_callbacks.analysis.paper.scored_nodes import score_nodes
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.cli.diagnosis import fingerprint
from odp_callbacks.cli.launched_processes import ALONE, measured_together
from odp_callbacks.cli.results import print_json, terminal_text
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.paper import PaperConfig, PaperProbe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.timing import Progress
from odp_callbacks.storage import DamagedRecordsError
from odp_callbacks.storage.paper_records import load_paper_record, save_paper_record
from odp_callbacks.visualization.paper_table import paper_table

RECORD_FILE = "paper.npz"
IDENTITY = "diagnosis"
"""The setting of a record that tells which arguments it was measured with."""


def run_paper_diagnosis(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    output: Path,
    *,
    config: PaperConfig,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    on_stage: Progress | None = None,
    processes: Processes = ALONE,
) -> PaperRecord:
    """Measure by the paper's protocol, and save the record to ``paper.npz``.

    Started again with the same arguments, it resumes: finished rollouts are kept in a journal, and a finished record is
    not measured again. Several processes share the questions; the first one saves the record of all.

    Args:
        student: A causal language model.
        tokenizer: Its tokenizer.
        rows: The questions.
        reward: The verifier.
        teachers: As in :class:`~odp_callbacks.engine.paper.PaperProbe`.
        output: Folder of the diagnosis.
        config: The options.
        seed: Seed of all random draws.
        identity: What else distinguishes this diagnosis, such as the student's path.
        on_stage: Called with the name of a stage, the amount done, and the total.
        processes: The processes that measure together, with the same arguments.

    Raises:
        ValueError: If the folder holds a record with other arguments, or if an argument does not work.
    """
    probe = PaperProbe(student, tokenizer, reward, teachers, config)
    name = fingerprint(
        {
            **config.settings(),
            "seed": seed,
            "rows": fingerprint(list(rows)),
            "teachers": list(probe.teachers),
            **(identity or {}),
        }
    )
    path = output / RECORD_FILE
    try:
        record = load_paper_record(path)
        if record.settings.get(IDENTITY) != name:
            raise ValueError(
                f"`output` is {str(output)!r}, which holds a measurement by the paper's protocol with other arguments; "
                "give another folder, or remove that one."
            )
        return record
    except FileNotFoundError:
        pass
    except DamagedRecordsError as error:
        warnings.warn(f"odp-callbacks: the questions are measured again, because {error}", stacklevel=2)
    # A journal of other arguments holds rollouts of another student or of other prompts.
    of_process = "" if processes.size == 1 else f"-process-{processes.rank}-of-{processes.size}"
    journal = Journal(output / f"paper-{name}{of_process}.journal")
    places = processes.share(range(len(rows)))

    def measure() -> PaperRecord:
        own_rows, ids = [rows[place] for place in places], [str(place) for place in places]
        return probe.run(own_rows, seed=seed, ids=ids, progress=on_stage, journal=journal)

    record = merge_paper_records(measured_together(processes, measure))
    record = replace(record, settings={**record.settings, IDENTITY: name})
    if processes.rank == 0:
        save_paper_record(record, path, overwrite=True)
    processes.gather(None)  # what a journal holds is saved before it is removed
    journal.remove()
    return record


def show_paper_record(record: PaperRecord, path: Path, confidence: float, console: Console, as_json: bool) -> None:
    """Print the paper's figures.

    Args:
        record: The measurement.
        path: Where it was saved.
        confidence: Level of the intervals.
        console: Where the tables are printed.
        as_json: Print the figures as JSON on standard output instead.
    """
    if not as_json:
        console.print(paper_table(record, confidence))
        console.print(f"\nThe record: {terminal_text(path)}")
        return
    nodes = score_nodes(record)
    correlations = path_correlations(nodes, confidence)
    print_json(
        {
            "record": str(path),
            "deviations": list(record.deviations),
            "unpublished": list(record.unpublished),
            "left_out": dict(record.left_out),
            "targeted_rollouts": record.targeted_rollouts,
            "teachers": [asdict(figures) for figures in teacher_figures(nodes, confidence)],
            "incorrect_minus_correct": asdict(class_difference(nodes, confidence=confidence)),
            "correlations": [
                {"teacher": teacher, "predictor": predictor, **asdict(estimate)}
                for (teacher, predictor), estimate in correlations.items()
            ],
            "oracle_filter": [asdict(one) for one in oracle_filter(nodes)],
        }
    )
