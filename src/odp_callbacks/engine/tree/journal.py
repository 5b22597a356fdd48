"""A file of finished continuations, so that an interrupted probe does not sample them again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from odp_callbacks.engine.sampling.requests import Continuation


class Journal:
    """A file with one line for each continuation, under the key of its random draws.

    A continuation is a function of its key, the student and its prefix. One that is in the file is therefore the one
    that would be sampled.

    Args:
        path: The file; it is created if it does not exist. A last line that was cut short is ignored.

    Attributes:
        path: The file.
        continuations: The continuations that the file held when it was opened, by key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.continuations: dict[int, Continuation] = {}
        stored_lines = self.path.read_text().splitlines() if self.path.exists() else []
        for stored_line in stored_lines:
            try:
                key, tokens, truncated = json.loads(stored_line)
            except ValueError:
                continue
            self.continuations[key] = Continuation(tuple(tokens), truncated)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What is written next must not be appended to a line that was cut short.
        self._line_break = "\n" if stored_lines else ""

    def write(self, continuations: Mapping[int, Continuation]) -> None:
        """Append continuations to the file, by key."""
        new_lines = [
            json.dumps([key, list(continuation.tokens), continuation.truncated])
            for key, continuation in continuations.items()
        ]
        with self.path.open("a") as journal_file:
            journal_file.write(self._line_break + "".join(f"{line}\n" for line in new_lines))
        self._line_break = ""

    def remove(self) -> None:
        """Delete the file, once the records have been saved."""
        self.path.unlink(missing_ok=True)
