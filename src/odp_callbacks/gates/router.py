"""Of several teachers, each class of tokens gets the one that measurably helps it most."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.gates.alignment import AlignmentGate
from odp_callbacks.gates.classes import WHOLE, Class, of_tokens
from odp_callbacks.gates.tokens import Tokens
from odp_callbacks.records import ProbeReport


class TeacherRouter(AlignmentGate):
    """Choose among teachers, class by class: no context is best everywhere (arXiv:2605.10889), so let the run choose.

    Every class (correct or incorrect x depth window) has one teacher, at first the first. After a probe it passes to
    another one only if that one's predicted gain is measurably higher on the same nodes: the whole interval of the
    difference lies above 0 (no action on noise, and hysteresis: a teacher that is as good does not replace the one in
    place). Among several such the one with the highest gain is taken. A window whose own evidence never decided
    follows its side (correct or incorrect, all depths).

    A share ``explore`` of the rollouts goes to a teacher drawn from the others: so that what is learned from each of
    them goes on being seen in training. (The probes measure all teachers in any case.)

    It is an :class:`AlignmentGate` as well: a class whose teacher measurably harms weighs ``floor``, which by default
    is 1, so that it only routes.

    Args:
        explore: Share of rollouts, in [0, 1).
        seed: Of its own random stream, with which it explores.
        floor: As in :class:`AlignmentGate`; 0 also closes classes where the best teacher harms.
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
        self._stream = torch.Generator().manual_seed(seed)
        self._choice: dict[Class, str] = {}
        # Those that training has; the probes may measure more.
        self._names: tuple[str, ...] = ()

    def observe(self, report: ProbeReport) -> None:
        """Learn from a probe."""
        super().observe(report)
        for key in self.evidence.classes():  # sides come before their windows
            if (better := self._better(key)) is not None:
                self._choice[key] = better

    def teacher(self, key: Class) -> str | None:
        """The teacher of a class; None as long as nothing speaks against the first."""
        return self._choice.get(key, self._choice.get((key[0], WHOLE)))

    def route(self, tokens: Tokens) -> Tensor:
        """Which of ``tokens.teachers`` teaches each token, ``(N,)`` int64.

        Raises:
            ValueError: If no probe measures one of the teachers, or rewards are not known.
        """
        names = list(tokens.teachers)
        self._names = tokens.teachers
        for name in names:
            self._known(name)
        chosen = torch.zeros_like(tokens.rollout)
        for mask, key in of_tokens(tokens, self.evidence.windows):
            chosen[mask] = names.index(self.teacher(key) or names[0])
        if len(names) > 1 and self.explore > 0:
            rollouts = tokens.rollout.unique()
            lot = torch.rand(2, len(rollouts), generator=self._stream).to(rollouts.device)
            step = 1 + (lot[1] * (len(names) - 1)).long()  # from the chosen one to any other, all alike
            place = torch.searchsorted(rollouts, tokens.rollout)
            chosen = torch.where((lot[0] < self.explore)[place], (chosen + step[place]) % len(names), chosen)
        return chosen

    def _better(self, key: Class) -> str | None:
        """A teacher that helps a class measurably more than the one in place."""
        measured = self.evidence.teachers
        names = [name for name in self._names or measured if name in measured]
        now = self.teacher(key) or names[0]
        gains = {}
        for name in names:
            if name != now and self.evidence.difference(key, name, now, self.figure).low > 0:
                gains[name] = self.evidence.figure(key, name, self.figure).value
        return max(gains, key=lambda name: gains[name]) if gains else None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        choice = [(*key, name) for key, name in self._choice.items()]
        return {**super().state_dict(), "choice": choice, "stream": self._stream.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        super().load_state_dict(state)
        self._choice = {(c, w): name for c, w, name in state["choice"]}
        self._stream.set_state(state["stream"])
