"""Continuations that are kept as they finish, so that an interrupted probe need not sample them again."""

import json
import os
from pathlib import Path

from odp_callbacks.engine.sampling.categorical import Continuation


class Journal:
    """A file with a line for each continuation, under the key that it was drawn from.

    What a continuation draws is a function of its key: one that is in the file is the one that would be sampled.

    Args:
        path: The file; made if it is not there. A last line that was cut short is passed over.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.known: dict[int, Continuation] = {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                key, tokens, truncated = json.loads(line)
            except ValueError:
                continue
            self.known[key] = Continuation(tuple(tokens), truncated)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._waiting = [""] if lines else []  # behind a line that was cut short

    def put(self, key: int, continuation: Continuation) -> None:
        """Keep one."""
        self._waiting.append(json.dumps([key, list(continuation.tokens), continuation.truncated]))

    def flush(self) -> None:
        """Write down what was kept."""
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in self._waiting))
        self._waiting.clear()

    def remove(self) -> None:
        """Delete the file: the records have everything."""
        self.path.unlink(missing_ok=True)
