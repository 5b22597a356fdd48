"""Which scalars the loggers get: by default the few that answer what users ask, and all of them on request."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias

from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT

ROOT = "odp"
"""How the names of all scalars begin."""
LogOption: TypeAlias = Literal["main", "all"] | Sequence[str]
"""``"main"``, ``"all"``, or beginnings of the names of scalars that are logged besides the main ones."""
ENDS = ("", "_low", "_high")
"""An estimate and the ends of its interval."""
OF_STEPS = ("gain", "gain_sum", "gain_sum_low", "gain_sum_high", "reward")
OF_PROBES = ("success_rate", "time_share")
GATE_CLASSES = ("correct", "incorrect")
GATE_WINDOWS = " depth "
"""Stands in the name of a gate's class of tokens if that is a window of depths; a gate can have sixty of them."""


def check_log(log: object) -> LogOption:
    """Return the option ``log`` if it can be used.

    Args:
        log: ``"main"``, ``"all"``, or a list of the beginnings of names, such as ``["alignment", "probe/seconds"]``.

    Raises:
        ValueError: If it is something else.

    Examples:
        >>> check_log(["alignment"])
        ('alignment',)
    """
    if log == "main" or log == "all":
        return log
    if isinstance(log, Sequence) and not isinstance(log, str) and all(isinstance(name, str) and name for name in log):
        return tuple(name.removeprefix(f"{ROOT}/") for name in log)
    raise ValueError(
        "`log` must be 'main', 'all', or a list of figures to log besides the main ones, such as ['alignment'], but "
        f"{log!r} was given."
    )


@dataclass(frozen=True)
class ScalarSelection:
    """Decides which of the scalars are logged.

    Attributes:
        teachers: Names of the teachers.
        log: As in :func:`check_log`.
        gain: The figure that teachers are judged by: ``"update_gain"``, or ``"predicted_gain"`` where no update is
            measured.
        geometry: Name of the second geometry.

    Examples:
        >>> selection = ScalarSelection(("answer", "base"))
        >>> selection.numbers({"odp/update_gain/base/all": 0.5, "odp/alignment/base/all": 0.1})
        {'odp/update_gain/base/all': 0.5}
        >>> ScalarSelection(("base",), log=("alignment",)).numbers({"odp/alignment_low/base/all": 0.1})
        {'odp/alignment_low/base/all': 0.1}
        >>> selection.numbers({"odp/update_gain/base/all": float("nan")})
        {}
    """

    teachers: tuple[str, ...]
    log: LogOption = "main"
    gain: str = "update_gain"
    geometry: str = "adam"

    def columns(
        self, *, steps: bool = True, training: bool = False, geometry: bool = False, gate: bool = False
    ) -> list[str]:
        """The main scalars of a training, in the order in which they should be read.

        Args:
            steps: Whether the training's steps are followed.
            training: Whether the update of the training's own rollouts is measured.
            geometry: Whether there is a second geometry.
            gate: Whether a gate logs the weights of correct and of incorrect rollouts.
        """
        of_teachers = [
            *(f"{self.gain}{end}/{{}}/all" for end in ENDS),
            *(f"{self.gain}/{{}}/{split}" for split in GATE_CLASSES),
            *(f"{self.gain}{end}/{{}}/{INCORRECT_MINUS_CORRECT}" for end in ENDS),
        ]
        if self.gain == "update_gain":
            of_teachers += [f"pooled/update_gain{end}/{{}}/all" for end in ENDS]
        if training:
            of_teachers += [f"training/update_gain{end}/{{}}/all" for end in ENDS]
        if geometry:
            of_teachers += [f"{self.geometry}/{self.gain}{end}/{{}}/all" for end in ENDS]
        if gate:
            of_teachers += [f"gate/{{}}/{name}" for name in GATE_CLASSES]
        names = [name.format(teacher) for name in of_teachers for teacher in self.teachers]
        names += [f"step/{name}" for name in OF_STEPS] if steps else []
        names += ["training/success_rate"] if training else []
        return [f"{ROOT}/{name}" for name in [*names, *(f"probe/{name}" for name in OF_PROBES)]]

    def drawn(self) -> list[str]:
        """Scalars that TensorBoard draws in the charts of the main ones: what was realised, and further intervals."""
        ends = [f"{self.gain}_{end}" for end in ("low", "high")]
        of_classes = [f"{end}/{teacher}/{name}" for end in ends for teacher in self.teachers for name in GATE_CLASSES]
        names = ["step/reward_change", "probe/success_rate_low", "probe/success_rate_high", *of_classes]
        return [f"{ROOT}/{name}" for name in names]

    def selected(self, metrics: Mapping[str, float], besides: Collection[str] = ()) -> dict[str, float]:
        """The scalars that are logged, also those that are NaN.

        Args:
            metrics: All scalars by their names.
            besides: Names of further ones that are wanted.
        """
        if self.log == "all":
            return dict(metrics)
        names = {*self.columns(training=True, geometry=True), *besides}
        beginnings = tuple(f"{ROOT}/{name}" for name in self.log) if self.log != "main" else ()
        return {
            name: value
            for name, value in metrics.items()
            if name in names or (beginnings and name.startswith(beginnings)) or _is_of_gate(name)
        }

    def numbers(self, metrics: Mapping[str, float], besides: Collection[str] = ()) -> dict[str, float]:
        """The scalars that are logged and have a number: what is undefined is not logged.

        Args:
            metrics: All scalars by their names.
            besides: Names of further ones that are wanted.
        """
        return {name: value for name, value in self.selected(metrics, besides).items() if isfinite(value)}

    def without_match(self, names: Iterable[str]) -> list[str]:
        """The beginnings in ``log`` with which no scalar's name begins.

        Args:
            names: Of all scalars.
        """
        known = list(names)
        beginnings = () if isinstance(self.log, str) else self.log
        return [one for one in beginnings if not any(name.startswith(f"{ROOT}/{one}") for name in known)]


def _is_of_gate(name: str) -> bool:
    """Whether a gate of a user's chose this name, or it is the weight of a class without a window of depths."""
    first, _, rest = name.partition("/")
    return first != ROOT or (rest.startswith("gate/") and GATE_WINDOWS not in rest)
