"""Recorders of the rollouts in TRL's trainers: each observes the method in which a family of trainers samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from odp_callbacks.callbacks.method_hooks import MethodHook
from odp_callbacks.callbacks.training_questions import TrainingQuestions
from odp_callbacks.callbacks.trl_completions import (
    RecordedCompletion,
    completions_of_labels,
    unpadded,
    weighted_rewards,
)
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.training_rollouts import TrainingRollout

Guard = Callable[[], AbstractContextManager[None]]


class RolloutRecorder:
    """Keeps the completions that a trainer sampled at the step it is at.

    Args:
        trainer: The trainer.

    Attributes:
        step: Number of optimizer steps that had been taken when the completions were sampled; -1 before any.
        completions: The completions.
        sampled: How many completions there were since it began to observe.
        unread: How often the trainer's data could not be read.
        knows_rows: Whether the trainer shows the rows of the dataset, and not only their tokens.
    """

    knows_rows = True
    methods: Mapping[str, str] = {}
    """For each method of the trainer that is observed, the method of this class that observes it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.step, self.sampled, self.unread = -1, 0, 0
        self.completions: list[RecordedCompletion] = []
        self._hooks: list[MethodHook] = []

    def obstacle(self) -> str:
        """Say what in the trainer's options keeps its rollouts from being read; empty if nothing does."""
        name = type(self.trainer).__name__
        if missing := [method for method in self.methods if not hasattr(self.trainer, method)]:
            return f"{name} of this version of TRL has no `{missing[0]}`, where they are read; use trl>=1.16."
        if getattr(self.trainer, "tools", None) or getattr(self.trainer, "environment_factories", None):
            return f"{name} mixes them with what tools return, which the student did not sample; leave it out."
        if getattr(self.trainer, "rollout_func", None) is not None:
            return (
                f"{name} gets them from a `rollout_func`, which may add what the student did not sample; leave it out."
            )
        if getattr(self.trainer, "use_vllm", False) and getattr(self.trainer, "vllm_sync_frequency", 1) != 1:
            return f"{name} samples from a student of earlier steps; set `vllm_sync_frequency=1`, or leave it out."
        return ""

    def start(self, guard: Guard) -> None:
        """Begin to observe.

        Args:
            guard: Returns a context manager in which the trainer's data are read; it decides what a failure does.
        """
        self.stop()

        def observer(method: Callable[..., None]) -> Callable[..., None]:
            def observe(*args: Any, **keywords: Any) -> None:
                self.unread += 1
                with guard():
                    method(*args, **keywords)
                    self.unread -= 1

            return observe

        self._hooks = [
            MethodHook(self.trainer, name, observer(getattr(self, own_name))) for name, own_name in self.methods.items()
        ]

    def stop(self) -> None:
        """Leave the trainer as it was, and forget the completions."""
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks, self.completions = [], []
        self.step, self.sampled, self.unread = -1, 0, 0

    def keep(self, completions: Iterable[RecordedCompletion]) -> None:
        """Keep completions that were sampled now; those of earlier steps are dropped."""
        step = self.trainer.state.global_step
        if step != self.step:
            self.step, self.completions = step, []
        new_completions = [completion for completion in completions if completion.response_ids]
        self.completions += new_completions
        self.sampled += len(new_completions)

    def rollouts(self, questions: TrainingQuestions) -> list[TrainingRollout]:
        """The rollouts that were sampled from the student as it was before the step that was just taken.

        Args:
            questions: Finds the row of each.
        """
        if self.step != self.trainer.state.global_step - 1:
            return []
        questions.begin_measurement()
        rollouts: list[TrainingRollout] = []
        row_of_content: dict[str, Row] = {}
        for completion in self.completions:
            if completion.row is None:
                row = questions.found(completion.prompt_ids)
            else:
                row = questions.checked(completion.row, completion.prompt_ids)
            if row is None:
                continue
            row = row_of_content.setdefault(repr(row), row)  # a dataset makes a new object at each access
            temperature = float(self.trainer.args.temperature)
            rollouts.append(TrainingRollout(row, completion.response_ids, completion.reward, temperature=temperature))
        return rollouts

    @property
    def is_training(self) -> bool:
        """Whether the trainer trains at present, rather than evaluates."""
        return bool(self.trainer.model.training)


class CompletionRecorder(RolloutRecorder):
    """For trainers that turn the dataset's rows into a batch with prompts and completions.

    Args:
        trainer: The trainer.
        method_name: The method that does it.
        scores: Whether the trainer scores the completions in it.
    """

    def __init__(self, trainer: Any, method_name: str, scores: bool = False) -> None:
        super().__init__(trainer)
        self.methods = {method_name: "observe_batch", **({"_calculate_rewards": "observe_rewards"} if scores else {})}
        self._scored: tuple[list[tuple[int, ...]], list[float] | None] | None = None

    def obstacle(self) -> str:
        """Say what keeps the rollouts from being read; empty if nothing does."""
        if getattr(self.trainer, "generate_from_teacher", False):
            name = type(self.trainer).__name__
            return f"{name} samples them with the teacher's prompt; set `generate_from_teacher=False`, or leave it out."
        return super().obstacle()

    def observe_rewards(
        self, per_function: Tensor, inputs: Any, prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Take the rewards of all processes, and the completions of this one as they were sampled.

        TRL's batch later hides completions that the length limit cut, if it trains without them.
        """
        rewards = None
        if per_function.numel():
            start = self.trainer.accelerator.process_index * len(completion_ids)
            of_process = per_function[start : start + len(completion_ids)]
            rewards = weighted_rewards(
                of_process, self.trainer.reward_weights, getattr(self.trainer, "reward_clip_range", None)
            )
        self._scored = [tuple(map(int, token_ids)) for token_ids in completion_ids], rewards

    def observe_batch(self, batch: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Take the batch with its rows."""
        scored, self._scored = self._scored, None
        if not self.is_training:
            return
        prompts = unpadded(batch["prompt_ids"], batch["prompt_mask"])
        if scored is not None:
            responses, rewards = scored
        else:
            responses, rewards = unpadded(batch["completion_ids"], batch["completion_mask"]), None
        scores = [None] * len(responses) if rewards is None else rewards
        self.keep(RecordedCompletion(*parts) for parts in zip(prompts, responses, rows, scores, strict=True))


class GeneratedTokensRecorder(RolloutRecorder):
    """For `GKDTrainer`, which replaces the dataset's answers in some batches by what the student samples."""

    knows_rows = False
    methods: Mapping[str, str] = {"generate_on_policy_outputs": "observe_generation"}

    def observe_generation(self, generated: tuple[Tensor, ...], model: Any, inputs: Any, *args: Any) -> None:
        """Take what the student sampled; the same method also samples from the teacher."""
        unwrap = self.trainer.accelerator.unwrap_model
        if model is not unwrap(self.trainer.teacher_model):
            self.keep(completions_of_labels(inputs, generated[2]))


class BufferRecorder(RolloutRecorder):
    """For `GOLDTrainer` and `IWOPDTrainer`, which fill a buffer with the batches of an optimizer step.

    Args:
        trainer: The trainer.
        flags_name: Its attribute that says which of the batches the student sampled.
    """

    knows_rows = False
    methods: Mapping[str, str] = {"_fill_buffer": "observe_buffer"}

    def __init__(self, trainer: Any, flags_name: str) -> None:
        super().__init__(trainer)
        self.flags_name = flags_name

    def obstacle(self) -> str:
        """Say what keeps the rollouts from being read; empty if nothing does."""
        if getattr(self.trainer, "_vlm_collator", None) is not None:
            return f"{type(self.trainer).__name__} trains on images, and only text can be measured; leave it out."
        return super().obstacle()

    def observe_buffer(self, result: None, *args: Any, **keywords: Any) -> None:
        """Take the batches that the student sampled."""
        batches, flags = self.trainer._buffered_inputs, getattr(self.trainer, self.flags_name)
        for batch, is_sampled in zip(batches, flags, strict=True):
            if is_sampled:
                self.keep(completions_of_labels(batch, batch["labels"]))


class PairRecorder(RolloutRecorder):
    """For `OnlineDPOTrainer`, which samples two completions for each prompt."""

    methods: Mapping[str, str] = {
        "_generate": "observe_generation",
        "_generate_vllm": "observe_generation",
        "_calculate_rewards_from_functions": "observe_rewards",
    }

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._generated: tuple[Tensor, ...] = ()

    def observe_generation(self, generated: tuple[Tensor, ...], *args: Any, **keywords: Any) -> None:
        """Take the prompts and completions, with their masks."""
        self._generated = generated[:4]

    def observe_rewards(
        self, rewards: Tensor, prompts: Sequence[Any], completions: Any, completion_ids_list: Any, **columns: Any
    ) -> None:
        """Take the rewards and the columns of the rows."""
        prompt_ids, prompt_mask, completion_ids, completion_mask = self._generated
        responses = unpadded(completion_ids, completion_mask)
        end_tokens, penalty = set(self.trainer.eos_token_ids), self.trainer.args.missing_eos_penalty
        scores = [
            score if penalty is None or end_tokens & set(response) else score - penalty
            for score, response in zip(rewards.tolist(), responses, strict=True)
        ]
        columns = {name: values for name, values in columns.items() if isinstance(values, list | tuple)}
        rows = [
            {"prompt": prompt, **{name: values[place] for name, values in columns.items()}}
            for place, prompt in enumerate(prompts)
        ]
        prompt_tokens = unpadded(prompt_ids, prompt_mask)
        self.keep(RecordedCompletion(*parts) for parts in zip(prompt_tokens, responses, rows, scores, strict=True))


class RegressionRecorder(RolloutRecorder):
    """For `A2POTrainer`, which samples one completion for each prompt when it prepares a batch."""

    methods: Mapping[str, str] = {"_prepare_inputs": "observe_batch"}

    def observe_batch(self, batch: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Take the batch with its rows."""
        if not self.is_training:
            return
        split = batch["input_ids"].shape[1] - batch["logits_to_keep"]
        token_ids, mask = batch["input_ids"], batch["attention_mask"]
        prompts, responses = (
            unpadded(token_ids[:, part], mask[:, part]) for part in (slice(split), slice(split, None))
        )
        rewards = batch["rewards"].tolist()
        self.keep(RecordedCompletion(*parts) for parts in zip(prompts, responses, rows, rewards, strict=True))
