"""Which questions a probe measures."""

from collections.abc import Mapping, Sequence
from typing import Any

from odp_callbacks.callbacks.permutation import permuted_index
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.engine.prompts import Row, rows_from_batch


class QuestionOrder:
    """Takes the questions of each probe from a shuffled order, in which every row comes once before any comes twice.

    The order is one shuffled pass over the rows after another. It is computed where it is needed and never stored, so
    ten million rows cost no more than ten. A probe that reaches into the next pass leaves out the rows that it has
    already; they come first in the next probe.

    Args:
        prompts: The rows; None to take the rows of the current training batch instead.
        questions_per_probe: How many questions all processes measure together in one probe.
        seed: Shuffles the rows, alike in all processes.

    Attributes:
        position: How many rows of the order were taken or postponed.
        postponed: Rows that come first in the next probe; fewer than ``questions_per_probe``.

    Examples:
        >>> order = QuestionOrder([{"prompt": letter} for letter in "abc"], questions_per_probe=2, seed=0)
        >>> ids, rows = order.next_questions(Processes())
        >>> order.position, len(set(ids))
        (2, 2)
    """

    def __init__(self, prompts: Sequence[Row] | None, questions_per_probe: int, seed: int) -> None:
        self.prompts = prompts
        self.questions_per_probe = questions_per_probe
        self.seed = seed
        self.position = 0
        self.postponed: list[int] = []

    def next_questions(
        self, processes: Processes, batch: Any = None, step: int = 0
    ) -> tuple[Sequence[str], Sequence[Row]]:
        """Take this process's share of the next questions.

        Args:
            processes: The processes that share the questions.
            batch: The training batch, whose rows are the questions where there are no ``prompts``.
            step: The optimizer step, which becomes a part of the ids of a batch's questions.

        Returns:
            A stable id for each question, and the questions.
        """
        if self.prompts is None:
            return self._questions_of_batch(processes, batch, step)
        own_share = processes.share(self._next_row_indices(len(self.prompts)))
        return [str(row_index) for row_index in own_share], [self.prompts[row_index] for row_index in own_share]

    def state_dict(self) -> dict[str, Any]:
        """Return where the order has got to: a few integers, however many rows there are."""
        rows = None if self.prompts is None else len(self.prompts)
        return {"seed": self.seed, "rows": rows, "position": self.position, "postponed": list(self.postponed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an order where it was saved.

        Raises:
            ValueError: If it was an order of another number of rows.
            KeyError: If something is missing in the state.
        """
        rows = None if self.prompts is None else len(self.prompts)
        if state["rows"] != rows:
            raise ValueError(f"it was saved for {state['rows']} `prompts`, but there are {rows} now")
        seed, position, postponed = int(state["seed"]), int(state["position"]), [int(row) for row in state["postponed"]]
        if position < 0 or not all(0 <= row_index < (rows or 0) for row_index in postponed):
            raise ValueError("it names rows that do not exist")
        self.seed, self.position, self.postponed = seed, position, postponed

    def _next_row_indices(self, rows: int) -> list[int]:
        """Indices of the next rows, each of them once."""
        wanted = min(self.questions_per_probe, rows)
        waiting, postponed = self.postponed, []
        chosen: dict[int, None] = {}
        while len(chosen) < wanted:
            row_index = waiting.pop(0) if waiting else self._advance(rows)
            if row_index in chosen:
                postponed.append(row_index)
            else:
                chosen[row_index] = None
        self.postponed = postponed + waiting
        return list(chosen)

    def _advance(self, rows: int) -> int:
        """The row at the present position of the order, which moves on by one."""
        pass_number, position_in_pass = divmod(self.position, rows)
        self.position += 1
        return permuted_index(position_in_pass, rows, self.seed, pass_number)

    def _questions_of_batch(self, processes: Processes, batch: Any, step: int) -> tuple[Sequence[str], Sequence[Row]]:
        own_count = len(processes.share(range(self.questions_per_probe)))
        rows = rows_from_batch(batch)[:own_count] if own_count else []
        return [f"{step}.{processes.rank}.{position}" for position in range(len(rows))], rows
