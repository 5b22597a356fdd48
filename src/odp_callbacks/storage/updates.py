"""Measurements of an update on disk: arrays in one ``.npz`` file, read without pickle."""

from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from odp_callbacks.update_records import TokenInfluence, UpdateGram, UpdateRecord

UPDATES_FILE = "updates.npz"


def write_updates(updates: tuple[UpdateRecord, ...], folder: Path) -> None:
    """Write the measurements of a report, if there are any, into its folder."""
    arrays: dict[str, Any] = {}
    for index, update in enumerate(updates):
        for part in ("gram", "influence"):
            measured = getattr(update, part)
            if measured is not None:
                arrays |= {f"{index}.{part}.{name}": values for name, values in vars(measured).items()}
    if arrays:
        np.savez_compressed(folder / UPDATES_FILE, **arrays)


def read_updates(content: bytes | None) -> tuple[UpdateRecord, ...]:
    """Read what :func:`write_updates` wrote, from the content of the file; empty if there is no file."""
    if content is None:
        return ()
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        count = 1 + max(int(name.split(".")[0]) for name in arrays.files)
        return tuple(
            UpdateRecord(
                UpdateGram(**_part(arrays, f"{index}.gram", UpdateGram)),
                TokenInfluence(**_part(arrays, f"{index}.influence", TokenInfluence))
                if f"{index}.influence.rollout" in arrays.files
                else None,
            )
            for index in range(count)
        )


def _part(arrays: Any, prefix: str, kind: type[UpdateGram] | type[TokenInfluence]) -> dict[str, Any]:
    return {field.name: arrays[f"{prefix}.{field.name}"] for field in fields(kind)}
