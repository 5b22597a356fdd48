"""When a run is probed: the options of both callbacks, in one place."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from odp_callbacks.analysis.confidence_sequences import check_decay
from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.scalar_selection import LogOption, check_log
from odp_callbacks.callbacks.names import check_name
from odp_callbacks.engine.config import ProbeConfig, ProbeOptions, resolve_config
from odp_callbacks.files import local_path


class ScheduleOptions(TypedDict, total=False):
    """The fields of :class:`ProbeSchedule`, as keyword arguments."""

    name: str | None
    every_n_steps: int
    questions_per_probe: int
    max_overhead: float | None
    update_every_n_steps: int | None
    step_gain_every_n_steps: int | None
    pooled_decay: float
    records: str | PathLike[str] | None
    at_start: bool
    on_validation: bool
    log: LogOption
    confidence: float
    seed: int
    strict: bool
    optimizer_geometry: bool


class CallbackOptions(ScheduleOptions, ProbeOptions, total=False):
    """The keyword arguments of both callbacks: when to probe, and how."""


@dataclass(frozen=True)
class ProbeSchedule:
    """When a training run is probed, on how many questions, at what cost, and where the results go.

    :class:`ScheduleOptions` has the same fields, for functions that take them as keyword arguments.

    Attributes:
        name: Tells this callback from the others in the same trainer: its figures are logged as ``odp-<name>/…``, and
            its records are in the folder ``<records>/<name>``. None: ``odp/…`` and ``<records>``.
        every_n_steps: Number of optimizer steps between probes.
        questions_per_probe: Number of questions in a probe. They are taken from a shuffled order, in which every
            question comes once before any comes twice.
        max_overhead: The largest share of the training's wall-clock time that probes may take, in (0, 1). A probe that
            would exceed it is limited to the time that is left, or skipped if that is less than half of what it takes.
            The first probe is limited to a quarter of what the planned length of the run allows. None: every probe
            runs in full.
        update_every_n_steps: Number of optimizer steps between measurements on the training's own rollouts:
            update gain at the cost of the gradients, without continuations. None: no such measurements.
        step_gain_every_n_steps: Number of optimizer steps between figures about the steps that the training took: what
            they were expected to gain, by one forward pass over the rollouts that the training shows, and their cosine
            with each teacher's last measured update. Where ``max_overhead`` leaves no time, the next figure is of more
            steps. None: no such figures.
        pooled_decay: Share of the earlier probes' weight that is kept at each probe in the figures ``odp/pooled/…``, in
            (0, 1]. They pool update gain over the probes, with intervals that are valid at all probes together. The
            student changes, so earlier probes are forgotten; 1 forgets nothing.
        records: Folder in which each probe's records are saved as ``step-<step>``; see
            :mod:`odp_callbacks.storage`. None: records are not saved.
        at_start: Also probe before the first step.
        on_validation: Also probe at the end of every validation.
        log: Which scalars the loggers get: "main" for those that answer what users ask, at most 40 of three teachers,
            "all" for several hundred, or a list of figures to log besides the main ones, such as ``["alignment"]``.
        confidence: Level of the intervals, in (0, 1), in scalars, pictures and texts, and by default in what a
            report says (:attr:`~odp_callbacks.ProbeReport.confidence`).
        seed: Seed of the callback's own random stream.
        strict: Raise the exception of a failing probe, instead of warning once and continuing the training.
        optimizer_geometry: Also measure in the geometry of Adam's next step, with its second moments as the
            preconditioner (:func:`~odp_callbacks.engine.gradients.adam.adam_preconditioner`). The
            metrics ``odp/adam/…`` come from the same continuations as the Euclidean ones; they exist from the first
            optimizer step on.

    Raises:
        ValueError: If a value is out of range, or ``records`` is a URL.

    Examples:
        >>> ProbeSchedule(every_n_steps=50).probe_is_due(step=100, last_step=99)
        True
    """

    name: str | None = None
    every_n_steps: int = 100
    questions_per_probe: int = 8
    max_overhead: float | None = 0.1
    update_every_n_steps: int | None = None
    step_gain_every_n_steps: int | None = 1
    pooled_decay: float = 0.9
    records: str | PathLike[str] | None = None
    at_start: bool = False
    on_validation: bool = False
    log: LogOption = "main"
    confidence: float = 0.95
    seed: int = 0
    strict: bool = False
    optimizer_geometry: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check_name(self.name)
        counts = {"every_n_steps": self.every_n_steps, "questions_per_probe": self.questions_per_probe}
        for name in ("update_every_n_steps", "step_gain_every_n_steps"):
            if getattr(self, name) is not None:
                counts[name] = getattr(self, name)
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {count!r} was given.")
        if self.max_overhead is not None and not 0 < self.max_overhead < 1:
            raise ValueError(f"`max_overhead` must lie in (0, 1) or be None, but {self.max_overhead!r} was given.")
        object.__setattr__(self, "log", check_log(self.log))
        check_confidence(self.confidence)
        check_decay("pooled_decay", self.pooled_decay)
        if self.records is not None:
            local_path("records", self.records)

    @property
    def records_folder(self) -> Path | None:
        """The folder for records."""
        return None if self.records is None else local_path("records", self.records) / (self.name or "")

    def probe_is_due(self, step: int, last_step: int) -> bool:
        """Whether a multiple of ``every_n_steps`` lies after ``last_step`` and not after ``step``."""
        return _passes_multiple(self.every_n_steps, step, last_step)

    def update_is_due(self, step: int, last_step: int) -> bool:
        """Whether a multiple of ``update_every_n_steps`` lies after ``last_step`` and not after ``step``."""
        return self.update_every_n_steps is not None and _passes_multiple(self.update_every_n_steps, step, last_step)

    def step_gain_is_due(self, step: int, last_step: int) -> bool:
        """Whether a multiple of ``step_gain_every_n_steps`` lies after ``last_step`` and not after ``step``."""
        interval = self.step_gain_every_n_steps
        return interval is not None and _passes_multiple(interval, step, last_step)


def _passes_multiple(interval: int, step: int, last_step: int) -> bool:
    return step // interval > max(last_step, 0) // interval


def resolve_options(
    config: ProbeConfig | None, options: Mapping[str, Any], *, other_arguments: Collection[str] = ()
) -> tuple[ProbeSchedule, ProbeConfig]:
    """Sort a callback's keyword arguments into a schedule and a probe's configuration.

    Args:
        config: The configuration to start from; None starts from the defaults.
        options: Fields of :class:`ProbeSchedule`, and fields of :class:`~odp_callbacks.ProbeConfig` that replace those
            of ``config``.
        other_arguments: Names of the callback's other keyword arguments. The error for an unknown option lists them
            too.

    Returns:
        The schedule and the configuration.

    Raises:
        TypeError: If an option is unknown. The message names the closest valid option and lists all of them.
        ValueError: If an option is out of range.

    Examples:
        >>> schedule, config = resolve_options(None, {"every_n_steps": 50, "max_new_tokens": 32})
        >>> schedule.every_n_steps, config.max_new_tokens
        (50, 32)
    """
    schedule_names = {field.name for field in fields(ProbeSchedule)}
    schedule_options = {name: value for name, value in options.items() if name in schedule_names}
    probe_options = {name: value for name, value in options.items() if name not in schedule_names}
    resolved_config = resolve_config(config, probe_options, other_arguments={*schedule_names, *other_arguments})
    return ProbeSchedule(**schedule_options), resolved_config
