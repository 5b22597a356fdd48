"""The processes of a training run, and how they share a probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long one process waits for the others in a probe; one that died would otherwise be waited for without end."""


@dataclass(frozen=True)
class Processes:
    """Processes that train together, each with the whole student.

    Attributes:
        rank: Of this one.
        size: How many there are.
        group: A process group on the CPU, of this library's own: it stands in nobody's way, and objects of any kind
            pass through it whatever the training uses.

    Examples:
        >>> Processes().gather("alone"), Processes().share([1, 2, 3])
        (['alone'], [1, 2, 3])
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def broadcast(self, value: T) -> T:
        """The first process's object, given to all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's object, in the order of their ranks, given to all."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: neighbours, as many as anybody else's, to within one; none may be left for some.

        Examples:
            >>> [list(Processes(rank, 2).share("abc")) for rank in range(2)], list(Processes(3, 4).share("abc"))
            ([['a', 'b'], ['c']], [])
        """
        each, more = divmod(len(items), self.size)
        first = self.rank * each + min(self.rank, more)
        return items[first : first + each + (self.rank < more)]


_made: dict[int, Processes] = {}


def processes() -> Processes:
    """Those that torch.distributed knows; alone where there are none. All must ask together when they first ask."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Processes()
    world = id(dist.group.WORLD)
    if world not in _made:
        _made.clear()
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _made[world] = Processes(dist.get_rank(), dist.get_world_size(), group)
    return _made[world]
