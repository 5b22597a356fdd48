"""The student that the benchmarks share: SmolLM2-135M-Instruct with LoRA, as the demo loads it."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from odp_callbacks.cli.models import load_student


def lora_student(device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model, _ = load_student(None, print)
    student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).eval()
    return student.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
