"""The findings of arXiv:2605.10889, each with the contrast that tests it and the range that it claims for it.

A finding holds if the interval of its contrast lies in the claimed range, and does not hold if the interval lies
outside of it. Otherwise the data cannot tell. A finding is tested in the paper's protocol and, where they ask the same
question, by update gain and by our figures at nodes: these are other quantities, so they say whether the finding is
about distillation or about the score.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from odp_callbacks.analysis.study.figures import (
    ALL_TEACHERS,
    GAP,
    UNBIASED,
    CellSummary,
    StudyFigure,
    combination,
    is_control,
    mean_figure,
)

MEASUREMENTS = ("paper", "update", "nodes", "accuracy")
"""In the paper's protocol, by update gain, by our figures at nodes, by the teacher's own responses."""
Contrast = Callable[[CellSummary], StudyFigure | None]
"""The figure of a cell that a finding is about; None if the cell lacks a part of it."""
OURS = "ours"
"""The source of a question that the paper does not ask, but that belongs beside its finding."""
ABOVE_0, BELOW_0 = (0.0, float("inf")), (float("-inf"), 0.0)


@dataclass(frozen=True)
class Finding:
    """A finding of the paper.

    Attributes:
        id: A short name.
        sentence: What the paper finds.
        source: Where in the paper: its table of ``classes`` (correct and incorrect paths), ``teachers``,
            ``correlations`` or the ``oracle filter``, or a table by its number.
        published: The paper's figures, as text.
        claim: The open range in which the contrast lies, if the finding holds. Where the paper gives no bound, a round
            one is ours, and the sentence says it.
        contrasts: The contrast by measurement, one of :data:`MEASUREMENTS`.
    """

    id: str
    sentence: str
    source: str
    published: str
    claim: tuple[float, float]
    contrasts: Mapping[str, Contrast]


def figure(name: str, teacher: str = ALL_TEACHERS, paths: str = "all") -> Contrast:
    """A figure as it is.

    Args:
        name: Name of the figure.
        teacher: Name of the teacher, in the study's or in another case.
        paths: Class of the paths.
    """
    return lambda cell: _find(cell, name, teacher, paths)


def difference(name: str, first: str, second: str, paths: str = "all") -> Contrast:
    """A figure of one teacher minus that of another.

    Args:
        name: Name of the figure.
        first: Name of the first teacher.
        second: Name of the second one.
        paths: Class of the paths.
    """

    def contrast(cell: CellSummary) -> StudyFigure | None:
        figures = [_find(cell, name, teacher, paths) for teacher in (first, second)]
        minuend, subtrahend = figures
        if minuend is None or subtrahend is None:
            return None
        return combination([(1.0, minuend), (-1.0, subtrahend)])

    return contrast


def above_control(name: str, paths: str = "all") -> Contrast:
    """A figure of the mean over teachers minus that of the controls.

    Args:
        name: Name of the figure.
        paths: Class of the paths.
    """

    def contrast(cell: CellSummary) -> StudyFigure | None:
        of_teachers = _find(cell, name, ALL_TEACHERS, paths)
        controls = [_find(cell, name, teacher, paths) for teacher in cell.teachers if is_control(teacher)]
        control = mean_figure([one for one in controls if one is not None])
        return None if of_teachers is None or control is None else combination([(1.0, of_teachers), (-1.0, control)])

    return contrast


def _find(cell: CellSummary, name: str, teacher: str, paths: str) -> StudyFigure | None:
    for key, of_cell in cell.figures.items():
        if (key.figure, key.paths, key.teacher.lower()) == (name, paths, teacher.lower()):
            return of_cell
    return None


def _of_teachers(first: str, second: str) -> dict[str, Contrast]:
    return {
        "paper": difference("cosine", first, second),
        "update": difference("update_gain", first, second),
        "nodes": difference("predicted_gain", first, second),
    }


def _of_predictor(paper: str, nodes: str = "") -> dict[str, Contrast]:
    contrasts = {"paper": figure(f"correlation {paper}")}
    return contrasts | ({"nodes": figure(f"correlation {nodes}")} if nodes else {})


FINDINGS = (
    Finding(
        "incorrect-above-correct",
        "The mean cosine is higher on incorrect than on correct paths.",
        "classes",
        "+.033, +.057, +.039; +.016 (p = .123)",
        ABOVE_0,
        {
            "paper": figure("cosine", paths=GAP),
            "update": figure("update_gain", paths=GAP),
            "nodes": figure("predicted_gain", paths=GAP),
        },
    ),
    Finding(
        "weighted-incorrect-above-correct",
        "So is the SR-weighted cosine.",
        "classes",
        "+.064, +.083, +.097, +.064",
        ABOVE_0,
        {"paper": figure("weighted_cosine", paths=GAP)},
    ),
    Finding(
        "advantage-incorrect-above-correct",
        "So is the teacher advantage.",
        "classes",
        "+.006, +.013, +.003, +.009",
        ABOVE_0,
        {"paper": figure("advantage", paths=GAP), "nodes": figure("teacher_advantage", paths=GAP)},
    ),
    Finding(
        "positive-incorrect-above-correct",
        "So is the fraction of positive cosines.",
        "Table 3",
        "half of the cosine's difference",
        ABOVE_0,
        {"paper": figure("positive", paths=GAP)},
    ),
    Finding(
        "incorrect-above-correct-unbiased",
        "(ours) The first with both biases of the protocol taken out.",
        OURS,
        "-",
        ABOVE_0,
        {"paper": figure(UNBIASED, paths=GAP)},
    ),
    Finding(
        "incorrect-above-correct-beyond-control",
        "(ours) The first's difference is larger than that of a control.",
        OURS,
        "-",
        ABOVE_0,
        {"paper": above_control("cosine", GAP), "update": above_control("update_gain", GAP)},
    ),
    Finding(
        "aligned",
        "Teachers are aligned on average: the mean cosine is positive.",
        "teachers",
        ".000 to +.053",
        ABOVE_0,
        {
            "paper": figure("cosine"),
            "update": figure("update_gain"),
            "nodes": figure("predicted_gain"),
        },
    ),
    Finding(
        "weakly-aligned",
        "The alignment is weak: the mean cosine lies between -0.1 and 0.1 (our bound).",
        "teachers",
        ".000 to +.053",
        (-0.1, 0.1),
        {"paper": figure("cosine"), "nodes": figure("alignment")},
    ),
    Finding(
        "wrong-response-lowers",
        "A wrong response beside the correct one lowers it: Self-1C is above Self-1C1W.",
        "teachers",
        "+.028, +.013, +.026, +.001",
        ABOVE_0,
        _of_teachers("Self-1C", "Self-1C1W"),
    ),
    Finding(
        "wrong-response-lowers-summary",
        "So does one beside a summary: Self-Sum-1C is above Self-Sum-1C1W.",
        "teachers",
        "+.025, +.010, +.042, +.002",
        ABOVE_0,
        _of_teachers("Self-Sum-1C", "Self-Sum-1C1W"),
    ),
    Finding(
        "summary-above-demonstration",
        "A summary is above the demonstration itself (in three of the paper's four).",
        "teachers",
        "-.006, +.007, +.022, +.026",
        ABOVE_0,
        _of_teachers("Self-Sum-1C", "Self-1C"),
    ),
    Finding(
        "depth-correlation",
        "Within a path, the cosine grows with depth (Spearman).",
        "correlations",
        "+.042; ≤ a third",
        ABOVE_0,
        _of_predictor("depth", "depth"),
    ),
    Finding(
        "kl-correlation",
        "It grows with KL(student‖teacher), the paper's forward KL.",
        "correlations",
        "+.029; ≤ a third",
        ABOVE_0,
        _of_predictor("kl", "reverse_kl"),
    ),
    Finding(
        "js-correlation",
        "It grows with the JS divergence.",
        "correlations",
        "+.030; ≤ a third",
        ABOVE_0,
        _of_predictor("js", "js"),
    ),
    Finding(
        "l2-correlation",
        "It grows with the L2 distance of the policies.",
        "correlations",
        "+.031; ≤ a third",
        ABOVE_0,
        _of_predictor("l2"),
    ),
    Finding(
        "policy-cosine-correlation",
        "It falls with the cosine of the two policies.",
        "correlations",
        "-.029; ≤ a third",
        BELOW_0,
        _of_predictor("policy_cosine", "cosine"),
    ),
    Finding(
        "half-positive",
        "About half of the tokens have a positive cosine: 0.45 to 0.6 (our bounds).",
        "oracle filter",
        ".52",
        (0.45, 0.6),
        {"paper": figure("filter kept")},
    ),
    Finding(
        "score-is-a-sign",
        "The score of a node is nearly ±1: its standard deviation is above 0.8 (our bound).",
        "Table 3",
        ".83 to .91",
        (0.8, float("inf")),
        {"paper": figure("cosine spread")},
    ),
    Finding(
        "demonstration-helps-teacher",
        "With its demonstration, Self-1C answers better than the student.",
        "Tables 8 and 9",
        "78.5 % to 98.5 %",
        ABOVE_0,
        {"accuracy": difference("accuracy", "Self-1C", "student")},
    ),
    Finding(
        "wrong-response-hurts-teacher",
        "A wrong response takes that away: Self-1C answers better than Self-1C1W.",
        "Tables 8 and 9",
        "98.5 % against 77.6 %",
        ABOVE_0,
        {"accuracy": difference("accuracy", "Self-1C", "Self-1C1W")},
    ),
)
"""Findings with a single contrast; that no context is best everywhere is
:mod:`~odp_callbacks.analysis.study.best_context`'s."""
