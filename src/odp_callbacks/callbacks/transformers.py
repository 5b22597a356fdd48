"""The callback for Hugging Face's `Trainer`, and for TRL's trainers, which derive from it."""

import base64
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from typing_extensions import Unpack

from odp_callbacks.callbacks.logged_scalars import LoggedScalars
from odp_callbacks.callbacks.monitor import Monitor
from odp_callbacks.callbacks.names import refuse_equal_names, root_of
from odp_callbacks.callbacks.processes import current_processes
from odp_callbacks.callbacks.progress import Bar, ProbeProgress
from odp_callbacks.callbacks.schedule import CallbackOptions, resolve_options
from odp_callbacks.callbacks.student_location import StudentLocator, locate_students
from odp_callbacks.callbacks.student_replica import ReplicaLoader
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.callbacks.training_prompts import rows_of_dataset, training_template
from odp_callbacks.callbacks.trl_rollouts import TrainerRollouts, sampling_options
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.engines.choice import TRAINER
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.question_encoding import template_of
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.tensorboard import TensorBoardReports

STATE_KEY = "odp_callbacks"
"""Where a callback without a name keeps its state in a checkpoint's ``trainer_state.json``."""

PRINTING_CALLBACKS = (ProgressCallback, PrinterCallback)
"""Callbacks that print everything that is logged."""
HEADLINES = ("update_gain", "training/update_gain")
"""Figures that are printed."""

console_log = logging.getLogger(__name__)


class GradientAlignmentTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Measure, while a Hugging Face trainer trains a LoRA student, where each teacher's gradient helps it.

    This is :class:`~odp_callbacks.GradientAlignmentCallback` for `transformers` and TRL. Metrics go to the trainer's
    own trackers (``report_to``) and to its ``log_history``, at the optimizer's step; TensorBoard also gets histograms
    and pictures. The callback does not change the training, and a failing probe does not stop it.

    Args:
        trainer: The trainer, as TRL's own callbacks take it.
        teachers: A mapping from name to teacher (:class:`~odp_callbacks.Teacher`, a model, ``"base"``, a context
            template), a list of teachers, or one teacher.
        prompts: The questions: rows with a ``prompt`` and the columns that the reward and the teachers' contexts need;
            None for the trainer's ``train_dataset``, if that has such rows.
        reward: The verifier, a TRL reward function ``reward(prompts, completions, **columns) -> list[float]`` with
            values in [0, 1].
        student: Where the student is, a peft model with LoRA: a dotted path in ``trainer.model``, a function of
            ``trainer.model``, or None for ``trainer.model`` itself.
        tokenizer: The student's tokenizer; None takes the trainer's ``processing_class``.
        gate: A gate that learns from the probes (:mod:`odp_callbacks.gates.protocols`): its ``observe(report)`` is
            called after every probe that succeeds, its ``scalars()`` are logged, and its state is kept in checkpoints.
            None: the trainer's ``gate``, if :func:`~odp_callbacks.gate_trainer` gave it one that learns.
        student_replica: A function without arguments that loads the student unsharded, for a training that shards it
            (FSDP2, ZeRO-3): the same base, in 4 bits for example, with LoRA of the same shapes. None (the default): the
            base is gathered from the shards once, and kept in each process's memory of the CPU.
        config: How a probe measures.
        **options: Fields of :class:`~odp_callbacks.callbacks.schedule.ProbeSchedule`, listed here, and fields of
            :class:`~odp_callbacks.ProbeConfig`, which replace those of ``config``.
        name: Tells this callback from the others in the same trainer, which need names of their own: its figures are
            logged as ``odp-<name>/…``, and its records are in ``<records>/<name>``. None (the default): ``odp/…`` and
            ``<records>``.
        every_n_steps: Number of optimizer steps between probes (100).
        questions_per_probe: Number of questions in a probe, taken from a shuffled order (8).
        max_overhead: The largest share of the training's wall-clock time that probes may take, in (0, 1) (0.1). A probe
            that would exceed it is limited to the time that is left, or skipped if that is less than half of what it
            takes. The first probe is limited to a quarter of what the planned length of the run allows. None: every
            probe runs in full.
        update_every_n_steps: Number of optimizer steps between measurements on the rollouts that the training itself
            samples: update gain at the cost of the gradients, logged as ``odp/training/…``. It needs one of TRL's
            trainers that sample from the student (:mod:`odp_callbacks.callbacks.trl_rollouts`). A reward that the
            training gave counts in place of ``reward``, whatever its range; a rollout is correct from
            ``success_threshold`` on. None (the default): no such measurements.
        step_gain_every_n_steps: Number of optimizer steps between the figures ``odp/step/…``: what the steps that the
            training took were expected to gain, if ``update_every_n_steps`` shows its rollouts, and their cosine with
            each teacher's last measured update. A figure takes one forward pass over the rollouts, two where these have
            no ``log_probs``. Where ``max_overhead`` leaves no time, the next one is of more steps. None: no such
            figures (1).
        pooled_decay: Share of the earlier probes' weight that is kept at each probe in the figures ``odp/pooled/…``, in
            (0, 1] (0.9). They pool update gain over the probes, with intervals that are valid at all probes together.
            The student changes, so earlier probes are forgotten; 1 forgets nothing.
        records: Folder in which each probe's records are saved as ``step-<step>``; see :mod:`odp_callbacks.storage`.
            None (the default): records are not saved.
        at_start: Also probe before the first step (False).
        on_validation: Also probe at the end of every evaluation (False).
        log: Which scalars the loggers get: "main" for those that answer what users ask, at most 40 of three teachers,
            "all" for several hundred, or a list of figures to log besides the main ones, such as ``["alignment"]``
            ("main").
        confidence: Level of the intervals, in (0, 1) (0.95).
        seed: Seed of the callback's own random stream (0).
        strict: Raise the exception of a failing probe, instead of warning once (False).
        optimizer_geometry: Also measure in the geometry of Adam's next step, with its second moments as the
            preconditioner: metrics ``odp/adam/…`` from the same continuations, from the first optimizer step on
            (False).

    Raises:
        ValueError: Before training, if an argument is out of range or does not fit the others.
        TypeError: If an argument is unknown or of the wrong type. For an unknown one, the message names the closest
            valid argument and lists all of them.

    Examples:
        ::

            trainer = DistillationTrainer(model=student, teacher_model=teacher, ...)
            trainer.add_callback(GradientAlignmentTrainerCallback(trainer, teachers, rows, reward, every_n_steps=50))
            trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        teachers: object,
        prompts: Sequence[Row] | None,
        reward: RewardFunction,
        *,
        student: StudentLocator | None = None,
        tokenizer: Any = None,
        gate: object | None = None,
        student_replica: ReplicaLoader | None = None,
        config: ProbeConfig | None = None,
        **options: Unpack[CallbackOptions],
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainer` must be a transformers.Trainer, or one of TRL's, but got {trainer!r}.")
        arguments = (
            "trainer",
            "teachers",
            "prompts",
            "reward",
            "student",
            "tokenizer",
            "gate",
            "student_replica",
            "config",
        )
        schedule, config = resolve_options(config, options, other_arguments=arguments)
        if config.engine == TRAINER:
            config = replace(config, engine=trainer)
        if (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2) or trainer.is_fsdp_xla_enabled:
            raise ValueError(
                "`trainer` shards the student by FSDP 1 or XLA, whose shards this callback cannot gather; use FSDP 2 "
                '(`fsdp_config={"version": 2}`), DeepSpeed, DDP, or one device.'
            )
        prompts = rows_of_dataset(trainer.train_dataset) if prompts is None else prompts
        self.monitor = Monitor(
            teachers, prompts, reward, schedule=schedule, config=config, gate=gate, student_replica=student_replica
        )
        self.tensorboard = TensorBoardReports(schedule.confidence, root=root_of(schedule.name))
        self.trainer = trainer
        self.student = student
        self.tokenizer = getattr(trainer, "processing_class", None) if tokenizer is None else tokenizer
        if self.tokenizer is None:
            raise ValueError("`trainer` has no `processing_class`; give the student's tokenizer as `tokenizer`.")
        self.logged_scalars = LoggedScalars(self.monitor)
        self.rollouts: TrainerRollouts | None = None
        if schedule.update_every_n_steps is not None:
            self.rollouts = TrainerRollouts(trainer, self.monitor.failures, self.trainer_context)
        self._prepare()
        update_probe = self.monitor.training_updates.probe
        if self.rollouts is not None and update_probe is not None:
            self.rollouts.check_rows(update_probe)

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
        """The report of the last probe that succeeded; None before any. A failed probe does not replace it."""
        return self.monitor.last_report

    @property
    def state_key(self) -> str:
        """Where the state is kept in a checkpoint's ``trainer_state.json``."""
        name = self.monitor.schedule.name
        return STATE_KEY if name is None else f"{STATE_KEY}-{name}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore a checkpoint's state, and probe if that is due at the start."""
        self._prepare()  # a gate may have been added to the trainer in the meantime
        if saved_state := (state.stateful_callbacks or {}).get(self.state_key):
            self.monitor.load_state_dict(read_state(saved_state))
        self.monitor.on_train_start(self.trainer_context())
        if self.rollouts is not None:
            template = template_of(self.config, training_template(self.trainer))
            self.rollouts.start(self.monitor.prompts, self.tokenizer, template)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe, if that is due."""
        self.monitor.on_batch_end(self.trainer_context(), training_rollouts=self.rollouts)
        self._store_state(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the state for a checkpoint that may follow."""
        self._store_state(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe after an evaluation, if ``on_validation``."""
        self.monitor.on_validation_end(self.trainer_context())
        self._store_state(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, and leave the trainer as it was."""
        self.monitor.on_train_end(self.trainer_context())
        self.tensorboard.close()
        if self.rollouts is not None:
            self.rollouts.stop()

    def trainer_context(self) -> TrainerContext:
        """Return the trainer as the monitor sees it."""
        trainer = self.trainer
        is_global_zero = trainer.is_world_process_zero()
        optimizer: Any = trainer.optimizer
        return TrainerContext(
            step=trainer.state.global_step,
            is_global_zero=is_global_zero,
            processes=current_processes(),
            precision_context=trainer.accelerator.autocast,
            progress=lambda last_seconds: ProbeProgress(
                Bar() if is_global_zero and not trainer.args.disable_tqdm else None,
                console_log.info if is_global_zero else None,
                last_seconds,
            ),
            log=self._log,
            warn=lambda message: warnings.warn(message, stacklevel=2) if is_global_zero else None,
            inform=lambda message: console_log.info(message) if is_global_zero else None,
            optimizers=[] if optimizer is None else [getattr(optimizer, "optimizer", optimizer)],
            is_training=trainer.is_in_train,
            trainer_state=trainer.state,
            prepare=self._prepare,
            planned_steps=lambda: trainer.state.max_steps if trainer.state.max_steps > 0 else None,
        )

    def _prepare(self) -> None:
        """Find the student, and check everything that can be checked before training."""
        refuse_equal_names(
            self.monitor.schedule.name,
            [
                other.monitor.schedule.name
                for other in self.trainer.callback_handler.callbacks
                if isinstance(other, GradientAlignmentTrainerCallback) and other is not self
            ],
        )
        model: nn.Module = self.trainer.model
        student = model if self.student is None else locate_students(model, self.student)[0]
        gate = getattr(self.trainer, "gate", None)
        gate_teachers = getattr(self.trainer, "gate_teachers", ())
        sampling = None if self.rollouts is None else sampling_options(self.trainer)
        template = training_template(self.trainer)
        self.monitor.prepare(student, self.tokenizer, gate, gate_teachers, template, sampling)

    def _store_state(self, state: TrainerState, control: TrainerControl) -> None:
        """Put the monitor's state where a checkpoint that is about to be written finds it."""
        if not control.should_save:
            return
        saved_states = dict(state.stateful_callbacks or {})
        saved_states.pop(self.state_key, None)  # that of an earlier step
        with self.monitor.failures.guarded(self.trainer_context(), "a checkpoint is saved without the probes' state"):
            monitor_state = self.monitor.state_dict()
            with self.monitor.failures.guarded(self.trainer_context(), "the state of `gate` cannot be saved"):
                gate_state = monitor_state.pop("gate", None)
                state_from_text(state_to_text({"gate": gate_state}))  # what cannot be read would cost the whole state
                monitor_state |= {} if gate_state is None else {"gate": gate_state}
            saved_states[self.state_key] = {"args": {}, "attributes": {"state": state_to_text(monitor_state)}}
        state.stateful_callbacks = saved_states

    def _log(self, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """Log to the trainer's trackers without changing what the trainer itself will log.

        A trainer's own ``log`` method adds the averages since its last call and resets them, and the trainer takes any
        call for the one that it had planned at this step. Neither must happen here.
        """
        trainer = self.trainer
        should_log, callbacks = trainer.control.should_log, trainer.callback_handler.callbacks
        printing = [callback for callback in callbacks if isinstance(callback, PRINTING_CALLBACKS)]
        tensorboards = [callback for callback in callbacks if isinstance(callback, TensorBoardCallback)]
        scalars = self.logged_scalars.selected(metrics)
        if report is not None:
            self.logged_scalars.explain(self.trainer_context(), metrics, tensorboard=bool(tensorboards))
        numbers = {metric: value for metric, value in scalars.items() if isfinite(value)}
        root = self.logged_scalars.root
        beginnings = tuple(f"{root}/{figure}/" for figure in HEADLINES)
        headlines = {metric: value for metric, value in numbers.items() if metric.startswith(beginnings)}
        try:
            apart = [*printing, *tensorboards]
            trainer.callback_handler.callbacks = [callback for callback in callbacks if callback not in apart]
            if numbers:
                Trainer.log(trainer, dict(numbers))
            if numbers and _of_every_step(metrics) and trainer.state.global_step % max(1, trainer.state.logging_steps):
                trainer.state.log_history.pop()  # it is saved in checkpoints, and would grow with every step
            for callback in tensorboards:
                self._write_scalars(callback, self.logged_scalars.for_tensorboard(metrics))
            for callback in printing if headlines else ():
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=headlines)
        finally:
            trainer.callback_handler.callbacks = callbacks
            trainer.control.should_log = should_log
        if report is not None and trainer.is_world_process_zero():
            self._write_report(report)

    def _write_scalars(self, callback: TensorBoardCallback, scalars: dict[str, float]) -> None:
        """Write scalars to TensorBoard, where each teacher has a run of its own."""
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        if callback.tb_writer is None:
            callback.on_log(trainer.args, trainer.state, trainer.control, logs={})  # opens the writer
        if callback.tb_writer is None:  # tensorboard is not installed
            return
        step = trainer.state.global_step
        of_trainer = self.tensorboard.write_scalars(
            callback.tb_writer, scalars, list(self.teachers), step, is_training=trainer.is_in_train
        )
        for tag, value in of_trainer.items():
            callback.tb_writer.add_scalar(tag, value, step)
        callback.tb_writer.flush()

    def _write_report(self, report: ProbeReport) -> None:
        """Write the pictures and texts of a report to TensorBoard."""
        trainer = self.trainer
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                try:
                    step = trainer.state.global_step
                    self.tensorboard.write(callback.tb_writer, report, step, is_training=trainer.is_in_train)
                except Exception as error:  # even if `strict`: the figures themselves were logged
                    context = self.trainer_context()
                    self.monitor.failures.warn_of_error(context, "failed to log the pictures of a probe", error)


def _of_every_step(metrics: Mapping[str, float]) -> bool:
    """Whether these are the figures of a training step alone, and not those of a probe."""
    return all(metric.startswith("odp/step/") for metric in metrics)


def state_to_text(state: dict[str, Any]) -> str:
    """Return a state with tensors as text, which JSON can hold.

    Examples:
        >>> state_from_text(state_to_text({"order": [2, 1], "stream": torch.arange(3)}))
        {'order': [2, 1], 'stream': tensor([0, 1, 2])}
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def read_state(saved_state: Any) -> dict[str, Any] | None:
    """Return the monitor's state from an entry of ``trainer_state.json``; None if it cannot be read."""
    try:
        return state_from_text(saved_state["attributes"]["state"])
    except Exception:  # anything can stand in a file
        return None


def state_from_text(text: str) -> dict[str, Any]:
    """Return the state that :func:`state_to_text` encoded."""
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state
