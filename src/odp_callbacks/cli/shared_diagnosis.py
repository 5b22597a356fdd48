"""A diagnosis that several processes share: each measures a part of the questions, and the first one merges."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.cli.diagnosis import run_diagnosis
from odp_callbacks.cli.launched_processes import measured_together, own_folder
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import UnscoredError
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import merge, save


def check_shares(processes: Processes, rows: Sequence[Row]) -> None:
    """Raise ``ValueError`` unless there is a question for every process."""
    if len(rows) < processes.size:
        raise ValueError(
            f"`questions` gives {len(rows)} questions to {processes.size} processes; give at least one to each, or "
            "start fewer processes."
        )


def run_shared_diagnosis(
    processes: Processes, rows: Sequence[Row], output: Path, config: ProbeConfig, **run: Any
) -> ProbeReport:
    """Measure as :func:`~odp_callbacks.cli.diagnosis.run_diagnosis` does, in all processes.

    Each process keeps its part in a folder of its own, from which it resumes. The first one saves the merged records. A
    ``budget`` is divided by the questions; ``seconds`` are those of each process.

    Args:
        processes: The processes.
        rows: All questions, the same in every process.
        output: Folder of the diagnosis.
        config: How to measure.
        **run: The other arguments of that function.

    Returns:
        The report on all questions, in every process.
    """
    if processes.size == 1:
        return run_diagnosis(rows=rows, output=output, config=config, **run)
    places = processes.share(range(len(rows)))
    own_rows = [rows[place] for place in places]
    budget = max(1, round(config.budget * len(own_rows) / len(rows))) if config.budget else config.budget

    def measure() -> ProbeReport | UnscoredError:
        try:
            return run_diagnosis(
                rows=own_rows,
                first_question=places[0],
                output=own_folder(processes, output),
                config=replace(config, budget=budget),
                **run,
            )
        except UnscoredError as error:  # the reward function has nothing to say about these questions
            return error

    measured = measured_together(processes, measure)
    reports = [part for part in measured if isinstance(part, ProbeReport)]
    if not reports:
        raise next(part for part in measured if isinstance(part, UnscoredError))
    merged = merge(reports)
    scored = {rollout.question for rollout in merged.rollouts}
    merged = replace(
        merged,
        settings={**merged.settings, "budget": config.settings()["budget"]},
        left_out={**merged.left_out, "questions": len(rows) - len(scored)},
    )
    if processes.rank == 0:
        save(merged, output / "records", overwrite=True)
    return merged
