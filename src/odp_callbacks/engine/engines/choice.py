"""Which engine an option names: ``"local"``, an address, or an object."""

from collections.abc import Mapping

from odp_callbacks.engine.engines.class_path import engine_of_class_path
from odp_callbacks.engine.engines.completions_client import is_address
from odp_callbacks.engine.engines.interface import SamplingEngine

LOCAL = "local"
"""The student's own model samples."""
TRAINER = "trainer"
"""The engine that TRL's trainer holds samples; the callback puts the trainer in place of this name."""


def as_engine(engine: object) -> SamplingEngine | None:
    """Return the engine that an option names.

    Args:
        engine: ``"local"``; the address of a vLLM server; an object with the methods of
            :class:`~odp_callbacks.engine.engines.SamplingEngine`; a ``vllm.LLM``; a trainer of TRL that samples with
            vLLM; or a mapping with the ``class_path`` and the ``init_args`` of such an object.

    Returns:
        The engine; None for ``"local"``.

    Raises:
        ValueError: If it is none of these.

    Examples:
        >>> as_engine("local") is None, as_engine("http://localhost:8000")
        (True, VllmServer('http://localhost:8000'))
    """
    if engine == LOCAL:
        return None
    if is_address(engine):
        from odp_callbacks.engine.engines.vllm_server import VllmServer

        return VllmServer(engine)
    if engine == TRAINER:
        raise ValueError(
            "`engine` is 'trainer', which is the engine that TRL's trainer samples with; it works in "
            "GradientAlignmentTrainerCallback, and elsewhere the trainer itself can be given."
        )
    if isinstance(engine, Mapping):
        engine = engine_of_class_path(engine)
    if not isinstance(engine, str | type):
        if isinstance(engine, SamplingEngine):
            return engine
        if hasattr(engine, "llm_engine") and hasattr(engine, "generate"):
            from odp_callbacks.engine.engines.vllm_in_process import VllmInProcess

            return VllmInProcess(engine)
        if hasattr(engine, "accelerator") and hasattr(engine, "state"):
            from odp_callbacks.engine.engines.trl_trainer import engine_of_trainer

            return engine_of_trainer(engine)
    raise ValueError(
        "`engine` must be 'local', 'trainer', the address of a vLLM server such as 'http://localhost:8000', a "
        f"vllm.LLM, or an object with the methods sync, sample and release, but {engine!r} was given."
    )


def engine_of_other_policies(engine: SamplingEngine | None) -> SamplingEngine | None:
    """The engine as far as it can also sample from other policies than the training's.

    These are the student after a step on trial, and a teacher on the student's base. The server of TRL's trainer gets
    the training's own weights alone: it could not be given them back.

    Returns:
        The engine; None where the model itself has to sample.

    Examples:
        >>> engine_of_other_policies(as_engine("http://localhost:8000"))
        VllmServer('http://localhost:8000')
    """
    from odp_callbacks.engine.engines.trl_trainer import TrainerServerEngine

    return None if isinstance(engine, TrainerServerEngine) else engine


def check_engine(engine: object) -> None:
    """Raise ``ValueError`` unless an option names an engine; the trainer's may be named before the trainer is known."""
    if engine != TRAINER:
        as_engine(engine)


def engine_label(engine: object) -> str:
    """What records call an engine; an address is without a password.

    Examples:
        >>> engine_label("local"), engine_label("http://me:secret@localhost:8000")
        ('local', 'http://localhost:8000')
    """
    if engine == TRAINER:
        return TRAINER
    resolved = as_engine(engine)
    return LOCAL if resolved is None else resolved.name
