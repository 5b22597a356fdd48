"""How much of the policies of served teachers came back in a probe: missing mass, and tokens that were not measured."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from odp_callbacks.records import ProbeReport

COVERAGE_SETTING = "teacher_coverage"
"""Entry of a report's settings: for each served teacher by name, its coverage."""


@dataclass(frozen=True)
class Coverage:
    """How much of a teacher's policy came back at the tokens of responses.

    Attributes:
        tokens: Response tokens that were asked about.
        unaligned_tokens: Those of them that were not measured, because the teacher's tokenizer has no single token for
            them.
        missing_mass: Mean probability of what did not come back, over the others; NaN without any.
        largest_missing_mass: The largest of these; NaN without any.

    Examples:
        >>> Coverage().with_response(3, [0.25, 0.75])
        Coverage(tokens=3, unaligned_tokens=1, missing_mass=0.5, largest_missing_mass=0.75)
    """

    tokens: int = 0
    unaligned_tokens: int = 0
    missing_mass: float = math.nan
    largest_missing_mass: float = math.nan

    @property
    def unaligned_share(self) -> float:
        """Share of the tokens that were not measured; NaN without any."""
        return self.unaligned_tokens / self.tokens if self.tokens else math.nan

    def with_response(self, tokens: int, missing: Sequence[float]) -> "Coverage":
        """This and a response of so many tokens, with the missing mass at those that were measured."""
        if not missing:
            return joined([self, Coverage(tokens, tokens)])
        return joined([self, Coverage(tokens, tokens - len(missing), sum(missing) / len(missing), max(missing))])

    def as_setting(self) -> dict[str, float | None]:
        """The figures as JSON values; None for NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def joined(parts: Iterable[Coverage]) -> Coverage:
    """The coverage of all tokens of several parts together."""
    parts = list(parts)
    measured = [part for part in parts if part.tokens > part.unaligned_tokens]
    counts = [part.tokens - part.unaligned_tokens for part in measured]
    total = sum(part.missing_mass * count for part, count in zip(measured, counts, strict=True))
    return Coverage(
        sum(part.tokens for part in parts),
        sum(part.unaligned_tokens for part in parts),
        total / sum(counts) if measured else math.nan,
        max((part.largest_missing_mass for part in measured), default=math.nan),
    )


def teacher_coverage(report: ProbeReport) -> dict[str, Coverage]:
    """The coverage of each served teacher of a report, by name; empty without any.

    Examples:
        >>> settings = {"teacher_coverage": {"large": Coverage(8, 2, 0.01, 0.2).as_setting()}}
        >>> teacher_coverage(ProbeReport(("large",), (), (), (), {}, 0, 0, {}, settings))["large"].unaligned_share
        0.25
    """
    recorded: dict[str, dict[str, Any]] = report.settings.get(COVERAGE_SETTING) or {}
    return {
        name: Coverage(
            entry["tokens"],
            entry["unaligned_tokens"],
            *(math.nan if entry[mass] is None else entry[mass] for mass in ("missing_mass", "largest_missing_mass")),
        )
        for name, entry in recorded.items()
    }


def joined_setting(reports: Sequence[ProbeReport]) -> dict[str, dict[str, float | None]]:
    """The entry of the settings of several reports together."""
    by_report = [teacher_coverage(report) for report in reports]
    names = dict.fromkeys(name for coverage in by_report for name in coverage)
    return {name: joined(coverage[name] for coverage in by_report if name in coverage).as_setting() for name in names}
