"""The student's LoRA adapter as a folder that other programs can load."""

import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from torch import nn

PREFIX = "base_model.model."
"""Begins the names of all weights in an adapter's file."""


class NamedAdapter:
    """A student's adapter in a folder of its own, under a name that no earlier one had.

    Args:
        student: A model with one active LoRA adapter.
        step: Shown in the name.
        folder: Where the new folder is made; None for the temporary folder.

    Attributes:
        name: For the engine.
        path: Of the new folder.
    """

    def __init__(self, student: nn.Module, step: int, folder: str | None = None) -> None:
        self.name = f"odp-callbacks-{uuid.uuid4().hex[:12]}-{step}"
        self.path = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=folder))
        try:
            save_adapter(student, self.path)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def save_adapter(student: Any, folder: str | os.PathLike[str]) -> Path:
    """Save the adapter that a student uses at the moment, in peft's format.

    Args:
        student: A model with one active LoRA adapter.
        folder: An empty folder.

    Returns:
        The folder, absolute.

    Raises:
        ValueError: If the student does not use exactly one adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = adapter_in_use(student)
    configurations = getattr(student, "peft_config", None) or {}
    if name not in configurations:
        raise ValueError(
            f"`engine` needs a student that uses one adapter, but this one uses {name or 'none'} of "
            f"{sorted(configurations)}; give a model of peft, or leave `engine` out."
        )
    path = Path(folder).resolve()
    weights = get_peft_model_state_dict(student, adapter_name=name, save_embedding_layers=False)
    named = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in weights.items()}
    named = {key: value.detach().cpu().contiguous() for key, value in named.items()}
    # Engines compute in float32 at most.
    named = {key: value.float() if value.element_size() > 4 else value for key, value in named.items()}
    save_file(named, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
    options = {
        key: sorted(value) if isinstance(value, set) else value for key, value in configurations[name].to_dict().items()
    }
    options["inference_mode"] = True
    (path / "adapter_config.json").write_text(json.dumps(options, default=str, indent=1), encoding="utf-8")
    return path


def adapter_in_use(student: nn.Module) -> str | None:
    """Name of the adapter that a student computes with; None for a model that computes without one.

    The layers tell it: while a teacher is run on the student, they may use another adapter than peft's model says.

    Raises:
        ValueError: If there are several.

    Examples:
        >>> adapter_in_use(nn.Linear(1, 1)) is None
        True
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in student.modules() if isinstance(module, BaseTunerLayer)]
    names = sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})
    if len(names) > 1:
        raise ValueError(
            f"`engine` needs a student that uses one adapter, but this one uses {names}; call "
            "`student.set_adapter(name)`, or leave `engine` out."
        )
    return names[0] if names else None
