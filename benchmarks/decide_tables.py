"""Tables of `decide.py`: when each context and pair was decided, by either method."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

UPDATE, PROBES = "update gain", "probes"
FIGURES = {UPDATE: "update_gain", PROBES: "predicted_gain"}
Line = dict[str, Any]


def kept_lines(results_file: Path) -> list[Line]:
    return [json.loads(line) for line in results_file.read_text().splitlines()] if results_file.exists() else []


def side(gain: list[float]) -> int:
    """1 for an interval above 0, -1 for one below, 0 where it does not decide or there is none."""
    return int(gain[1] > 0) - int(gain[2] < 0)


def decided_line(lines: list[Line], name: str) -> Line | None:
    """The first line from which on the interval lies on the same side of 0 in all."""
    first = None
    for line in sorted(lines, key=lambda one: one["questions"], reverse=True):
        if not side(line["gains"][name]) or (first and side(line["gains"][name]) != side(first["gains"][name])):
            break
        first = line
    return first


def relative_width(line: Line, name: str) -> float:
    value, low, high = line["gains"][name]
    return (high - low) / 2 / abs(value) if value else float("nan")


def table(lines: list[Line]) -> str:
    """When each context and pair was decided, for one task and seed."""
    of_method = {
        method: sorted((line for line in lines if line["method"] == method), key=lambda line: line["questions"])
        for method in FIGURES
    }
    if not all(of_method.values()):
        return "one of the methods has not measured yet"
    last = {method: measured[-1] for method, measured in of_method.items()}
    common = min(line["seconds"] for line in last.values())
    at_equal = {
        method: max(
            (line for line in measured if line["seconds"] <= common),
            default=measured[0],
            key=lambda one: one["seconds"],
        )
        for method, measured in of_method.items()
    }
    contexts = [name.removesuffix("/incorrect-correct") for name in last[UPDATE]["gains"] if "incorrect-c" in name]
    names = [*contexts, *(f"{first} - {second}" for first, second in combinations(contexts, 2))]
    rows = [
        f"{describe(last[UPDATE])}; {describe(last[PROBES])}.",
        "",
        "| context or pair | update gain, all questions | predicted gain, all questions | update gain decides after "
        "| probes decide after | ratio | half-width / estimate, update gain | same, probes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (f"{name}/all" for name in names):
        decided = {method: decided_line(measured, name) for method, measured in of_method.items()}
        cells = [show(last[method]["gains"][name]) for method in FIGURES]
        cells += [when(decided[method]) for method in FIGURES]
        cells.append(ratio(decided[UPDATE], decided[PROBES], last[PROBES]))
        cells += [f"{relative_width(at_equal[method], name):.2f}" for method in FIGURES]
        rows.append(f"| {name.removesuffix('/all')} | " + " | ".join(cells) + " |")
    counts = {
        method: sum(decided_line(of_method[method], f"{name}/all") is not None for name in names) for method in FIGURES
    }
    widths = {
        method: geometric_mean([relative_width(at_equal[method], f"{name}/all") for name in names])
        for method in FIGURES
    }
    ours, theirs = at_equal[UPDATE], at_equal[PROBES]
    rows += [
        "",
        f"Decided at the end: {counts[UPDATE]} of {len(names)} by update gain, {counts[PROBES]} by probes. Both last "
        f"columns are of at most {common:.0f} s: {ours['questions']} questions in {ours['seconds']:.0f} s and "
        f"{theirs['questions']} in {theirs['seconds']:.0f} s; geometric means {widths[UPDATE]:.2f} and "
        f"{widths[PROBES]:.2f}.",
    ]
    return "\n".join(rows)


def describe(line: Line) -> str:
    return f"{line['method']}: {line['questions']} questions in {line['seconds']:.0f} s (success {line['success']:.2f})"


def when(line: Line | None) -> str:
    return "never" if line is None else f"{line['seconds']:.0f} s ({line['questions']})"


def ratio(sooner: Line | None, later: Line | None, end_of_later: Line) -> str:
    """How many times sooner the first decides; if the second never does, at least as much as its whole run says."""
    if sooner is None:
        return "" if later is None else "never sooner"
    if later is None:
        return f"> {end_of_later['seconds'] / sooner['seconds']:.1f}"
    return f"{later['seconds'] / sooner['seconds']:.1f}"


def geometric_mean(values: list[float]) -> float:
    finite = [math.log(value) for value in values if math.isfinite(value) and value > 0]
    return math.exp(sum(finite) / len(finite)) if finite else float("nan")


def show(gain: list[float]) -> str:
    value, low, high = gain
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def report_tables(results_file: Path) -> str:
    """The tables of every task, seed and block size that is kept."""
    lines = kept_lines(results_file)
    keys = list(dict.fromkeys((line["task"], line["seed"], line["block"]) for line in lines))
    parts = []
    for key in keys:
        own = [line for line in lines if (line["task"], line["seed"], line["block"]) == key]
        parts.append(f"{key[0]}, seed {key[1]}, blocks of {key[2]} questions\n\n{table(own)}")
    return "\n\n".join(parts)
