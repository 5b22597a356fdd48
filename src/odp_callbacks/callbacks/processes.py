"""The processes of a training run, and how they exchange data and share work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others in a probe; without a limit it would wait forever for one that died."""


@dataclass(frozen=True)
class Outcomes(Generic[T]):
    """What came of a function that every process called.

    Attributes:
        results: Of the processes in which it did not fail, in the order of their ranks.
        messages: For the rank of each process in which it failed, what went wrong.
        own_error: What it raised in this process; None if it did not fail here.
    """

    results: list[T]
    messages: Mapping[int, str]
    own_error: Exception | None

    def error(self) -> Exception:
        """The error to raise in this process if one failed: its own, or one that names the first that failed."""
        if self.own_error is not None:
            return self.own_error
        rank, message = next(iter(self.messages.items()))
        return RuntimeError(f"in process {rank}: {message}")


@dataclass(frozen=True)
class Processes:
    """Processes that train together, each with the whole student.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        group: A process group on the CPU that only this library uses. It does not interfere with the training's own
            communication, and it can exchange any picklable object, whatever backend the training uses.

    Examples:
        >>> Processes().gather("alone"), Processes().share([1, 2, 3])
        (['alone'], [1, 2, 3])
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def broadcast(self, value: T) -> T:
        """Return the object of the first process, in every process."""
        if self.size == 1:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=0, group=self.group)
        return objects[0]

    def gather(self, value: T) -> list[T]:
        """Return the objects of all processes in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def gather_results(self, function: Callable[[], T]) -> list[T]:
        """Call a function in every process, and return all results; if it fails in one, raise an error in all of them.

        No process waits for another that failed before it could answer.

        Raises:
            RuntimeError: In the processes in which the function did not fail.
            Exception: What it raised, in the others.

        Examples:
            >>> Processes().gather_results(lambda: "alone")
            ['alone']
        """
        outcomes = self.gather_outcomes(function)
        if outcomes.messages:
            raise outcomes.error()
        return outcomes.results

    def gather_outcomes(self, function: Callable[[], T]) -> Outcomes[T]:
        """Call a function in every process, and return what came of it in each.

        Raises:
            Exception: What the function raised, if there is a single process.
        """
        if self.size == 1:
            return Outcomes([function()], {}, None)
        own_error: Exception | None = None
        result: tuple[T, ...] = ()
        try:
            result = (function(),)
        except Exception as error:
            own_error = error
        gathered = self.gather((result, None if own_error is None else f"{type(own_error).__name__}: {own_error}"))
        messages = {rank: message for rank, (_, message) in enumerate(gathered) if message is not None}
        return Outcomes([value for values, _ in gathered for value in values], messages, own_error)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of the items: consecutive ones, in shares whose sizes differ by at most one.

        A share is empty where there are fewer items than processes.

        Examples:
            >>> [list(Processes(rank, 2).share("abc")) for rank in range(2)], list(Processes(3, 4).share("abc"))
            ([['a', 'b'], ['c']], [])
        """
        minimum_size, remainder = divmod(len(items), self.size)
        start = self.rank * minimum_size + min(self.rank, remainder)
        return items[start : start + minimum_size + (self.rank < remainder)]


class ProcessGroups:
    """Creates this library's process group once for each run of ``torch.distributed``."""

    # The keys are the default groups of torch.distributed; an entry disappears when its default group is destroyed.
    _processes_of_world: ClassVar[WeakKeyDictionary[Any, Processes]] = WeakKeyDictionary()

    @classmethod
    def processes(cls) -> Processes:
        """Return the processes that train together; creates the group at the first call, in all of them at once."""
        world = dist.group.WORLD
        if world not in cls._processes_of_world:
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            cls._processes_of_world[world] = Processes(dist.get_rank(), dist.get_world_size(), group)
        return cls._processes_of_world[world]


def current_processes() -> Processes:
    """Return the processes that ``torch.distributed`` knows, or a single one if it is not in use.

    The first call must be made by all processes together.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Processes()
    return ProcessGroups.processes()
