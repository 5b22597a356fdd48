"""The kinds of teachers: the student itself, its base, another adapter, another model, and a moving average."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from odp_callbacks.engine.prompts import Prompt, Row, text_tokenizer
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.student import difference_from_base, shares_adapters
from odp_callbacks.engine.teachers.adapters import active_adapter
from odp_callbacks.engine.teachers.context import Context, prompt_in_context
from odp_callbacks.functional.gradients import active_lora_parameters, evaluation_mode
from odp_callbacks.text import first_line

Policy = tuple[nn.Module, dict[str, Tensor] | None]
"""A model, and replacements for some of its parameters by name."""


class Teacher:
    r"""The student itself in its current state, usually with a context that it does not have when it answers.

    It is the base class of the other teachers, which override :meth:`policy`. Without a context it equals the student,
    and its alignment is undefined everywhere.

    Args:
        context: The prompt that the teacher is given in place of the row's. A string is a template over the row's
            columns, such as ``"The answer is {answer}.\n{prompt}"``. On conversational rows it replaces the last user
            message, and ``{prompt}`` stands for the text of that message. A function takes the row and returns a
            prompt (string or messages). None gives the teacher the row's own prompt.

    Raises:
        TypeError: If ``context`` is of another type.

    Examples:
        >>> Teacher("The answer is {answer}. {prompt}").prompt({"prompt": "1 + 1 =", "answer": "2"})
        'The answer is 2. 1 + 1 ='
    """

    def __init__(self, context: Context | None = None) -> None:
        if context is not None and not isinstance(context, str) and not callable(context):
            raise TypeError(f"`context` must be a template, a function of the row or None, but {context!r} was given.")
        self.context = context

    def prompt(self, row: Row) -> Prompt:
        """The prompt that the teacher is given for ``row``.

        Raises:
            ValueError: If the template names a column that the row lacks, or the conversation has no user message.
        """
        return prompt_in_context(self.context, row)

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The model to run within the block; afterwards the student is as it was."""
        yield student, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` if this teacher cannot teach this student."""

    def state_dict(self) -> dict[str, Any]:
        """The state of this teacher that belongs into a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""

    def update(self, student: nn.Module, step: int) -> None:
        """Follow the student after an optimizer step; every trainer or callback that uses this teacher calls it.

        Args:
            student: The student after the step.
            step: Number of optimizer steps so far. Several calls for the same step count once.
        """


class BaseTeacher(Teacher):
    """The student's base model: the student with its adapters disabled.

    Args:
        context: As in :class:`Teacher`.
    """

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The student without its adapters."""
        with active_adapter(student, None):
            yield student, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` if the student with its adapters disabled is not the model that it was made from."""
        if reason := difference_from_base(student):
            raise ValueError(
                f"`teachers` has the student's base, but with the adapters off it is not the original model: {reason}; "
                "give the original model itself, `ModelTeacher(model)`."
            )


class AdapterTeacher(Teacher):
    """Another peft adapter on the student's base.

    Args:
        adapter: The name of the adapter, as in ``student.load_adapter(path, adapter_name=...)``.
        context: As in :class:`Teacher`.
    """

    def __init__(self, adapter: str, context: Context | None = None) -> None:
        super().__init__(context)
        self.adapter = adapter

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The student with that adapter in place of its own."""
        with active_adapter(student, self.adapter):
            yield student, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` if the student does not have this adapter."""
        adapters = sorted(getattr(student, "peft_config", {}))
        if self.adapter not in adapters:
            raise ValueError(
                f"`adapter` must be one of the student's adapters {adapters}, but {self.adapter!r} was given."
            )


class ModelTeacher(Teacher):
    """Any causal language model with the student's vocabulary.

    Args:
        model: The teacher, which stays on its own device; or the folder or the name on the hub that it is loaded from
            when the student is known, in the dtype of its checkpoint, onto the student's device and with its tokenizer.
        context: As in :class:`Teacher`.
        tokenizer: The teacher's tokenizer, or a processor that holds it. The teacher's prompts are then encoded by it,
            and messages are rendered by its chat template. It is needed if the two models differ in their number of
            logits, to check that they differ in padding rows and not in tokens. None stands for the student's.
    """

    def __init__(self, model: nn.Module | str, context: Context | None = None, *, tokenizer: Any = None) -> None:
        super().__init__(context)
        self.model: Any = model
        self._was_named = isinstance(model, str)
        self.tokenizer = None if tokenizer is None else text_tokenizer(tokenizer)

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The given model, in evaluation mode."""
        self._load(student)
        if self._was_named:  # a trainer may move the student after it has checked the teachers
            self.model.to(next(student.parameters()).device)
        with evaluation_mode(self.model):
            yield self.model, None

    def _load(self, student: nn.Module) -> None:
        """Load a model that was given by its name."""
        if not isinstance(self.model, str):
            return
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = self.model
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
            tokenizer = self.tokenizer or AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`model` names {name!r}, which is neither a folder with a model and its tokenizer nor available on "
                f"the hub ({first_line(error)})."
            ) from error
        self.model, self.tokenizer = model.eval().requires_grad_(False), text_tokenizer(tokenizer)

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` if this model is the student's, or unless the vocabularies agree, apart from padding."""
        self._load(student)
        if shares_adapters(student, self.model):
            raise ValueError(
                "`teachers` has a model that holds the student's own LoRA layers (`get_peft_model` changes the base "
                "model in place), so it would always equal the student; `BaseTeacher()` is the student's base, "
                "`AdapterTeacher(name)` another of its adapters, and `Teacher(context)` the student itself."
            )
        student_size, teacher_size = vocabulary_size(student), vocabulary_size(self.model)
        if self.tokenizer is not None:
            if self.tokenizer.get_vocab() != text_tokenizer(tokenizer).get_vocab():
                raise ValueError(
                    "`teachers` must share the student's vocabulary, but the tokenizer of this teacher's "
                    f"{len(self.tokenizer)} tokens differs from the student's {len(tokenizer)}; "
                    "`ServedTeacher(ModelScorer(model), tokenizer=...)` pairs tokens of two tokenizers by their text."
                )
        elif student_size != teacher_size:
            raise ValueError(
                f"`teachers` must share the student's vocabulary, but the student has {student_size} logits and this "
                f"teacher {teacher_size}; if they differ by padding rows only, show it with "
                "`ModelTeacher(model, tokenizer=...)`."
            )


class EMATeacher(Teacher):
    """An exponential moving average of the student's LoRA parameters.

    The average is kept in float32, or in float64 for parameters in float64. In half precision, most steps would be
    too small to move it.

    Args:
        decay: Share of the average that is kept at each optimizer step, in [0, 1).
        context: As in :class:`Teacher`.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.999, context: Context | None = None) -> None:
        super().__init__(context)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), but {decay!r} was given.")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        # A trainer and a callback may share this teacher and both call `update` for the same step.
        self.step = -1
        # The parameters that the averages are of; those of a checkpoint belong to none yet.
        self._owners: dict[str, ref[nn.Parameter]] = {}

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The student with the averaged parameters in place of its own.

        A parameter without an average is the student's own: its average starts at the next update.
        """
        averages = self._averages_of(student)
        parameters = {
            name: averages[_plain(name)].to(parameter)
            for name, parameter in active_lora_parameters(student).items()
            if _plain(name) in averages
        }
        yield student, parameters or None

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Move the average towards the student, once for each step.

        The average of a parameter starts as a copy of it: at the first call, in another run, whose steps begin again,
        for another student, and for an adapter that is new or has just become active. A parameter that is frozen keeps
        its average.

        Args:
            student: The student after the step.
            step: Number of optimizer steps so far. Several calls for the same step count once.
        """
        averages = self._averages_of(student) if step >= self.step else {}
        if not self._owners and len(averages) < len(self.average) and step >= self.step:
            warnings.warn(
                "odp-callbacks: the saved average of an EMATeacher does not fit the student's LoRA parameters; where "
                "it does not, it starts anew from the student.",
                stacklevel=2,
            )
        for name, parameter in active_lora_parameters(student).items():
            if (average := averages.get(_plain(name))) is None:
                averages[_plain(name)] = _in_averaging_dtype(parameter).clone()
            elif step > self.step:
                average.lerp_(parameter.detach().to(average), 1 - self.decay)
        self.average, self.step = averages, step
        owners = {_plain(name): ref(parameter) for name, parameter in student.named_parameters()}
        self._owners = {name: owners[name] for name in averages}

    def _averages_of(self, student: nn.Module) -> dict[str, Tensor]:
        """The averages of the parameters that are the student's, by name, also of those that are not active now."""
        present = {_plain(name): parameter for name, parameter in student.named_parameters()}
        averages = {}
        for name, average in self.average.items():
            parameter = present.get(name)
            is_owner = name not in self._owners or self._owners[name]() is parameter
            if parameter is not None and is_owner and parameter.shape == average.shape:
                averages[name] = average.to(parameter.device)
        return averages

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the references to parameters: a copy belongs to no student until its next update."""
        return {**self.__dict__, "_owners": {}}

    def state_dict(self) -> dict[str, Any]:
        """The averaged parameters, and the last step that they include."""
        return {"average": dict(self.average), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved average; what does not fit the student is dropped at the next update."""
        self.average = {_plain(name): _in_averaging_dtype(average) for name, average in state["average"].items()}
        self.step, self._owners = state["step"], {}


def _in_averaging_dtype(parameter: Tensor) -> Tensor:
    """A parameter in float32, or in float64 if it is."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def _plain(name: str) -> str:
    """A parameter's name without what ``torch.compile`` adds to it."""
    return name.replace("_orig_mod.", "")
