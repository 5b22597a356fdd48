"""From rows to questions for the student and every teacher, and which rows cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import Question, QuestionLengthError, Row, as_question, check_length, unusable
from odp_callbacks.engine.rewards import RewardFunction, check_columns
from odp_callbacks.engine.rows import as_rows
from odp_callbacks.engine.sampling.model_forward import check_embedded
from odp_callbacks.engine.teachers import ServedTeacher, Teacher, teacher_prompt_ids


@dataclass
class UsableQuestions:
    """The questions that can be measured, and why others cannot.

    Attributes:
        questions: The questions.
        places: The index of each question's row.
        errors: For each row that cannot be used, why.
    """

    questions: list[Question] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    errors: list[ValueError] = field(default_factory=list)

    @property
    def complaint(self) -> str:
        """A sentence about the rows that cannot be used; empty if there are none."""
        if not self.errors:
            return ""
        row_count = len(self.questions) + len(self.errors)
        return f"odp-callbacks: left out {len(self.errors)} of {row_count} rows, because {self.errors[0]}"


@dataclass(frozen=True)
class QuestionEncoder:
    """Encodes rows for a student and its teachers.

    Attributes:
        student: The student.
        tokenizer: Its tokenizer.
        teachers: The teachers by name.
        reward: The reward function, which may need columns.
        max_new_tokens: Limit of a response, in tokens.
        template: How messages are rendered.
    """

    student: nn.Module
    tokenizer: Any
    teachers: Mapping[str, Teacher]
    reward: RewardFunction
    max_new_tokens: int
    template: ChatTemplate

    def encode(self, row: Row, number: int, question_id: str | None = None) -> Question:
        """Encode one row, and check its lengths.

        Args:
            row: The row.
            number: Its index.
            question_id: Identifies the question; None for its ``id`` column, or its index.

        Raises:
            QuestionLengthError: If a prompt is too long.
            ValueError: If the row cannot be used.
        """
        question = as_question(row, self.tokenizer, number, question_id, self.template)
        description = f"question {question.id}"
        check_length(question.prompt_ids, self.max_new_tokens, self.student, description)
        check_embedded(self.student, [question.prompt_ids], description)
        check_columns(self.reward, [question])
        teacher_prompts = {}
        for name, teacher in self.teachers.items():
            model = getattr(teacher, "model", self.student)
            description = f"question {question.id} for teacher {name!r}"
            try:
                teacher_prompts[name] = teacher_prompt_ids(teacher, self.tokenizer, question)
            except Exception as error:  # of the user's function, of a template, or of the tokenizer
                raise unusable(description, error) from error
            if isinstance(teacher, ServedTeacher):  # how much its model can read, the server says
                continue
            check_length(teacher_prompts[name], self.max_new_tokens, model, description)
            check_embedded(model, [teacher_prompts[name]], description)
        return replace(question, teacher_prompt_ids=teacher_prompts)

    def encode_usable(
        self,
        rows: Sequence[Row] | Sequence[Question],
        ids: Sequence[str] | None = None,
        tolerated: type[ValueError] = QuestionLengthError,
    ) -> UsableQuestions:
        """Encode rows and leave out those that cannot be used.

        Args:
            rows: Rows in any form, or questions that have been encoded.
            ids: Identifies each question.
            tolerated: What a row may be left out for; other errors are raised.

        Raises:
            ValueError: If no row can be used, or one fails for another reason.
        """
        usable = UsableQuestions()
        if len(rows) and all(isinstance(row, Question) for row in rows):
            usable.questions, usable.places = list(rows), list(range(len(rows)))  # type: ignore[arg-type]
            return usable
        for place, row in enumerate(as_rows(rows)):
            try:
                usable.questions.append(self.encode(row, place, None if ids is None else ids[place]))
                usable.places.append(place)
            except tolerated as error:
                usable.errors.append(error)
        if usable.errors and not usable.questions:
            raise usable.errors[0]
        return usable


def template_of(config: ProbeConfig, training: ChatTemplate) -> ChatTemplate:
    """How messages are rendered: as the configuration says, and where it says nothing, as in the training.

    Args:
        config: The probe's configuration.
        training: How the training renders messages.
    """
    arguments, tools = config.chat_template_kwargs, config.tools
    return replace(
        training,
        template=training.template if config.chat_template is None else config.chat_template,
        arguments=training.arguments if arguments is None else arguments,
        tools=training.tools if tools is None else tools,
    )
