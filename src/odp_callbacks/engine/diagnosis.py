"""A diagnosis in one call: which teacher would help this student, measured without training."""

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import nn
from typing_extensions import Unpack

from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.engine.config import ProbeConfig, ProbeOptions
from odp_callbacks.engine.paper import PaperConfig, PaperProbe
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.timing import Progress
from odp_callbacks.records import ProbeReport

PROTOCOLS = ("default", "paper")
"""This project's own measurement, and that of arXiv:2605.10889."""


@overload
def diagnose(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    *,
    protocol: Literal["default"] = "default",
    config: ProbeConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Unpack[ProbeOptions],
) -> ProbeReport: ...


@overload
def diagnose(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    *,
    protocol: Literal["paper"],
    config: PaperConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> PaperRecord: ...


def diagnose(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    *,
    protocol: str = "default",
    config: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> ProbeReport | PaperRecord:
    """Measure on the student's own rollouts which teacher would help it, without training.

    Args:
        student: A causal language model with LoRA (peft); protocol ``"paper"`` needs no LoRA.
        tokenizer: Its tokenizer.
        rows: Questions in TRL's convention.
        reward: The verifier, a TRL reward function.
        teachers: Teachers by name, or anything else that :func:`~odp_callbacks.engine.teachers.as_teachers` accepts.
        protocol: ``"default"``: this project's measurement. ``"paper"``: the protocol of arXiv:2605.10889, a cosine on
            the logits that takes far more rollouts; the two are not to be compared.
        config: How to measure; None for the defaults. It is a :class:`~odp_callbacks.engine.config.ProbeConfig`, or a
            :class:`~odp_callbacks.engine.paper.PaperConfig` for protocol ``"paper"``.
        seed: Seed of everything random.
        progress: Called with the stage's name, the amount done, and the total.
        **options: Fields of the configuration, which replace those of ``config``.

    Returns:
        A report, or a :class:`~odp_callbacks.analysis.paper.records.PaperRecord` for protocol ``"paper"``.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an argument cannot be used; the message says which, and what would work.
    """
    check_protocol(protocol)
    if protocol == "paper":
        return PaperProbe(student, tokenizer, reward, teachers, config, **options).run(
            rows, seed=seed, progress=progress
        )
    probe = Probe(student, tokenizer, reward, teachers, config, **options)
    return probe.run(probe.validate(rows), seed=seed, progress=progress)


def check_protocol(protocol: str) -> None:
    """Raise ``ValueError`` unless the protocol is known."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {list(PROTOCOLS)}, but {protocol!r} was given.")
