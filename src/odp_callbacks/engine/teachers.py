"""Who teaches: another model, an adapter, the base, the student itself or its average, each under a context of choice.

A teacher is a policy and a prompt. It always sees exactly the response tokens that the student sampled, after its own
prompt.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.prompts import Prompt, Question, Row, encode_prompt, is_conversational
from odp_callbacks.engine.sampling.prefix_cache import vocabulary_size
from odp_callbacks.engine.student import why_not_base
from odp_callbacks.functional.gradients import evaluating, lora_parameters
from odp_callbacks.text import visible

Context = str | Callable[[Row], Prompt]
"""A template over the row's columns, or a function from row to prompt."""
LONGEST_NAME = 100
"""Characters of a teacher's name."""

Policy = tuple[nn.Module, dict[str, Tensor] | None]
"""A model, and replacements for some of its parameters by name."""


class Teacher:
    r"""The student itself, as it is now: useful with a context that it does not have when it answers.

    Base class of the other teachers, which override :meth:`policy`. With no context it equals the student, and every
    alignment with it is undefined.

    Args:
        context: What the teacher is shown in place of the row's prompt. A string is a template over the row's
            columns, such as ``"The answer is {answer}.\n{prompt}"``; on conversational rows it becomes the last user
            message, and ``{prompt}`` stands for that message's text. A function takes the row and returns a prompt
            (string or messages). None: the row's own prompt.

    Examples:
        >>> Teacher("The answer is {answer}. {prompt}").prompt({"prompt": "1 + 1 =", "answer": "2"})
        'The answer is 2. 1 + 1 ='
    """

    def __init__(self, context: Context | None = None) -> None:
        if context is not None and not isinstance(context, str) and not callable(context):
            raise TypeError(f"`context` must be a template, a function of the row or None, but {context!r} was given.")
        self.context = context

    def prompt(self, row: Row) -> Prompt:
        """What the teacher is shown for ``row``.

        Raises:
            ValueError: If the template names a column that the row lacks.
        """
        own: Prompt = row["prompt"]
        if self.context is None:
            return own
        if callable(self.context):
            return self.context(row)
        if not is_conversational(own):
            return _fill(self.context, row)
        messages: list[Mapping[str, Any]] = list(own)  # type: ignore[arg-type]
        last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=None)
        if last is None:
            raise ValueError(f"`context` replaces the last user message, but `prompt` {own!r} has none.")
        text = _fill(self.context, {**row, "prompt": messages[last]["content"]})
        messages[last] = {**messages[last], "content": text}
        return messages

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The model to run while the block lasts; whatever is switched for it is switched back."""
        yield student, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` where this teacher cannot teach this student."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this teacher."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""

    def update(self, student: nn.Module, step: int) -> None:
        """Called after every optimizer step of the student, by whoever uses this teacher; ``step`` counts them."""


class BaseTeacher(Teacher):
    """The student's base model: the adapters are switched off. Takes the ``context`` of :class:`Teacher`."""

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The student without its adapters."""
        with _adapters(student, None):
            yield student, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """With the adapters off, the student must be the model that it was made from."""
        if reason := why_not_base(student):
            raise ValueError(
                f"`teachers` has the student's base, but with the adapters off it is not the original model: {reason}; "
                "give the original model itself, `ModelTeacher(model)`."
            )


class AdapterTeacher(Teacher):
    """Another peft adapter on the student's base.

    Args:
        adapter: Its name, as in ``student.load_adapter(path, adapter_name=...)``.
        context: As in :class:`Teacher`.
    """

    def __init__(self, adapter: str, context: Context | None = None) -> None:
        super().__init__(context)
        self.adapter = adapter

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The student with that adapter in place of its own."""
        with _adapters(student, self.adapter):
            yield student, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """The adapter must be there."""
        known = sorted(getattr(student, "peft_config", {}))
        if self.adapter not in known:
            raise ValueError(
                f"`adapter` must be one of the student's adapters {known}, but {self.adapter!r} was given."
            )


class ModelTeacher(Teacher):
    """Any causal language model with the student's vocabulary.

    Args:
        model: The teacher. It stays on its own device.
        context: As in :class:`Teacher`.
        tokenizer: The teacher's tokenizer; needed only where the two models differ in the number of logits, to see
            that they differ in padding rows and not in tokens.
    """

    def __init__(self, model: nn.Module, context: Context | None = None, *, tokenizer: Any = None) -> None:
        super().__init__(context)
        self.model = model
        self.tokenizer = tokenizer

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The given model, in evaluation mode."""
        with evaluating(self.model):
            yield self.model, None

    def check(self, student: nn.Module, tokenizer: Any) -> None:
        """The vocabularies must agree, up to padding rows."""
        ours, theirs = vocabulary_size(student), vocabulary_size(self.model)
        if self.tokenizer is not None:
            if self.tokenizer.get_vocab() != tokenizer.get_vocab():
                raise ValueError(
                    "`teachers` must share the student's vocabulary, but the tokenizer of this teacher's "
                    f"{len(self.tokenizer)} tokens differs from the student's {len(tokenizer)}."
                )
        elif ours != theirs:
            raise ValueError(
                f"`teachers` must share the student's vocabulary, but the student has {ours} logits and this teacher "
                f"{theirs}; if they differ by padding rows only, show it with `ModelTeacher(model, tokenizer=...)`."
            )


class EMATeacher(Teacher):
    """An exponential moving average of the student's LoRA parameters.

    Args:
        decay: In [0, 1): share of the average that is kept at each optimizer step.
        context: As in :class:`Teacher`.
    """

    def __init__(self, decay: float = 0.999, context: Context | None = None) -> None:
        super().__init__(context)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), but {decay!r} was given.")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        # A trainer and a callback may share this teacher, and both tell it of the same step.
        self.step = -1

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[Policy]:
        """The student with the averaged parameters in place of its own."""
        if not self.average:
            self.update(student, self.step)
        yield student, {name: value.to(p) for (name, value), p in self._paired(student)}

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Move the average towards the student, once for each step; the first call copies it."""
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in lora_parameters(student).items()}
        elif step > self.step:
            for (_, value), p in self._paired(student):
                value.lerp_(p.detach().to(value), 1 - self.decay)
        self.step = max(step, self.step)

    def _paired(self, student: nn.Module) -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
        yield from zip(self.average.items(), lora_parameters(student).values(), strict=True)

    def state_dict(self) -> dict[str, Any]:
        """The averaged parameters, and how far they are."""
        return {"average": dict(self.average), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up an average that was saved."""
        self.average, self.step = dict(state["average"]), state["step"]


def as_teachers(teachers: object) -> dict[str, Teacher]:
    """Name the teachers: a mapping from name to teacher, a list of them, or one.

    A plain model counts as :class:`ModelTeacher`, ``"base"`` as :class:`BaseTeacher`, and a template or function as
    the student under that context.

    Raises:
        ValueError: If there is none, a name repeats or cannot stand in a metric's name, or the type is unknown.
    """
    if isinstance(teachers, Mapping):
        named = {str(name): _as_teacher(value) for name, value in teachers.items()}
    else:
        given = list(teachers) if isinstance(teachers, Sequence) and not isinstance(teachers, str) else [teachers]
        made = [_as_teacher(value) for value in given]
        named = {_name(teacher): teacher for teacher in made}
        if len(named) < len(made):
            raise ValueError("`teachers` of the same kind need names; give a dict such as {'answer': Teacher(...)}.")
    if not named:
        raise ValueError("`teachers` is empty; give at least one, such as {'base': BaseTeacher()}.")
    for name in named:
        if not name.strip() or "/" in name or not visible(name) or len(name) > LONGEST_NAME:
            raise ValueError(
                "a teacher's name becomes a part of metric names: it must have no '/', only characters that can be "
                f"seen, and at most {LONGEST_NAME} of them, but `teachers` got {name[: LONGEST_NAME + 1]!r}."
            )
    return named


def _as_teacher(value: object) -> Teacher:
    if isinstance(value, Teacher):
        return value
    if isinstance(value, nn.Module):
        return ModelTeacher(value)
    if value == "base":
        return BaseTeacher()
    if isinstance(value, str) and "{" not in value:
        raise ValueError(f"`teachers` knows 'base' and templates with a {{column}}, but {value!r} was given.")
    if isinstance(value, str) or callable(value):
        return Teacher(value)
    raise ValueError(f"`teachers` takes teachers, models, templates or functions, but {value!r} was given.")


def _name(teacher: Teacher) -> str:
    kind = {BaseTeacher: "base", ModelTeacher: "model", EMATeacher: "ema", Teacher: "self"}
    return teacher.adapter if isinstance(teacher, AdapterTeacher) else kind.get(type(teacher), type(teacher).__name__)


def teacher_prompt_ids(teacher: Teacher, tokenizer: Any, question: Question) -> Tensor:
    """What this teacher is shown, ``(P',)`` int64: the student's own prompt where it has no context."""
    return question.prompt_ids if teacher.context is None else encode_prompt(tokenizer, teacher.prompt(question.row))


def teacher_logits(
    teacher: Teacher,
    student: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
) -> list[Tensor]:
    """The teacher's logits at chosen depths of responses.

    Args:
        teacher: The teacher.
        student: The student, with its adapters.
        prompts: The teacher's prompt for each response, ``(P'_r,)``.
        responses: The student's response tokens.
        depths: For each response, the ``N_r`` depths that are asked for.

    Returns:
        ``(N_r, V')`` each, on the student's device. ``V'`` is the smaller of the two numbers of logits: what one
        model has more are padding rows (:meth:`ModelTeacher.check`), and they go.
    """
    device = next(student.parameters()).device
    size = vocabulary_size(student)
    with torch.no_grad(), teacher.policy(student) as (model, parameters):
        logits = response_logits(model, prompts, responses, depths, parameters)
    return [x[..., :size].to(device) for x in logits]


def _fill(template: str, row: Row) -> str:
    for _, field, _, _ in string.Formatter().parse(template):
        column = None if field is None else field.split(".")[0].split("[")[0]
        if column is not None and column not in row:
            raise ValueError(f"`context` names the column {column!r}, but the row has only {sorted(map(str, row))}.")
    return template.format(**row)


@contextmanager
def _adapters(student: nn.Module, active: str | None) -> Iterator[None]:
    """Switch to one adapter, or to none; afterwards everything as it was.

    peft's own switches also change which parameters require gradients, and some fail on layers that do not have the
    adapter; what a layer's forward reads is these two attributes.
    """
    layers: list[Any] = [m for m in student.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = active is None
            if active is not None:
                # A wrapper without this adapter runs its original module.
                layer._active_adapter = [active] if active in _available(layer) else []
        yield
    finally:
        for layer, adapters, disabled in before:
            layer._active_adapter, layer._disable_adapters = adapters, disabled


def _available(layer: Any) -> set[str]:
    held = (attrgetter(name)(layer) for name in layer.adapter_layer_names)
    return {adapter for container in held for adapter in container}
