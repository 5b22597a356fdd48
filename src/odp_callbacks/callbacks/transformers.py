"""The same probes in a run of Hugging Face's `Trainer`, and of TRL's."""

import base64
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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

from odp_callbacks.callbacks.monitor import Host, Monitor
from odp_callbacks.callbacks.processes import processes
from odp_callbacks.callbacks.progress import Bar, ProbeProgress
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.tensorboard import write_tensorboard

KEY = "odp_callbacks"
"""Where the monitor's state lies in a checkpoint's ``trainer_state.json``."""

PRINTING = (ProgressCallback, PrinterCallback)
"""They write on the screen whatever is logged, and a probe has some two hundred figures."""
HEADLINES = ("odp/predicted_gain/", "odp/free/predicted_gain/")

log = logging.getLogger(__name__)


class GradientAlignmentTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Measure, while a Hugging Face trainer trains a LoRA student, where each teacher's gradient helps it.

    What :class:`~odp_callbacks.GradientAlignmentCallback` is for Lightning. Figures go to the trainer's own trackers
    (``report_to``) and to its ``log_history``, at the optimizer's step; TensorBoard also gets histograms and pictures.
    The training itself does not change by it, and a failing probe does not stop it.

    Args:
        trainer: The trainer, as TRL's own callbacks take it: its model is the student, a peft model with LoRA; its
            ``processing_class`` the tokenizer.
        teachers: As in :class:`~odp_callbacks.GradientAlignmentCallback`.
        prompts: Rows with a ``prompt`` and whatever the reward and the teachers' contexts need; None for the trainer's
            ``train_dataset``, if that has such rows.
        reward: As in TRL: of ``prompts``, ``completions`` and the columns, a list of numbers in [0, 1].
        **options: The other arguments of :class:`~odp_callbacks.GradientAlignmentCallback`, but ``student``,
            ``tokenizer`` and ``free_every_n_steps``.

    Raises:
        ValueError: If something that is given cannot work, before training.
        TypeError: If an argument is of the wrong kind.

    Examples:
        ::

            trainer = DistillationTrainer(model=student, teacher_model=teacher, ...)
            trainer.add_callback(GradientAlignmentTrainerCallback(trainer, teachers, rows, reward, every_n_steps=50))
            trainer.train()
    """

    def __init__(
        self, trainer: Trainer, teachers: object, prompts: Sequence[Row] | None, reward: RewardFunction, **options: Any
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainer` must be a transformers.Trainer, or one of TRL's, but got {trainer!r}.")
        if options.get("free_every_n_steps") is not None:
            raise ValueError("`free_every_n_steps` needs the training's own rollouts, which a `Trainer` does not show.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "`trainer` shards the student over processes (FSDP or DeepSpeed), so that none has the whole of it to "
                "measure; train with DDP or on one device."
            )
        prompts = self._rows(trainer) if prompts is None else prompts
        self.monitor = Monitor(teachers, prompts, reward, **options)
        self.trainer = trainer
        if getattr(trainer, "processing_class", None) is None:
            raise ValueError("`trainer` has no `processing_class`; give it the student's tokenizer.")
        self._prepare()

    @property
    def teachers(self) -> Mapping[str, Any]:
        """The teachers, by name."""
        return self.monitor.teachers

    @property
    def last_report(self) -> ProbeReport | None:
        """The whole of the last probe; None before any, or if it failed."""
        return self.monitor.last_report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up a checkpoint's state, and probe if asked to."""
        self._prepare()  # a gate may have been given to the trainer since
        if kept := (state.stateful_callbacks or {}).get(KEY):
            self.monitor.load_state_dict(from_text(kept["attributes"]["state"]))
        self.monitor.start(self.host())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe, if it is time to."""
        self.monitor.advance(self.host())
        self._keep(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint may follow."""
        self._keep(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe, if asked to."""
        self.monitor.validated(self.host())
        self._keep(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.monitor.stop()

    def host(self) -> Host:
        """The trainer as the monitor knows it."""
        trainer = self.trainer
        first = trainer.is_world_process_zero()
        optimizer: Any = trainer.optimizer
        return Host(
            step=trainer.state.global_step,
            first=first,
            processes=processes(),
            context=trainer.accelerator.autocast,
            progress=lambda last: ProbeProgress(
                Bar() if first and not trainer.args.disable_tqdm else None, log.info if first else None, last
            ),
            log=self._log,
            warn=lambda message: warnings.warn(message, stacklevel=2) if first else None,
            note=lambda message: log.info(message) if first else None,
            optimizers=[] if optimizer is None else [getattr(optimizer, "optimizer", optimizer)],
        )

    def _prepare(self) -> None:
        gate = getattr(self.trainer, "gate", None)
        self.monitor.prepare(
            self.trainer.model,
            self.trainer.processing_class,
            gate if hasattr(gate, "observe") else None,
            taught=getattr(self.trainer, "gate_teachers", ()),
        )

    def _keep(self, state: TrainerState, control: TrainerControl) -> None:
        """Put the monitor's state where a checkpoint that is about to be written finds it."""
        if control.should_save:
            found = {"args": {}, "attributes": {"state": to_text(self.monitor.state_dict())}}
            state.stateful_callbacks = {**(state.stateful_callbacks or {}), KEY: found}

    def _log(self, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """To the trainer's trackers, past its own averages.

        A trainer's own ``log`` adds what it averaged since the last time and starts anew, and "logged" is the answer to
        its own plan to log at this step: both are left as they are.
        """
        trainer = self.trainer
        planned, callbacks = trainer.control.should_log, trainer.callback_handler.callbacks
        printing = [callback for callback in callbacks if isinstance(callback, PRINTING)]
        headline = {name: value for name, value in metrics.items() if name.startswith(HEADLINES)}
        try:
            trainer.callback_handler.callbacks = [callback for callback in callbacks if callback not in printing]
            Trainer.log(trainer, dict(metrics))
            for callback in printing:
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(headline))
        finally:
            trainer.callback_handler.callbacks = callbacks
            trainer.control.should_log = planned
        if report is None or not trainer.is_world_process_zero():
            return
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                try:
                    step = trainer.state.global_step
                    write_tensorboard(callback.tb_writer, report, step, self.last_report, prefix="train/")
                except Exception as error:
                    self.monitor.say(self.host(), f"no pictures of a probe: {type(error).__name__}: {error}")

    @staticmethod
    def _rows(trainer: Trainer) -> Sequence[Row]:
        rows: Any = trainer.train_dataset
        if "prompt" not in (getattr(rows, "column_names", None) or ()) or not hasattr(rows, "__len__"):
            raise ValueError(
                "`prompts` was not given, and the trainer's `train_dataset` has no column 'prompt' to take in its "
                "place; give rows such as [{'prompt': ..., 'answer': ...}, ...]."
            )
        found: Sequence[Row] = rows
        return found


def to_text(state: dict[str, Any]) -> str:
    """A state with tensors, as JSON can hold it.

    Examples:
        >>> from_text(to_text({"order": [2, 1], "stream": torch.arange(3)}))
        {'order': [2, 1], 'stream': tensor([0, 1, 2])}
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> dict[str, Any]:
    """The state that :func:`to_text` wrote."""
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state
