"""The records of one training run: where they are saved, and how they are told from those of another."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from pyarrow import ArrowException, parquet

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.files import check_can_be_written
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import RUN_SETTING, record_folders, save
from odp_callbacks.storage.schema import METADATA_KEY, NODES_FILE


class RunRecords:
    """Saves the probes of a run, each with the name of the run.

    Args:
        folder: Where they are saved; None: they are not.

    Attributes:
        run: A random name of the run, which its checkpoints keep; None before the run.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.run: str | None = None

    def start(self, context: TrainerContext, failures: FailureHandler, *, is_new_run: bool) -> None:
        """Check the folder before the first step, and warn if it holds the records of another run.

        Args:
            context: The trainer.
            failures: Issues the warning.
            is_new_run: Whether this is another run than the one before.

        Raises:
            ValueError: In all processes, if the first one cannot save anything in the folder.
        """
        if is_new_run:
            self.run = None
        if complaint := context.processes.broadcast(self._complaint() if context.is_global_zero else None):
            raise ValueError(complaint)
        if self.folder is None or not context.is_global_zero:
            return
        if any(run is None or run != self.run for run in _saved_runs(self.folder)):
            failures.warn_once(
                context,
                f"`records` is {str(self.folder)!r}, where another run has saved its probes. Those of equal steps are "
                "replaced, and `odp-callbacks report` will not show the two as one. Give each run a folder of its own.",
            )

    def save(self, report: ProbeReport, step: int, *, overwrite: bool = True) -> None:
        """Save a probe, if there is a folder for it.

        Args:
            report: The probe's report.
            step: The optimizer step.
            overwrite: Replace a record of the same step; otherwise the name of the new one gets a number.
        """
        if self.folder is None:
            return
        self.run = self.run or uuid4().hex
        settings = {**report.settings, RUN_SETTING: self.run}
        target, number = self.folder / f"step-{step:08d}", 1
        while not overwrite and target.exists():
            number += 1
            target = self.folder / f"step-{step:08d}-{number}"
        save(replace(report, settings=settings), target, overwrite=overwrite)

    def restore(self, run: object) -> None:
        """Continue the run that a checkpoint names.

        Raises:
            TypeError: If that is no name.
        """
        if run is not None and not isinstance(run, str):
            raise TypeError(f"the run's name is {run!r}")
        self.run = run

    def _complaint(self) -> str | None:
        """Why nothing can be saved; None if it can."""
        try:
            if self.folder is not None:
                check_can_be_written("records", self.folder)
        except ValueError as error:
            return str(error)
        return None


def _saved_runs(folder: Path) -> Iterator[str | None]:
    """The runs whose probes a folder holds; what cannot be read is passed over."""
    for record_folder in record_folders(folder):
        try:
            metadata = parquet.read_schema(record_folder / NODES_FILE).metadata or {}
            yield json.loads(metadata[METADATA_KEY])["settings"].get(RUN_SETTING)
        except (OSError, ArrowException, ValueError, KeyError, TypeError, AttributeError):
            continue
