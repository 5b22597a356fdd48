"""Measurements of an update on disk: arrays in one ``.npz`` file, read without pickle."""

from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from odp_callbacks.update_records import (
    ModuleProducts,
    RuleProducts,
    TokenFeatures,
    TokenInfluence,
    UpdateGram,
    UpdateRecord,
)

UPDATES_FILE = "updates.npz"


def write_updates(updates: tuple[UpdateRecord, ...], folder: Path) -> None:
    """Write the measurements of a report, if there are any, into its folder."""
    arrays: dict[str, Any] = {}
    for index, update in enumerate(updates):
        parts = {
            "gram": update.gram,
            "influence": update.influence,
            "modules": update.gram.modules,
            "features": update.features,
            "rules": update.rules,
        }
        for part, measured in parts.items():
            if measured is not None:
                arrays |= {
                    f"{index}.{part}.{name}": values
                    for name, values in vars(measured).items()
                    if values is not None and name != "modules"
                }
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
                _gram(arrays, index),
                TokenInfluence(**_part(arrays, f"{index}.influence", TokenInfluence))
                if f"{index}.influence.rollout" in arrays.files
                else None,
                TokenFeatures(**_part(arrays, f"{index}.features", TokenFeatures))
                if f"{index}.features.rollout" in arrays.files
                else None,
                _rules(arrays, index),
            )
            for index in range(count)
        )


def _gram(arrays: Any, index: int) -> UpdateGram:
    """The inner products of one measurement; the first files had none by module, and no folds."""
    gram = UpdateGram(**_part(arrays, f"{index}.gram", UpdateGram))
    if f"{index}.modules.cross" not in arrays.files:
        return gram
    names = tuple(str(name) for name in arrays[f"{index}.modules.names"])
    return replace(gram, modules=ModuleProducts(names, arrays[f"{index}.modules.cross"]))


def _rules(arrays: Any, index: int) -> RuleProducts | None:
    """The inner products of rules; None if there were none."""
    if f"{index}.rules.cross" not in arrays.files:
        return None
    products = _part(arrays, f"{index}.rules", RuleProducts)
    return RuleProducts(**{**products, "names": tuple(str(name) for name in products["names"])})


def _part(arrays: Any, prefix: str, kind: type[Any]) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    return {name: arrays[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in arrays.files}
