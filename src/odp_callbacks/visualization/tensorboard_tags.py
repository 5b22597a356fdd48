"""Where TensorBoard shows each scalar: in which run, under which tag, and which cards can be pinned.

A teacher is a run beside the trainer's own, so that one chart holds all teachers, each in a colour of its own. The
group of cards that is called as the callback, ``odp``, holds the main figures only; everything else is in groups that
come after it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple
from urllib.parse import quote

from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT

DETAILS, HISTOGRAMS, PICTURES, TEXTS = " details", " histograms", " pictures", " texts"
"""How the names of the other groups go on. The space keeps them apart from the names of callbacks, which have none."""
REALISED = "reward change"
"""The run of the realised change of the reward, in the chart of the sum of the expected gains."""
PREFIXES = {"probe", "step", "training", "pooled", "adam"}
"""First parts of names that are followed by the figure; otherwise the first part is the figure."""
MAIN_FIGURES = {
    *(f"{gain}{split}" for gain in ("update_gain", "predicted_gain") for split in (
        "", "/correct", "/incorrect", f"/{INCORRECT_MINUS_CORRECT}"
    )),
    "pooled/update_gain", "training/update_gain", "adam/update_gain", "adam/predicted_gain",
    "gate", "gate/correct", "gate/incorrect", "step/gain", "step/gain_sum", "step/reward", "probe/success_rate",
}  # fmt: skip
"""Tags of the first group, without the name of the group."""
PINNED = ("{gain}", "step/gain", "step/gain_sum", "step/reward", "probe/success_rate")
"""Tags that are worth a place on top of all others, in this order."""
UNUSABLE = re.compile(r"[^\w .,+=()-]|^[ .]+|[ .]+$")
"""Characters of a teacher's name that a folder should not have."""


class Place(NamedTuple):
    """Where a scalar is shown.

    Attributes:
        run: Name of a run of its own; empty for the trainer's own run.
        tag: Tag of the scalar.
    """

    run: str
    tag: str


class ScalarPlaces:
    """Places the scalars of a callback.

    Args:
        teachers: Names of the teachers.
        root: How the names of all scalars begin: ``"odp"``, or ``"odp-<name>"`` of a callback with a name.

    Examples:
        >>> places = ScalarPlaces(["answer", "base"], "odp")
        >>> places.of("odp/update_gain/answer/all"), places.of("odp/update_gain_low/answer/correct")
        (Place(run='answer', tag='odp/update_gain'), Place(run='answer', tag='odp details/update_gain_low/correct'))
        >>> places.of("odp/update_gain/answer - base/all")
        Place(run='answer - base', tag='odp details/difference/update_gain')
        >>> places.of("odp/step/gain"), places.of("odp/probe/seconds")
        (Place(run='', tag='odp/step/gain'), Place(run='', tag='odp details/probe/seconds'))
    """

    def __init__(self, teachers: Sequence[str], root: str) -> None:
        self.root = root
        self.teachers = tuple(teachers)
        self.pairs = [f"{first} - {second}" for first, second in combinations(teachers, 2)]
        self.runs = run_names([*teachers, *self.pairs])

    def of(self, name: str) -> Place:
        """Place a scalar.

        Args:
            name: The name under which other loggers get it.
        """
        if not name.startswith(f"{self.root}/"):  # of a gate of the user's
            return Place("", name)
        parts = name.split("/")[1:]
        if parts == ["step", "reward_change"]:
            return Place(REALISED, f"{self.root}/step/gain_sum")
        position = self._teacher_position(parts)
        teacher = "" if position is None else parts.pop(position)
        figure = "/".join(parts[:-1] if parts[-1] == "all" and len(parts) > 1 else parts)
        if teacher in self.pairs and teacher not in self.teachers:
            figure = f"difference/{figure}"
        group = self.root if figure in MAIN_FIGURES else self.root + DETAILS
        return Place(self.runs.get(teacher, ""), f"{group}/{figure}")

    def by_run(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Sort scalars by runs, under their tags; the empty name stands for the trainer's own run.

        Args:
            metrics: Scalars by name.
        """
        runs: dict[str, dict[str, float]] = {"": {}}
        for name, value in metrics.items():
            place = self.of(name)
            runs.setdefault(place.run, {})[place.tag] = value
        return runs

    def _teacher_position(self, parts: Sequence[str]) -> int | None:
        """Which part of a name is a teacher or a pair of teachers: the one after the figure; None if there is none."""
        position = 2 if parts[0] in PREFIXES else 1
        return position if len(parts) > position and parts[position] in self.runs else None


def run_names(names: Iterable[str]) -> dict[str, str]:
    """Folder names for runs, which differ from each other.

    Args:
        names: Names of teachers; they hold no ``"/"``.

    Examples:
        >>> run_names(["answer", "a:b", "a?b", ".."])
        {'answer': 'answer', 'a:b': 'a_b', 'a?b': 'a_b 2', '..': '_'}
    """
    runs: dict[str, str] = {}
    for name in dict.fromkeys(names):
        usable = UNUSABLE.sub("_", name) or "_"
        number, taken = 1, set(runs.values())
        while (run := usable if number == 1 else f"{usable} {number}") in taken:
            number += 1
        runs[name] = run
    return runs


def pinned_cards(root: str, gain: str = "update_gain", tags: Sequence[str] = PINNED) -> str:
    """The end of an address of TensorBoard that pins the main cards on top of its first tab.

    Args:
        root: How the names of all scalars begin.
        gain: The figure that teachers are judged by.
        tags: What is pinned, in this order; ``{gain}`` stands for that figure.

    Examples:
        >>> pinned_cards("odp")[:52]
        '/?pinnedCards=%5B%7B%22plugin%22%3A%22scalars%22%2C%'
    """
    cards = [{"plugin": "scalars", "tag": f"{root}/{tag.format(gain=gain)}"} for tag in tags]
    return f"/?pinnedCards={quote(json.dumps(cards, separators=(',', ':')), safe='')}#timeseries"


def interval_tags(tag: str, root: str) -> tuple[str, str]:
    """Tags of the ends of a figure's interval.

    Args:
        tag: Of the figure, in the first group.
        root: How the names of all scalars begin.

    Examples:
        >>> interval_tags("odp/update_gain/correct", "odp")
        ('odp details/update_gain_low/correct', 'odp details/update_gain_high/correct')
        >>> interval_tags("odp/pooled/update_gain", "odp")[0], interval_tags("odp/probe/success_rate", "odp")[0]
        ('odp details/pooled/update_gain_low', 'odp details/probe/success_rate_low')
    """
    parts = tag.removeprefix(f"{root}/").split("/")
    position = 1 if parts[0] in PREFIXES else 0
    low, high = (
        "/".join([*parts[:position], f"{parts[position]}_{end}", *parts[position + 1 :]]) for end in ("low", "high")
    )
    return f"{root}{DETAILS}/{low}", f"{root}{DETAILS}/{high}"
