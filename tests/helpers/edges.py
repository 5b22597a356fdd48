"""Situations in which figures of an update do not exist, or barely do."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from odp_callbacks import BaseTeacher, Teacher
from tests.helpers.models import WORDS, tiny
from tests.helpers.training import contains_answer_reward

ANSWER = {"answer": Teacher("{answer} {prompt}")}


@dataclass(frozen=True)
class Edge:
    """A situation, and what is expected of it.

    Attributes:
        options: Options of the diagnosis or of the callback.
        questions: How many questions there are.
        scale: Of the student's B matrices; 0 for a fresh adapter.
        ends_at_once: Whether many responses end with their first token.
        missing: A part of the sentence that says why there is no figure for some teacher; empty if all have one.
        without: Teachers that have no figure.
    """

    options: dict[str, Any] = field(default_factory=dict)
    questions: int = 4
    scale: float = 0.3
    ends_at_once: bool = False
    missing: str = ""
    without: tuple[str, ...] = ()

    def student(self) -> nn.Module:
        """A student for it, in float32."""
        student = tiny(scale=self.scale).float()
        if self.ends_at_once:
            student.generation_config.eos_token_id = [WORDS.index(word) for word in ("</s>", "a", "b", "c", "d")]
        return student

    def settings(self) -> dict[str, Any]:
        """The options, with those that are common to all."""
        common = {"teachers": dict(ANSWER), "reward": contains_answer_reward, "budget": 0}
        return {**common, "rollouts_per_question": 4, "max_new_tokens": 6, **self.options}


def always_right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Rewards everything."""
    return [1.0] * len(completions)


def by_question(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """Rewards some questions, whatever the response."""
    return [float(right in "ab") for right in answer]


def partial(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Rewards the number of words, never with 1."""
    return [len(completion.split()) / 10 for completion in completions]


EDGES = {
    "all rewards equal": Edge({"reward": always_right}, missing="has the reward 1", without=("answer",)),
    "rewards of a question equal": Edge({"reward": by_question}, missing="equal rewards", without=("answer",)),
    "one rollout a question": Edge({"rollouts_per_question": 1}, questions=8),
    "one question": Edge({"reward": partial}, questions=1, missing="of one question", without=("answer",)),
    "a teacher equal to the student": Edge(
        {"teachers": {**ANSWER, "self": Teacher("{prompt}")}}, missing="“self” does not differ", without=("self",)
    ),
    "a fresh adapter": Edge(
        {"teachers": {**ANSWER, "base": BaseTeacher()}}, scale=0.0, missing="“base” does not differ", without=("base",)
    ),
    "rewards that are not binary": Edge({"reward": partial}),
    "truncated responses": Edge({"max_new_tokens": 1, "rollouts_per_question": 8}),
    "empty responses": Edge({"reward": partial}, ends_at_once=True),
}
