"""Chooses among several teachers: each class of tokens gets the one that measurably helps it most."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.functional.tokens import Tokens
from odp_callbacks.gates.alignment import AlignmentGate
from odp_callbacks.gates.class_evidence import ALL_DEPTHS, TokenClass, masks_by_class
from odp_callbacks.records import ProbeReport


class TeacherRouter(AlignmentGate):
    """Choose the teacher of each class of tokens: no context is best everywhere (arXiv:2605.10889).

    Each class (correct or incorrect rollout) has one teacher, at first the first one. After a probe it gets another
    teacher only if that teacher's update gain is measurably higher on the same questions, that is, if the whole
    interval of the difference lies above 0. The router thus does not act on noise, and a teacher that is only as good
    does not replace the current one (hysteresis). Of several better teachers it takes the one with the highest gain.
    With a figure of single tokens the classes are divided by depth, too; a window whose own evidence never decided
    follows its side (correct or incorrect, all depths).

    A share ``explore`` of the rollouts gets a teacher drawn from the others, so that training goes on seeing what the
    student learns from each. (The probes measure all teachers in any case.)

    The router is an :class:`AlignmentGate`, too: a class whose teacher measurably harms has the weight ``floor``, which
    is 1 by default, so that it only routes.

    Args:
        explore: Share of the rollouts that explore, in [0, 1).
        seed: Seed of the router's own random stream.
        floor: As in :class:`AlignmentGate`; with 0, classes in which the best teacher harms are left out.
        **options: The other arguments of :class:`AlignmentGate`.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import tokens_of
        >>> router = TeacherRouter(explore=0.0)
        >>> router.route(tokens_of(torch.ones(1, 2), rewards=[0.0], teachers=("answer", "solution"))).tolist()
        [0, 0]
    """

    def __init__(self, *, explore: float = 0.1, seed: int = 0, floor: float = 1.0, **options: Any) -> None:
        super().__init__(floor=floor, **options)
        if not 0 <= explore < 1:
            raise ValueError(f"`explore` must lie in [0, 1), but {explore!r} was given.")
        self.explore = explore
        self._random_stream = torch.Generator().manual_seed(seed)
        self._teacher_of_class: dict[TokenClass, str] = {}
        # The teachers of the training; the probes may measure others, too.
        self._training_teachers: tuple[str, ...] = ()

    def observe(self, report: ProbeReport) -> None:
        """Learn from a probe."""
        super().observe(report)
        for token_class in self.evidence.classes():  # the sides come before their windows
            if (better_teacher := self._better_teacher(token_class)) is not None:
                self._teacher_of_class[token_class] = better_teacher

    def teacher(self, token_class: TokenClass) -> str | None:
        """Return the teacher of a class; None as long as no probe has decided against the first one."""
        teacher_of_side = self._teacher_of_class.get((token_class[0], ALL_DEPTHS))
        return self._teacher_of_class.get(token_class, teacher_of_side)

    def route(self, tokens: Tokens) -> Tensor:
        """Return the index of each token's teacher in ``tokens.teachers``, ``(N,)`` int64.

        Raises:
            ValueError: If the probes do not measure one of the teachers, or the rewards are not known.
        """
        names = list(tokens.teachers)
        self._training_teachers = tokens.teachers
        for name in names:
            self._check_measured(name)
        teacher_indices = torch.zeros_like(tokens.rollout)
        for class_mask, token_class in masks_by_class(tokens, self.evidence.windows):
            teacher_indices[class_mask] = names.index(self.teacher(token_class) or names[0])
        if len(names) > 1 and self.explore > 0:
            return self._explore(tokens, teacher_indices, len(names))
        return teacher_indices

    def _explore(self, tokens: Tokens, teacher_indices: Tensor, teacher_count: int) -> Tensor:
        """Give whole rollouts another teacher than the chosen one, each of the others with the same probability."""
        rollouts = tokens.rollout.unique()
        uniform = torch.rand(2, len(rollouts), generator=self._random_stream).to(rollouts.device)
        shift = 1 + (uniform[1] * (teacher_count - 1)).long()
        rollout_index = torch.searchsorted(rollouts, tokens.rollout)
        explores = (uniform[0] < self.explore)[rollout_index]
        return torch.where(explores, (teacher_indices + shift[rollout_index]) % teacher_count, teacher_indices)

    def _better_teacher(self, token_class: TokenClass) -> str | None:
        """The teacher that helps a class measurably more than the current one, and most of all such teachers."""
        measured = self.evidence.teachers
        candidates = [name for name in self._training_teachers or measured if name in measured]
        current = self.teacher(token_class) or candidates[0]
        gains = {
            name: self.evidence.estimate(token_class, name).value
            for name in candidates
            if name != current and self.evidence.difference(token_class, name, current).low > 0
        }
        return max(gains, key=lambda name: gains[name]) if gains else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        teacher_of_class = [(*token_class, name) for token_class, name in self._teacher_of_class.items()]
        return {
            **super().state_dict(),
            "teacher_of_class": teacher_of_class,
            "random_stream": self._random_stream.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        super().load_state_dict(state)
        self._teacher_of_class = {
            (correct, window_index): name for correct, window_index, name in state["teacher_of_class"]
        }
        self._random_stream.set_state(state["random_stream"])
