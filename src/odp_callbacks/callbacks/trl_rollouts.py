"""The rollouts that TRL's trainers sample for their own training: which trainers show them, and where."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.callbacks.training_questions import TrainingQuestions
from odp_callbacks.callbacks.trl_recorders import (
    BufferRecorder,
    CompletionRecorder,
    GeneratedTokensRecorder,
    PairRecorder,
    RegressionRecorder,
    RolloutRecorder,
)
from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import QuestionLengthError, Row
from odp_callbacks.engine.training_rollouts import TrainingRollout

TRUNCATED_SAMPLING = (
    "`update_every_n_steps` takes the training's rollouts for samples of the student, but the training samples with "
    "{changes}; the update gain of its rollouts is biased where that matters."
)

RECORDERS: dict[str, Callable[[Any], RolloutRecorder]] = {
    "DistillationTrainer": lambda trainer: CompletionRecorder(trainer, "_generate_and_score_completions"),
    "GRPOTrainer": lambda trainer: CompletionRecorder(trainer, "_generate_and_score_completions", scores=True),
    "RLOOTrainer": lambda trainer: CompletionRecorder(trainer, "_generate_and_score_completions", scores=True),
    "SDPOTrainer": lambda trainer: CompletionRecorder(trainer, "_prepare_training_batch", scores=True),
    "SDFTTrainer": lambda trainer: CompletionRecorder(trainer, "_prepare_training_batch"),
    "GKDTrainer": GeneratedTokensRecorder,
    "GOLDTrainer": lambda trainer: BufferRecorder(trainer, "_buffered_on_policy"),
    "IWOPDTrainer": lambda trainer: BufferRecorder(trainer, "_buffered_on_policy_flags"),
    "OnlineDPOTrainer": PairRecorder,
    "A2POTrainer": RegressionRecorder,
}
"""For each trainer of TRL that samples from the student, and for its subclasses, what reads its rollouts."""

UNREADABLE: dict[str, str] = {
    "AsyncGRPOTrainer": "samples in another process, from a student of earlier steps",
    "AsyncDistillationTrainer": "samples in another process, from a student of earlier steps",
}
"""Trainers that sample, and why their rollouts cannot be measured."""


def rollout_recorder(trainer: Any) -> RolloutRecorder:
    """Return what reads the rollouts that a trainer samples for its own training.

    Args:
        trainer: One of TRL's trainers, or of a class derived from one.

    Raises:
        ValueError: If the trainer does not sample from the student, or its rollouts cannot be read.
    """
    refusal = "`update_every_n_steps` needs the training's own rollouts, but"
    name = type(trainer).__name__
    for kind in type(trainer).__mro__:
        if not kind.__module__.startswith("trl."):
            continue
        if kind.__name__ in UNREADABLE:
            raise ValueError(f"{refusal} {name} {UNREADABLE[kind.__name__]}; leave it out.")
        if kind.__name__ in RECORDERS:
            recorder = RECORDERS[kind.__name__](trainer)
            if obstacle := recorder.obstacle():
                raise ValueError(f"{refusal} {obstacle}")
            return recorder
    raise ValueError(
        f"{refusal} {name} does not sample from the student; leave it out, or train with one of {sorted(RECORDERS)}."
    )


def sampling_options(trainer: Any) -> dict[str, Any]:
    """The options of a probe that must be those of the training's sampling: temperature and length limit.

    Args:
        trainer: One of TRL's trainers.
    """
    args = trainer.args
    limit = getattr(args, "max_completion_length", None) or getattr(args, "max_new_tokens", None)
    options: dict[str, Any] = {"temperature": float(args.temperature)}
    return options if limit is None else {**options, "max_new_tokens": int(limit)}


def truncated_sampling(trainer: Any) -> str:
    """Name the options by which a trainer samples from another distribution than the student's; empty if none does.

    Args:
        trainer: One of TRL's trainers.
    """
    args = trainer.args
    changes = {
        "top_p": (getattr(args, "top_p", None), 1.0),
        "top_k": (getattr(args, "top_k", None), 0),
        "min_p": (getattr(args, "min_p", None), 0.0),
        "repetition_penalty": (getattr(args, "repetition_penalty", None), 1.0),
    }
    return ", ".join(
        f"{name}={value!r}" for name, (value, neutral) in changes.items() if value is not None and value != neutral
    )


class TrainerRollouts:
    """The rollouts that a trainer samples for its own training; a call returns those of the last optimizer step.

    Between :meth:`start` and :meth:`stop` it observes the trainer's own methods. It computes nothing there, draws no
    random number and changes no argument or result.

    Args:
        trainer: One of TRL's trainers.
        failures: Decides what happens if the trainer's data cannot be read.
        context: Returns the trainer as the monitor sees it.

    Raises:
        ValueError: If the trainer does not sample from the student, or its rollouts cannot be read.
    """

    def __init__(self, trainer: Any, failures: FailureHandler, context: Callable[[], TrainerContext]) -> None:
        self.trainer, self.failures, self.context = trainer, failures, context
        self.recorder = rollout_recorder(trainer)
        self._questions: TrainingQuestions | None = None
        self._first_step = 0

    def __call__(self) -> list[TrainingRollout]:
        """The rollouts that were sampled from the student as it was before the last optimizer step; perhaps none."""
        return [] if self._questions is None else self.recorder.rollouts(self._questions)

    def check_rows(self, probe: Probe) -> None:
        """Raise an error before training if a probe cannot use the rows that the training reads.

        Args:
            probe: What measures them.

        Raises:
            ValueError: If the first row of the training's data lacks something that a teacher's context needs.
            RewardSignatureError: If it lacks something that the reward function needs.
        """
        dataset = self.trainer.train_dataset
        if not self.recorder.knows_rows or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            return
        if len(dataset) == 0 or not isinstance(dataset[0], Mapping):
            return
        try:
            probe.encode([dataset[0]])
        except QuestionLengthError:  # other rows may be shorter
            return
        except ValueError as error:
            raise ValueError(
                f"`update_every_n_steps` measures the rows of the trainer's `train_dataset`, and {error}"
            ) from error

    def start(self, rows: Sequence[Row] | None, tokenizer: Any, template: ChatTemplate) -> None:
        """Begin to observe the trainer.

        Args:
            rows: The rows that a prompt is searched in, where the trainer shows its tokens only.
            tokenizer: The student's tokenizer, or a processor that holds it.
            template: How messages are rendered.
        """
        self._first_step = self.trainer.state.global_step
        self._questions = TrainingQuestions(rows, tokenizer, template, self._warn_once)
        self.recorder.start(
            lambda: self.failures.guarded(
                self.context(), "the training's rollouts could not be read; training continues without them"
            )
        )
        if changes := truncated_sampling(self.trainer):
            self._warn_once(TRUNCATED_SAMPLING.format(changes=changes))

    def stop(self) -> None:
        """Leave the trainer as it was, and warn if it never sampled."""
        has_trained = self.trainer.state.global_step > self._first_step
        if has_trained and not self.recorder.sampled and not self.recorder.unread:
            self._warn_once(
                f"`update_every_n_steps` measured nothing: {type(self.trainer).__name__} sampled no response from the "
                "student in this run."
            )
        self.recorder.stop()

    def _warn_once(self, message: str) -> None:
        self.failures.warn_once(self.context(), message)
