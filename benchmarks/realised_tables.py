"""Tables of `realised.py`: predicted against realised, and dead reckoning against success.

Intervals are percentiles of 2,000 bootstrap samples. The questions that the prediction is from and the held-out
questions are resampled, each the same for all rows; the directions stay as they are, since they are what was stepped
along.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from odp_callbacks.records import Floats

SAMPLES = 2000
Line = dict[str, Any]


def report_tables(lines: Sequence[Line]) -> str:
    """The tables of every task, seed and size that is kept."""
    parts = []
    for key in dict.fromkeys(map(_identity, lines)):
        own = [line for line in lines if _identity(line) == key]
        task, seed, questions, rollouts, held_out, held_out_rollouts = key
        title = (
            f"{task}, seed {seed}: directions from {questions} questions with {rollouts} rollouts, success on "
            f"{held_out} other questions with {held_out_rollouts} rollouts"
        )
        parts.append("\n\n".join([title, *_steps(own), *_trainings(own)]))
    return "\n\n".join(parts)


def _identity(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("task", "seed", "questions", "rollouts", "held_out", "held_out_rollouts"))


def _cell(line: Line) -> tuple[str, str, str]:
    return line["context"], line["weighting"], line["geometry"]


class Comparison:
    """The steps of one task and seed, and their bootstrap samples.

    Attributes:
        steps: The lines of the steps, by geometry, length, weighting.
        gains: ``(C, N)``, predicted gain of each question that directions are from.
        slopes: ``(C, M)``, slope at each held-out question.
        realised: ``(C, M)``, change of its success per unit of length.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        predictions = {_cell(line): line for line in lines if line["kind"] == "predicted"}
        self.base = np.array(next(line["success"] for line in lines if line["kind"] == "base"))
        steps = [line for line in lines if line["kind"] == "step" and _cell(line) in predictions]
        self.steps = sorted(steps, key=lambda line: (line["geometry"] != "SGD", line["length"]))
        self.predictions = [predictions[_cell(line)] for line in self.steps]
        self.gains = np.array([line["gains"] for line in self.predictions], dtype=float)
        self.slopes = np.array([line["slopes"] for line in self.predictions], dtype=float)
        self.realised = np.array([(np.array(line["success"]) - self.base) / line["length"] for line in self.steps])
        generator = np.random.default_rng(0)
        self.training_samples = _resampled(generator, self.gains.shape[-1])
        self.held_out_samples = _resampled(generator, len(self.base))

    def rows(self) -> list[str]:
        rows = [
            "| geometry | step | tokens | context | predicted | held-out slope | realised | success after | length |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for place, (step, prediction) in enumerate(zip(self.steps, self.predictions, strict=True)):
            value, low, high = prediction["gain"]
            slope, realised = (
                _show(values[place].mean(), self.held_out_samples @ values[place])
                for values in (self.slopes, self.realised)
            )
            rows.append(
                f"| {step['geometry']} | {step['length']:g} | {step['weighting']} ({prediction['token_share']:.2f}) "
                f"| {step['context']} | {value:+.3f} ({low:+.3f} to {high:+.3f}) | {slope} | {realised} "
                f"| {np.mean(step['success']):.3f} | {step['tokens']:.1f} |"
            )
        return rows

    def agreement(self) -> list[str]:
        """Slope through the origin and rank correlation, over groups of steps."""
        rows = [
            "| steps | number | realised / predicted | rank correlation | realised / held-out slope | same |",
            "|---|---|---|---|---|---|",
        ]
        for title, chosen in self.groups():
            if chosen.sum() < 3:
                continue
            realised, slopes = self.realised[chosen], self.slopes[chosen]
            y = self.held_out_samples @ realised.T  # (S, C)
            cells = []
            for values, samples in ((self.gains[chosen], self.training_samples), (slopes, self.held_out_samples)):
                x = samples @ values.T
                for statistic in (_slope, _rank_correlation):
                    estimate = statistic(np.nanmean(values, axis=1)[None], realised.mean(axis=1)[None])[0]
                    cells.append(_show(estimate, statistic(x, y)))
            rows.append(f"| {title} | {int(chosen.sum())} | " + " | ".join(cells) + " |")
        return rows

    def groups(self) -> list[tuple[str, NDArray[np.bool_]]]:
        """Steps of one geometry and length: all of them, and those along everything."""
        groups = []
        for geometry, length in dict.fromkeys((step["geometry"], step["length"]) for step in self.steps):
            alike = np.array([(step["geometry"], step["length"]) == (geometry, length) for step in self.steps])
            whole = alike & np.array([step["weighting"] == "everything" for step in self.steps])
            groups.append((f"{geometry}, length {length:g}", alike))
            if (whole != alike).any():
                groups.append((f"{geometry}, length {length:g}, everything", whole))
        return groups

    def differences(self) -> list[str]:
        """Each weighting less everything, and incorrect less correct, for the same context and length."""
        place_of = {(*_cell(step), step["length"]): place for place, step in enumerate(self.steps)}
        rows = ["| context | difference | predicted | held-out slope | realised |", "|---|---|---|---|---|"]
        for (context, weighting, geometry, length), place in place_of.items():
            references = ["everything"] if weighting != "everything" else []
            references += ["correct rollouts"] if weighting == "incorrect rollouts" else []
            for reference in references:
                if (other := place_of.get((context, reference, geometry, length))) is None:
                    continue
                cells = [
                    _show((values[place] - values[other]).mean(), samples @ (values[place] - values[other]))
                    for values, samples in (
                        (self.gains, self.training_samples),
                        (self.slopes, self.held_out_samples),
                        (self.realised, self.held_out_samples),
                    )
                ]
                rows.append(f"| {context} | {weighting} - {reference} | " + " | ".join(cells) + " |")
        return rows


def _steps(lines: Sequence[Line]) -> list[str]:
    if not any(line["kind"] == "step" for line in lines):
        return ["no step was taken yet"]
    comparison = Comparison(lines)
    before = f"Success before: {_show(comparison.base.mean(), comparison.held_out_samples @ comparison.base)}."
    return [
        before,
        *("\n".join(part) for part in (comparison.rows(), comparison.agreement(), comparison.differences())),
    ]


def _trainings(lines: Sequence[Line]) -> list[str]:
    rows = [
        "| context | steps | distance | sum of step gains | success before | after | realised change |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if line["kind"] != "training" or not line["figures"]:
            continue
        figures, before, after = line["figures"][-1], np.array(line["before"]), np.array(line["after"]["success"])
        samples = _resampled(np.random.default_rng(0), len(before))
        reckoned = f"{figures['gain_sum']:+.3f}"
        if "gain_sum_low" in figures:
            reckoned += f" ({figures['gain_sum_low']:+.3f} to {figures['gain_sum_high']:+.3f})"
        change = _show((after - before).mean(), samples @ (after - before))
        rows.append(
            f"| {line['context']} | {line['steps']} | {line['after']['distance']:.2f} | {reckoned} "
            f"| {before.mean():.3f} | {after.mean():.3f} | {change} |"
        )
    return ["\n".join(rows)] if len(rows) > 2 else []


def _resampled(generator: np.random.Generator, count: int) -> Floats:
    """Weights of ``count`` questions in each bootstrap sample, ``(S, count)``; they sum to 1."""
    weights: Floats = generator.multinomial(count, np.full(count, 1 / count), size=SAMPLES) / count
    return weights


def _slope(x: Floats, y: Floats) -> Floats:
    """Of the line through the origin, for each row."""
    squares = (x * x).sum(axis=1)
    slope: Floats = np.divide((x * y).sum(axis=1), squares, out=np.full(len(x), np.nan), where=squares > 0)
    return slope


def _rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman's, for each row."""
    first, second = (stats.rankdata(values, axis=1) for values in (x, y))
    first, second = first - first.mean(axis=1, keepdims=True), second - second.mean(axis=1, keepdims=True)
    norms = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    correlation: Floats = np.divide(
        (first * second).sum(axis=1), norms, out=np.full(len(norms), np.nan), where=norms > 0
    )
    return correlation


def _show(value: float, samples: Floats) -> str:
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if np.isfinite(samples).any() else (np.nan, np.nan)
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
