"""Which row a prompt of the training belongs to."""

from collections.abc import Callable, Sequence
from typing import Any

from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.prompts import Row, as_question, text_tokenizer

ROWS_READ_AT_ONCE = 10_000
"""How many further rows are encoded in search of prompts, before the search is put off to the next measurement."""


class TrainingQuestions:
    """Compares the prompts that a training used with those that a probe makes of the rows.

    Args:
        rows: The rows that a prompt is searched in, where the training shows its tokens only; None where there are
            none.
        tokenizer: The student's tokenizer, or a processor that holds it.
        template: How messages are rendered.
        warn_once: Issues a warning unless the same one was issued before.
    """

    def __init__(
        self, rows: Sequence[Row] | None, tokenizer: Any, template: ChatTemplate, warn_once: Callable[[str], None]
    ) -> None:
        self.rows, self.tokenizer, self.template = rows, text_tokenizer(tokenizer), template
        self.warn_once = warn_once
        self._row_of_prompt: dict[tuple[int, ...], Row] = {}
        self._rows_read, self._last_row = 0, ROWS_READ_AT_ONCE

    def begin_measurement(self) -> None:
        """Allow the search to read further rows: a limit for each prompt would not limit what a batch may take."""
        self._last_row = self._rows_read + ROWS_READ_AT_ONCE

    def checked(self, row: Row, prompt_ids: Sequence[int]) -> Row | None:
        """Return the row, or None if the training's prompt is another one than that which a probe makes of it.

        Args:
            row: The row that the training read.
            prompt_ids: Token ids of the prompt that it made of it.
        """
        try:
            own_ids = self._encode(row)
        except ValueError as error:
            self.warn_once(f"some of the training's rollouts are not measured: {error}")
            return None
        if own_ids == tuple(prompt_ids):
            return row
        self.warn_once(
            "some of the training's rollouts are not measured, because the training made another prompt of the row: "
            f"its tokens end in {list(prompt_ids)[-4:]} and are {len(prompt_ids)}, those of a probe end in "
            f"{list(own_ids[-4:])} and are {len(own_ids)}; give rows whose `prompt` is a list of messages, and a limit "
            "of the prompt's length that cuts none."
        )
        return None

    def found(self, prompt_ids: Sequence[int]) -> Row | None:
        """Return the row whose prompt has these token ids; None if there is none among those that were read."""
        key = tuple(prompt_ids)
        rows = self.rows if self.rows is not None else ()
        last = min(len(rows), self._last_row)
        while key not in self._row_of_prompt and self._rows_read < last:
            row = rows[self._rows_read]
            self._rows_read += 1
            try:
                self._row_of_prompt.setdefault(self._encode(row), row)
            except ValueError:  # a row that no probe can use
                continue
        if key not in self._row_of_prompt:
            self.warn_once(
                "some of the training's rollouts are not measured, because their prompts are not among `prompts`, and "
                "this trainer keeps no other column than the tokens; give the rows of `train_dataset` as `prompts`, "
                "each with the same messages before the answer."
            )
        return self._row_of_prompt.get(key)

    def _encode(self, row: Row) -> tuple[int, ...]:
        return tuple(as_question(row, self.tokenizer, 0, template=self.template).prompt_ids.tolist())
