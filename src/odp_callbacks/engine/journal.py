"""A file of finished rollouts and continuations, so that an interrupted probe does not sample them again."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from zlib import crc32

from odp_callbacks.engine.sampling.requests import Continuation, FinishedCallback
from odp_callbacks.files import local_path


class Journal:
    """A file with one line for each continuation, under the key of its random draws.

    A rollout is the continuation of a prompt. A continuation is a function of its key, the student and its prefix. One
    that is in the file is therefore the one that would be sampled.

    Args:
        path: The file; it is created if it does not exist. A line that was cut short or changed is passed
            over.

    Attributes:
        path: The file.
        continuations: The continuations that the file holds, by key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path("path", path)
        self.continuations: dict[int, Continuation] = {}
        stored = self.path.read_bytes() if self.path.exists() else b""
        for line in stored.split(b"\n"):
            if (entry := _entry(line)) is not None:
                self.continuations[entry[0]] = entry[1]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What is written next must not be appended to a line that was cut short.
        self._line_break = b"\n" if stored else b""

    def write(self, continuations: Mapping[int, Continuation]) -> None:
        """Append continuations to the file, by key."""
        lines = [_line(key, continuation) for key, continuation in continuations.items()]
        content = self._line_break + b"".join(lines)
        self._line_break = b"\n"  # unless all of it is written
        with self.path.open("ab") as journal_file:
            journal_file.write(content)
        self._line_break = b""
        self.continuations.update(continuations)

    def remove(self) -> None:
        """Delete the file, once the records have been saved."""
        self.path.unlink(missing_ok=True)


def sample_unless_stored(
    journal: Journal | None,
    keys: Sequence[int],
    sample: Callable[[list[int], FinishedCallback], Sequence[Continuation]],
    on_finished: FinishedCallback | None = None,
    max_new_tokens: int | None = None,
) -> list[Continuation]:
    """Take the continuations that a journal holds, sample the others, and write these as they finish.

    Args:
        journal: None samples all.
        keys: Of the random draws, one for each continuation.
        sample: From the indices of the continuations to sample, and a function to be called with those that have
            finished, by their place among these, to the continuations in that order.
        on_finished: Called with continuations by index, those of the journal first.
        max_new_tokens: The limit of all continuations. Those that the journal holds with a lower one are sampled again,
            and those with a higher one are cut. None: they had the same limit.

    Returns:
        The continuations in the order of ``keys``.
    """
    stored = {} if journal is None else journal.continuations
    continuations = {
        index: _within_limit(stored[key], max_new_tokens)
        for index, key in enumerate(keys)
        if key in stored and _has_reached(stored[key], max_new_tokens)
    }
    if on_finished is not None:
        on_finished(dict(continuations))
    missing = [index for index in range(len(keys)) if index not in continuations]

    def receive(finished: dict[int, Continuation]) -> None:
        by_index = {missing[place]: continuation for place, continuation in finished.items()}
        if journal is not None:
            journal.write({keys[index]: continuation for index, continuation in by_index.items()})
        if on_finished is not None:
            on_finished(by_index)

    if missing:
        continuations.update(zip(missing, sample(missing, receive), strict=True))
    return [continuations[index] for index in range(len(keys))]


def _has_reached(continuation: Continuation, max_new_tokens: int | None) -> bool:
    """Whether a continuation has ended, or is as long as the limit."""
    return max_new_tokens is None or not continuation.truncated or len(continuation.tokens) >= max_new_tokens


def _within_limit(continuation: Continuation, max_new_tokens: int | None) -> Continuation:
    """The continuation as it would have been with the limit."""
    if max_new_tokens is None or len(continuation.tokens) <= max_new_tokens:
        return continuation
    return Continuation(continuation.tokens[:max_new_tokens], truncated=True)


def _line(key: int, continuation: Continuation) -> bytes:
    """A line of the file: a checksum, and the continuation as JSON."""
    entry = json.dumps([key, list(continuation.tokens), continuation.truncated]).encode()
    return b"%08x %s\n" % (crc32(entry), entry)


def _entry(line: bytes) -> tuple[int, Continuation] | None:
    """Inverse of :func:`_line`; None for a line that is not what was written."""
    checksum, _, entry = line.partition(b" ")
    if not entry or checksum != b"%08x" % crc32(entry):
        return None
    key, tokens, truncated = json.loads(entry)
    return key, Continuation(tuple(tokens), truncated)
