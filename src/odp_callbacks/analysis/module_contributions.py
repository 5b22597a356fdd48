"""What each LoRA module, each kind of module and each layer contributes to the gain of an update."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate, jackknife
from odp_callbacks.analysis.module_names import module_positions, short_kinds
from odp_callbacks.analysis.update_gain import module_contribution
from odp_callbacks.records import Floats, ProbeReport


@dataclass(frozen=True)
class ModuleContribution:
    """What some LoRA modules contribute to the updates of ``K`` teachers.

    Attributes:
        split: ``"layer 3"``, ``"module q_proj"`` for a kind of module in all layers, or a module's full name.
        estimates: ``K`` contributions, each with its interval.
    """

    split: str
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class ModuleContributions:
    """Contributions by layer, by kind of module and by single module; each of the three adds up to the update's.

    Attributes:
        layers: By layer, in the order of their numbers; modules outside of all layers are ``"no layer"``.
        kinds: By kind of module.
        modules: By module, in the order of the model.
    """

    layers: tuple[ModuleContribution, ...]
    kinds: tuple[ModuleContribution, ...]
    modules: tuple[ModuleContribution, ...]

    @property
    def have_numbers(self) -> bool:
        """Whether any contribution exists."""
        return any(np.isfinite(estimate.value) for part in self.modules for estimate in part.estimates)

    def __iter__(self) -> Iterator[ModuleContribution]:
        yield from (*self.layers, *self.kinds, *self.modules)


def module_contributions(report: ProbeReport, confidence: float = 0.95) -> ModuleContributions | None:
    """Contributions of modules; None if no measurement of the report has them, or if they are of different modules.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
    """
    grams = [update.gram for update in report.updates]
    names = {None if gram.modules is None else gram.modules.names for gram in grams}
    modules = names.pop() if len(names) == 1 else None
    if modules is None:
        return None

    def contribution(split: str, chosen: Floats) -> ModuleContribution:
        teachers = range(len(report.teachers))
        estimators = [module_contribution(grams, teacher, chosen) for teacher in teachers]
        return ModuleContribution(split, tuple(jackknife(estimator, confidence) for estimator in estimators))

    positions = list(module_positions(modules).values())
    layer_of, kind_of = (np.array([position[place] for position in positions]) for place in (0, 1))
    kinds = list(dict.fromkeys(kind_of.tolist()))
    shown = short_kinds(kinds)
    return ModuleContributions(
        tuple(
            contribution("no layer" if layer < 0 else f"layer {layer}", (layer_of == layer).astype(float))
            for layer in sorted(set(layer_of.tolist()))
        ),
        tuple(contribution(f"module {shown[kind]}", (kind_of == kind).astype(float)) for kind in kinds),
        tuple(contribution(name, row) for name, row in zip(modules, np.eye(len(modules)), strict=True)),
    )
