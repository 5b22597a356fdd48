"""A file of finished demonstrations and summaries, so that none is sampled twice."""

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any
from zlib import crc32

from odp_callbacks.files import local_path


class DemonstrationStore:
    """A file with one line for each question that is done, under a key of all that its responses depend on.

    Args:
        path: The file; it is created when the first question is done. A line that was cut short or changed is passed
            over.
        identity: What distinguishes the responses beside what their key is made of, such as the model's name.

    Attributes:
        path: The file.
        entries: What the file holds, by key.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> DemonstrationStore(f"{folder.name}/store", {"model": "a"}).write("key", {"tries": 3})
        >>> DemonstrationStore(f"{folder.name}/store").entries
        {'key': {'tries': 3}}
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any] | None = None) -> None:
        self.path = local_path("path", path)
        self.identity = dict(identity or {})
        self.entries: dict[str, dict[str, Any]] = {}
        stored = self.path.read_bytes() if self.path.exists() else b""
        for line in stored.split(b"\n"):
            checksum, _, entry = line.partition(b" ")
            if entry and checksum == _checksum(entry):
                key, value = json.loads(entry)
                self.entries[key] = value

    def key(self, *parts: Any) -> str:
        """The key of something that depends on these parts and on the identity.

        Args:
            *parts: What JSON can hold; other values are described by their ``repr``.
        """
        content = json.dumps([self.identity, *parts], sort_keys=True, default=repr).encode()
        return blake2b(content, digest_size=16).hexdigest()

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        """Append what belongs to a key to the file."""
        entry = json.dumps([key, value]).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as store_file:
            # A line break comes first, too: the line before may have been cut short.
            store_file.write(b"\n%s %s\n" % (_checksum(entry), entry))
        self.entries[key] = dict(value)


def _checksum(entry: bytes) -> bytes:
    return b"%08x" % crc32(entry)
