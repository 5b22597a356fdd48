"""Runs of TensorBoard beside the trainer's own: one for each teacher."""

import os
from collections.abc import Mapping
from typing import Any


def folder_of(writer: Any) -> str:
    """The folder that a ``SummaryWriter`` of torch or of tensorboardX writes to; it may be an address."""
    return str(writer.log_dir if hasattr(writer, "log_dir") else writer.logdir)


class TeacherRuns:
    """Writers for runs in subfolders of a writer's folder, ``<folder>/<root>/<run>``, opened when they are needed.

    A resumed training goes on in the same folders. What an interrupted run had logged after the checkpoint is replaced:
    TensorBoard drops the points of earlier event files from the first step of the new one on.

    Args:
        own_writer: Writer of the trainer's own run, a ``SummaryWriter`` of torch or of tensorboardX.
        root: Name of the subfolder.
    """

    def __init__(self, own_writer: Any, root: str) -> None:
        self.folder, self.root = folder_of(own_writer), root
        kinds = [kind for kind in type(own_writer).__mro__ if kind.__name__ == "SummaryWriter"]
        self._kind: Any = kinds[0] if kinds else type(own_writer)
        self._writers: dict[str, Any] = {}

    def writer(self, run: str, step: int, *, replaces: bool) -> Any:
        """The writer of a run, of the same kind as that of the trainer.

        Args:
            run: Name of the run.
            step: The optimizer step.
            replaces: Whether a run that is opened replaces its points from this step on.
        """
        if run not in self._writers:
            folder = os.path.join(self.folder, self.root, run)  # not a Path: it may be an address
            self._writers[run] = self._kind(folder, purge_step=step if replaces else None)
        return self._writers[run]

    def add_scalars(self, by_run: Mapping[str, Mapping[str, float]], step: int, *, replaces: bool) -> None:
        """Write scalars.

        Args:
            by_run: Scalars by tag, by the name of the run; what belongs to no run of its own is left out.
            step: The optimizer step.
            replaces: As in :meth:`writer`.
        """
        for run, scalars in by_run.items():
            if run and scalars:
                writer = self.writer(run, step, replaces=replaces)
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Write to the files what is waiting."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close all files; the next scalar opens others."""
        writers, self._writers = list(self._writers.values()), {}
        for writer in writers:
            writer.close()
