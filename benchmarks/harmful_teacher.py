"""A teacher that helps on incorrect rollouts and harms on correct ones, by construction: a positive control for gates.

On an incorrect rollout it is the student with the worked solution in its context. On a correct rollout its logits are
mirrored at the student's own, `z - (z_context - z)`. The descent direction of the reverse KL divergence on the logits
then has the opposite sign, exactly. So whatever the worked solution teaches on correct rollouts, this teacher unlearns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks import Teacher
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction


class HarmfulOnCorrect(Teacher):
    """The teacher of the positive control.

    Args:
        tokenizer: The student's.
        rows: All questions, whose responses it can tell apart by their prompts.
        reward: Tells which responses are correct.
        template: The helpful context.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Row], reward: RewardFunction, template: str) -> None:
        super().__init__()
        self.tokenizer_, self.reward = tokenizer, reward
        self.helpful = Teacher(template)
        self.row_of_prompt = {tuple(tokenizer(row["prompt"])["input_ids"]): row for row in rows}
        self._models: dict[int, nn.Module] = {}

    @contextmanager
    def policy(self, student: nn.Module) -> Iterator[tuple[nn.Module, None]]:
        """A model that recognises each sequence's question and judges its response."""
        yield self._models.setdefault(id(student), _Judging(student, self.contexts, self.is_correct)), None

    def contexts(self, sequence: list[int]) -> tuple[int, Row, Tensor] | None:
        """The length of a sequence's own prompt, its row, and the prompt with the helpful context."""
        for prompt, row in self.row_of_prompt.items():
            if tuple(sequence[: len(prompt)]) == prompt:
                return len(prompt), row, torch.tensor(self.tokenizer_(self.helpful.prompt(row))["input_ids"])
        return None

    def is_correct(self, row: Row, response: list[int]) -> bool:
        """Judge a response; its last token, which ends it, is mostly not among those that a teacher reads."""
        text = self.tokenizer_.decode(response, skip_special_tokens=True)
        return self.reward(prompts=[row["prompt"]], completions=[text], entry=[row["entry"]])[0] == 1


class _Judging(nn.Module):
    """Logits of the teacher, by full forward passes of the student."""

    def __init__(
        self,
        student: nn.Module,
        contexts: Callable[[list[int]], tuple[int, Row, Tensor] | None],
        is_correct: Callable[[Row, list[int]], bool],
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device=next(student.parameters()).device), requires_grad=False)
        self.config = student.config
        # In a list, so that the student is no part of this module and keeps its own name and mode.
        self.students, self.contexts, self.is_correct = [student], contexts, is_correct

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        """Logits ``(B, T, V)``: of the responses to known questions, otherwise those of the student."""
        lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(1).tolist()
        rows = [self._logits(sequence[:length]) for sequence, length in zip(input_ids, lengths, strict=True)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return SimpleNamespace(logits=nn.functional.pad(padded, (0, 0, 0, input_ids.shape[1] - padded.shape[1])))

    def _logits(self, sequence: Tensor) -> Tensor:
        """Logits ``(T, V)`` of one sequence, zero within the prompt of a known question."""
        if (found := self.contexts(sequence.tolist())) is None:
            return self._last_logits(sequence, len(sequence))
        start, row, prompt = found
        response = sequence[start:]
        # The logits of the prompt's last token choose the first token of the response.
        logits = self._last_logits(torch.cat([prompt.to(sequence), response]), len(response) + 1)
        if self.is_correct(row, response.tolist()):
            logits = 2 * self._last_logits(sequence, len(response) + 1) - logits
        return nn.functional.pad(logits, (0, 0, start - 1, 0))

    def _last_logits(self, sequence: Tensor, count: int) -> Tensor:
        (student,) = self.students
        logits: Tensor = student(input_ids=sequence[None], use_cache=False, logits_to_keep=count).logits[0]
        return logits
