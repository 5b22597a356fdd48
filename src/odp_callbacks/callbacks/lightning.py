"""The Lightning callback: probes a running on-policy distillation and logs what each teacher is worth."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import nn
from typing_extensions import override

from odp_callbacks.callbacks.monitor import Host, Monitor
from odp_callbacks.callbacks.processes import processes
from odp_callbacks.callbacks.progress import ProbeProgress, display_beside
from odp_callbacks.distillation import OnPolicyDistillation
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.loggers import log_pictures

StudentLocator = str | Callable[[LightningModule], nn.Module]


SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy", "XLAFSDPStrategy"}
"""Strategies that spread parameters over processes, or whose processes torch.distributed does not know."""
HOOKS = {"lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks"}
"""Where hooks are defined that a module does not override; ``is_overridden`` knows one of the two packages."""


class GradientAlignmentCallback(Callback):
    r"""Measure, while a student trains, how far each teacher pulls where success lies.

    Every ``every_n_steps`` optimizer steps it takes some questions, samples the student's own rollouts, estimates at
    chosen tokens the ideal gradient by targeted continuations, and compares it with each teacher's distillation
    gradient on the LoRA parameters. It logs, step by step and through the trainer's own loggers,
    ``odp/alignment/<teacher>/<all|correct|incorrect>`` and likewise the other figures of
    :mod:`odp_callbacks.analysis.summaries`, each with ``_low`` and ``_high``, and ``odp/probe/…`` about the probe itself. A
    TensorBoard logger also gets histograms and coloured rollouts.

    It is a guest: weights, gradients, optimizer, random streams, module modes and adapters are bit for bit what they
    would be without it. A probe that fails is reported once and training goes on, unless ``strict``.

    The whole of the last probe is in :attr:`last_report`.

    Args:
        teachers: A mapping from name to teacher (:class:`~odp_callbacks.Teacher`, a model, ``"base"``, a context
            template), a list of teachers, or one.
        prompts: Questions: rows with a ``prompt`` and the columns that reward and contexts need, as a list or any
            dataset with ``len`` and indexing. None: the current batch's rows.
        reward: The verifier, a TRL reward function ``reward(prompts, completions, **columns) -> list[float]`` with
            values in [0, 1].
        every_n_steps: Optimizer steps between probes.
        questions_per_probe: How many questions a probe takes; the next ones in a shuffled order.
        max_overhead: The most that probes may take of the training's wall-clock time, in (0, 1). A probe that would
            exceed it gets fewer continuations, if the config gives it a ``budget`` or ``seconds``, or is left out; the
            first one always runs, for only then it is known what it takes. None: every probe runs in full.
        student: Where the student is: a dotted path in the LightningModule, a function of it, or None to find the
            only peft model in it.
        tokenizer: The student's; None takes the LightningModule's ``tokenizer`` or ``processing_class``.
        free_every_n_steps: Optimizer steps between looks at the training's own rollouts (free mode: predicted gain at
            the price of the gradients, no continuations). They are taken from the LightningModule's
            ``last_rollouts``, a list of ``(row, response token ids)`` that it sets in each training step, as
            :class:`~odp_callbacks.OnPolicyDistillation` does. None: no such looks.
        records: Folder to keep each probe's records in, as ``step-<step>``; see :mod:`odp_callbacks.storage`.
        at_start: Also probe before the first step.
        on_validation: Also probe at the end of every validation, and in ``trainer.validate``.
        confidence: Level of the intervals.
        seed: Of the callback's own random stream.
        strict: Let a failing probe fail the run.
        gate: Something that learns from each probe: its ``observe(report)`` is called after every one that succeeds,
            what its ``scalars()`` give, if it has them, is logged, and its state, if it has ``state_dict`` and
            ``load_state_dict``, is kept in checkpoints. None: the
            LightningModule's ``gate``, if it has one with ``observe``.
        optimizer_geometry: Also measure in the geometry of Adam's next step, its second moments as the metric on the
            parameters (:func:`~odp_callbacks.engine.gradients.optimizer_geometry.adam_preconditioner`): figures ``odp/adam/…`` beside the Euclidean
            ones, from the same continuations. From the first optimizer step on.
        config: How a probe measures.
        **options: Fields of :class:`~odp_callbacks.ProbeConfig`, in place of ``config`` or on top of it.

    Raises:
        ValueError: Before training, if an argument is of no use: it says which, what was given and what would work.

    Examples:
        >>> from odp_callbacks import GradientAlignmentCallback, Teacher
        >>> def reward(prompts, completions, answer):
        ...     return [float(c.strip() == a) for c, a in zip(completions, answer)]
        >>> callback = GradientAlignmentCallback(
        ...     teachers={"answer": Teacher("The answer is {answer}. {prompt}")},
        ...     prompts=[{"prompt": "1 + 1 =", "answer": "2"}],
        ...     reward=reward,
        ...     every_n_steps=50,
        ...     max_new_tokens=32,
        ... )
        >>> callback.config.max_new_tokens
        32
    """

    def __init__(
        self,
        teachers: object,
        prompts: Sequence[Row] | None,
        reward: RewardFunction,
        *,
        every_n_steps: int = 100,
        questions_per_probe: int = 8,
        max_overhead: float | None = 0.1,
        student: StudentLocator | None = None,
        tokenizer: Any = None,
        free_every_n_steps: int | None = None,
        records: str | PathLike[str] | None = None,
        at_start: bool = False,
        on_validation: bool = False,
        confidence: float = 0.95,
        seed: int = 0,
        strict: bool = False,
        gate: object | None = None,
        optimizer_geometry: bool = False,
        config: ProbeConfig | None = None,
        **options: Any,
    ) -> None:
        self.monitor = Monitor(
            teachers,
            prompts,
            reward,
            every_n_steps=every_n_steps,
            questions_per_probe=questions_per_probe,
            max_overhead=max_overhead,
            free_every_n_steps=free_every_n_steps,
            records=records,
            at_start=at_start,
            on_validation=on_validation,
            confidence=confidence,
            seed=seed,
            strict=strict,
            gate=gate,
            optimizer_geometry=optimizer_geometry,
            config=config,
            **options,
        )
        self.student = student
        self.tokenizer = tokenizer

    @property
    def config(self) -> ProbeConfig:
        """How a probe measures."""
        return self.monitor.config

    @property
    def teachers(self) -> Mapping[str, Any]:
        """The teachers, by name."""
        return self.monitor.teachers

    @property
    def last_report(self) -> ProbeReport | None:
        """The whole of the last probe; None before any, or if it failed."""
        return self.monitor.last_report

    def should_probe(self, step: int, last_step: int) -> bool:
        """Whether to probe after optimizer step ``step``, the previous one seen being ``last_step``; to override.

        Several optimizers can take more than one step in a batch: a multiple that was jumped over counts.
        """
        return self.monitor.should_probe(step, last_step)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            teachers=tuple(self.teachers), every=self.monitor.every_n_steps, seed=self.monitor.seed
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if sharded := {kind.__name__ for kind in type(trainer.strategy).__mro__} & SHARDED:
            raise ValueError(
                f"`strategy` is {sharded.pop()}, under which no process has the whole student to measure; use DDP, or "
                "one device."
            )
        # A student that `configure_model` builds is not there yet; `on_fit_start` comes after it.
        if self._find(pl_module) or type(pl_module).configure_model.__module__ in HOOKS:
            self._prepare(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor.probe is None:
            self._prepare(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor.start(self.host(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        self.monitor.advance(self.host(trainer), batch, lambda: module.last_rollouts, self.should_probe)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.monitor.validated(self.host(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict)

    def host(self, trainer: Trainer) -> Host:
        """The trainer as the monitor knows it."""
        return Host(
            step=trainer.global_step,
            first=trainer.is_global_zero,
            processes=processes(),
            context=trainer.precision_plugin.forward_context,
            progress=lambda last: ProbeProgress(
                display_beside(trainer.progress_bar_callback) if trainer.is_global_zero else None, rank_zero_info, last
            ),
            log=lambda metrics, report: self._log(trainer, metrics, report),
            warn=rank_zero_warn,
            note=rank_zero_info,
            optimizers=trainer.optimizers,
        )

    def _prepare(self, pl_module: LightningModule) -> None:
        """Find the student and its tokenizer, and check everything that can be checked before training."""
        students = self._find(pl_module)
        if len(students) != 1:
            raise ValueError(
                f"`student` must be one peft model, but {len(students)} were found in {type(pl_module).__name__}; "
                "wrap the student with peft.get_peft_model, or give its dotted path or a function as `student`."
            )
        tokenizer = self.tokenizer
        for name in ("tokenizer", "processing_class"):
            tokenizer = getattr(pl_module, name, None) if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`tokenizer` was not given, and {type(pl_module).__name__} has neither `tokenizer` nor "
                "`processing_class`; give the student's tokenizer."
            )
        if self.monitor.free_every_n_steps is not None and not hasattr(pl_module, "last_rollouts"):
            raise ValueError(
                f"`free_every_n_steps` was given, but {type(pl_module).__name__} has no `last_rollouts`; set it "
                "in each training step to a list of (row, response token ids), or give None."
            )
        gate = getattr(pl_module, "gate", None)
        taught = getattr(pl_module, "teachers", ()) if isinstance(pl_module, OnPolicyDistillation) else ()
        self.monitor.prepare(students[0], tokenizer, gate if hasattr(gate, "observe") else None, taught=tuple(taught))

    def _find(self, pl_module: LightningModule) -> list[nn.Module]:
        if callable(self.student):
            return [self.student(pl_module)]
        if isinstance(self.student, str):
            try:
                return [pl_module.get_submodule(self.student)]
            except AttributeError:
                raise ValueError(
                    f"`student` is {self.student!r}, but {type(pl_module).__name__} has no such submodule; "
                    f"it has {sorted(name for name, _ in pl_module.named_children())}."
                ) from None
        return [module for module in pl_module.modules() if isinstance(module, PeftModel)]

    def _log(self, trainer: Trainer, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """To every logger at the optimizer's step, and where other callbacks look."""
        step = trainer.global_step
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            with self.monitor.trying(self.host(trainer), f"{type(logger).__name__} took no figures"):
                logger.log_metrics(metrics, step=step)
            if report is not None and trainer.is_global_zero:
                try:
                    log_pictures(logger, report, step, self.last_report)
                except Exception as error:
                    self.monitor.say(self.host(trainer), f"no pictures of a probe: {type(error).__name__}: {error}")
