"""The processes in which a launcher such as ``torchrun`` started a command, and what they do together."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.text import first_line

T = TypeVar("T")
ALONE = Processes()
"""The single process of a command that no launcher started."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment of each process."""
TIMEOUT = timedelta(days=30)
"""How long a process waits for one that measures longer; one that has ended is noticed at once."""


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """Join the processes that a launcher started; without a launcher there is a single one.

    Each process takes the accelerator that ``LOCAL_RANK`` numbers. They exchange data over gloo.

    Examples:
        >>> with launched_processes() as processes:
        ...     processes.size
        1
    """
    if not all(name in os.environ for name in LAUNCHER_VARIABLES) or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(local_device_index())
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def local_device_index() -> int:
    """The number of this process's accelerator on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.accelerator.device_count())


def console_of(processes: Processes, console: Console) -> Console:
    """The console in the first process; in the others, one that prints nothing."""
    return console if processes.rank == 0 else Console(quiet=True)


def own_folder(processes: Processes, output: Path) -> Path:
    """The folder in which a process keeps what it measures, so that it can resume; ``output`` for a single one.

    Examples:
        >>> own_folder(Processes(1, 4), Path("diagnosis")).as_posix(), own_folder(Processes(), Path("out")).as_posix()
        ('diagnosis/process-1-of-4', 'out')
    """
    return output if processes.size == 1 else output / f"process-{processes.rank}-of-{processes.size}"


def prepared_together(processes: Processes, prepare: Callable[[], T]) -> T:
    """Call a function in every process before any of them measures; if it fails in one, all end.

    What fails in the first process fails in the others for the same reason, so it alone says why.

    Raises:
        Exception: What the function raised in this process.
        RuntimeError: In a process in which it did not fail, while it failed in another.
        SystemExit: In a process other than the first, if it failed in the first.
    """
    kept: list[T] = []
    outcomes = processes.gather_outcomes(lambda: kept.append(prepare()))
    if not outcomes.messages:
        return kept[0]
    if processes.rank > 0 and 0 in outcomes.messages:
        sys.exit(2 if isinstance(outcomes.own_error, ValueError) else 1)
    raise outcomes.error()


def measured_together(processes: Processes, measure: Callable[[], T]) -> list[T]:
    """Call a function in every process, and return all results in every process.

    A process in which it fails ends at once, and the launcher ends the others. They resume if they are started again.

    Raises:
        RuntimeError: If the function failed in this process of several, or if another process has ended.
        Exception: What the function raised, if there is a single process.
    """
    try:
        result = measure()
    except Exception as error:
        if processes.size == 1:
            raise
        raise RuntimeError(f"in process {processes.rank}: {type(error).__name__}: {error}") from error
    try:
        return processes.gather(result)
    except RuntimeError as error:
        raise RuntimeError(
            f"another process has ended before process {processes.rank} could exchange results with it; its message "
            f"says why. The same command resumes from here ({first_line(error)})."
        ) from error
