"""Where the command line loads a model to, in which dtype, and with which attention."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from odp_callbacks.cli.launched_processes import local_device_index
from odp_callbacks.text import first_line

DTYPES = ("float32", "bfloat16", "float16")
AUTOMATIC = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelPlacement:
    """How student and teachers are loaded.

    Attributes:
        device: Where they are: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto`` for the GPU if there is one
            other than Apple's, which has no float64. Under ``torchrun``, each process takes the GPU of its
            ``LOCAL_RANK``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` for float32 on a CPU, and for the dtype of the
            checkpoint elsewhere.
        attention: transformers' attention implementation, such as ``eager``, ``sdpa`` or ``flash_attention_2``; none
            for the model's own choice.
        load_in_4bit: Whether weights are loaded in 4 bits by bitsandbytes (QLoRA).
    """

    device: str = AUTOMATIC
    dtype: str = AUTOMATIC
    attention: str | None = None
    load_in_4bit: bool = False

    def check_placement(self) -> None:
        """Raise a ValueError for a device that this machine lacks, or for an unknown dtype."""
        if self.dtype not in (AUTOMATIC, *DTYPES):
            raise ValueError(f"`dtype` must be {AUTOMATIC!r} or one of {list(DTYPES)}, but {self.dtype!r} was given.")
        self.torch_device()
        if self.load_in_4bit:
            from importlib.util import find_spec

            if find_spec("bitsandbytes") is None:
                raise ValueError("`load_in_4bit` needs bitsandbytes; install it with: pip install bitsandbytes")

    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ValueError: If this machine has no such device.
        """
        if self.device == AUTOMATIC:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            # Apple's GPUs have no float64, in which probabilities and sums are computed.
            return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else _own(accelerator)
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`device` must be one that this machine has, such as 'cpu', but {self.device!r} was given "
                f"({first_line(error)})."
            ) from error
        return _own(device)

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained``."""
        device = self.torch_device()
        automatic: Any = torch.float32 if device.type == "cpu" else AUTOMATIC
        arguments: dict[str, Any] = {"dtype": automatic if self.dtype == AUTOMATIC else getattr(torch, self.dtype)}
        if self.attention is not None:
            arguments["attn_implementation"] = self.attention
        if self.load_in_4bit:
            from transformers import BitsAndBytesConfig

            compute_dtype = arguments["dtype"] if isinstance(arguments["dtype"], torch.dtype) else torch.bfloat16
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
            )
        if device.type != "cpu" or self.load_in_4bit:
            arguments["device_map"] = {"": str(device)}
        return arguments


def _own(device: torch.device) -> torch.device:
    """The device of this process, where a launcher started several and the device has no number yet."""
    has_number = ":" in str(device)
    if has_number or device.type in ("cpu", "mps") or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device(device.type, local_device_index())
