"""Device, dtype, attention and 4 bits, as the command line loads a model."""

import pytest
import torch

from odp_callbacks.cli.model_placement import ModelPlacement
from odp_callbacks.cli.models import load_student


def test_the_default_is_float32_on_a_cpu_and_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert ModelPlacement().arguments() == {"dtype": torch.float32}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert ModelPlacement().arguments() == {"dtype": "auto", "device_map": {"": "cuda"}}
    assert ModelPlacement(device="cpu").arguments() == {"dtype": torch.float32}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert ModelPlacement().arguments() == {"dtype": torch.float32}, "Apple's GPUs have no float64"


def test_dtype_and_attention_are_those_that_were_asked_for(student_folder: str) -> None:
    placement = ModelPlacement(device="cpu", dtype="bfloat16", attention="eager")
    model, _ = load_student(student_folder, print, placement)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_weights_are_loaded_in_4_bits(student_folder: str) -> None:
    pytest.importorskip("bitsandbytes", reason="an extra that users of 4-bit models install")
    model, _ = load_student(student_folder, print, ModelPlacement(device="cpu", load_in_4bit=True))
    assert model.is_loaded_in_4bit
    assert any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
