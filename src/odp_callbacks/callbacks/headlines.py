"""The few figures of the probes that stand in Lightning's ``callback_metrics``, where other callbacks read them.

One rule holds before, during and after: each name stands for the last number that a probe of this training determined.
A figure that a probe withheld, or a probe that failed, changes nothing. As long as there is no number, a figure that
something in the trainer monitors stands for the worst number, from the start of the training on; any other is NaN from
the first probe on.
"""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from itertools import accumulate
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.analysis.summaries import SPLITS

HEADLINE_FIGURES = ("predicted_gain", "alignment", "update_gain", "training/update_gain")
OF_STEPS = ("gain", "gain_sum", "reward", "reward_change")
OF_PROBES = ("success_rate", "nodes", "seconds", "time_share", "left_out")
MOST_BYTES = 32 * 1024
"""About how much the headlines may take: Lightning's launchers hand them over through a pipe of twice that size. With
many teachers, the figures on correct and on incorrect rollouts are left out."""
BYTES_FOR_EACH = 64
"""About what a figure takes beside its name."""
WORST = 1e9
"""Stands for a monitored figure that no probe has determined yet, with the sign of the worse direction. It is finite,
because ``EarlyStopping`` stops at anything else."""
LATER_FIGURES = ("training/", "step/", "adam/", "gate/")
"""Figures that the first probe need not have."""


class Headlines:
    """The last number of every headline figure in a training.

    Args:
        teachers: Names of the teachers.
        root: How the names of all figures begin: ``"odp"``, or ``"odp-<name>"`` of a callback with a name.

    Attributes:
        values: The last number of each figure by its name.
        without_number: Names of figures that the probes have had, but never with a number.

    Examples:
        >>> headlines = Headlines(["base"], "odp")
        >>> headlines.update({"odp/alignment/base/all": 0.5, "odp/alignment/base/correct": float("nan")})
        >>> headlines.update({"odp/alignment/base/all": float("nan"), "odp/reverse_kl/base/all": 0.1})
        >>> headlines.values
        {'odp/alignment/base/all': 0.5}
        >>> headlines.shown({"odp/alignment/base/correct": -1e9})["odp/alignment/base/correct"].item()
        -1000000000.0
    """

    def __init__(self, teachers: Collection[str], root: str) -> None:
        of_teachers = [
            f"{figure}/{teacher}/{split}" for split in SPLITS for figure in HEADLINE_FIGURES for teacher in teachers
        ]
        names = [f"{root}/probe/{name}" for name in OF_PROBES] + [f"{root}/step/{name}" for name in OF_STEPS]
        names += [f"{root}/{name}" for name in of_teachers]
        sizes = accumulate(len(name) + BYTES_FOR_EACH for name in names)
        self.root = root
        self.names = {name for name, size in zip(names, sizes, strict=True) if size <= MOST_BYTES}
        self.values: dict[str, float] = {}
        self.without_number: set[str] = set()

    def clear(self) -> None:
        """Forget all figures: another training has started."""
        self.values, self.without_number = {}, set()

    def update(self, metrics: Mapping[str, float], monitored: Collection[str] = ()) -> None:
        """Take the numbers of a probe.

        Args:
            metrics: What the probe logs.
            monitored: Names of further figures that are wanted.
        """
        wanted = {name: value for name, value in metrics.items() if name in self.names or name in monitored}
        self.values |= {name: value for name, value in wanted.items() if isfinite(value)}
        self.without_number = (self.without_number | wanted.keys()) - self.values.keys()

    def shown(self, worst_values: Mapping[str, float]) -> dict[str, Tensor]:
        """The figures as tensors; they share one storage, so that little has to be sent to another process.

        Args:
            worst_values: What stands for each monitored figure that has no number yet.
        """
        values = {**dict.fromkeys(sorted(self.without_number), float("nan")), **worst_values, **self.values}
        return dict(zip(values, torch.tensor(list(values.values())).unbind(), strict=True)) if values else {}

    def restore(self, values: object) -> None:
        """Continue with the numbers of a checkpoint; what is no number there is left out."""
        saved = values if isinstance(values, Mapping) else {}
        self.values = {
            str(name): value for name, value in saved.items() if isinstance(value, float) and isfinite(value)
        }

    def unknown(self, monitored: Iterable[str], metrics: Mapping[str, float]) -> str:
        """A sentence about a figure that is monitored but that the probes do not have; empty if there is none."""
        later = tuple(f"{self.root}/{name}" for name in LATER_FIGURES)
        for name in monitored:
            if name not in metrics and not name.startswith(later):
                closest = get_close_matches(name, metrics, n=1)
                suggestion = f"; did you mean {closest[0]!r}?" if closest else "."
                return f"{name!r} is monitored in this trainer, but the probes have no such figure{suggestion}"
        return ""


def monitored_figures(trainer: Any, root: str) -> dict[str, float]:
    """The figures that something in a trainer monitors, with what stands for each before its first number.

    Args:
        trainer: A Lightning trainer. Its callbacks and learning rate schedulers are looked at.
        root: How the names of the figures begin.
    """
    watchers = [(getattr(callback, "monitor", None), callback) for callback in trainer.callbacks]
    watchers += [(config.monitor, config.scheduler) for config in trainer.lr_scheduler_configs]
    worst_values: dict[str, float] = {}
    for name, watcher in watchers:
        if isinstance(name, str) and name.startswith(f"{root}/"):
            limit = getattr(watcher, "divergence_threshold", None)  # beyond it, EarlyStopping stops
            worst = WORST if getattr(watcher, "mode", "max") == "min" else -WORST
            worst_values.setdefault(name, worst if limit is None else float(limit))
    return worst_values
