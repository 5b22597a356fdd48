"""Which questions a probe measures."""

from collections.abc import Sequence
from typing import Any

import torch

from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.engine.prompts import Row, rows_from_batch


class QuestionOrder:
    """Takes the questions of each probe from a shuffled order, in which every row comes once before any comes twice.

    Args:
        prompts: The rows; None to take the rows of the current training batch instead.
        questions_per_probe: How many questions all processes measure together in one probe.
        random_stream: Shuffles the rows, alike in all processes.
    """

    def __init__(self, prompts: Sequence[Row] | None, questions_per_probe: int, random_stream: torch.Generator) -> None:
        self.prompts = prompts
        self.questions_per_probe = questions_per_probe
        self.random_stream = random_stream
        self.remaining: list[int] = []

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
        wanted = min(self.questions_per_probe, len(self.prompts))
        if len(self.remaining) < wanted:
            still_remaining = set(self.remaining)
            shuffled = torch.randperm(len(self.prompts), generator=self.random_stream).tolist()
            self.remaining += [row_index for row_index in shuffled if row_index not in still_remaining]
        chosen, self.remaining = self.remaining[:wanted], self.remaining[wanted:]
        own_share = processes.share(chosen)
        return [str(row_index) for row_index in own_share], [self.prompts[row_index] for row_index in own_share]

    def _questions_of_batch(self, processes: Processes, batch: Any, step: int) -> tuple[Sequence[str], Sequence[Row]]:
        own_count = len(processes.share(range(self.questions_per_probe)))
        rows = rows_from_batch(batch)[:own_count] if own_count else []
        return [f"{step}.{processes.rank}.{position}" for position in range(len(rows))], rows
