"""The page of a study: verdicts, tables and pictures, made of the summaries alone."""

from collections.abc import Sequence
from pathlib import Path

from odp_callbacks.analysis.study.figures import CellSummary
from odp_callbacks.analysis.study.verdicts import CANNOT_TELL, DOES_NOT_HOLD, HOLDS, Verdict, study_verdicts
from odp_callbacks.cli.study.pictures import gap_picture, where_picture
from odp_callbacks.cli.study.tables import (
    cells_table,
    classes_table,
    cost_table,
    filter_table,
    findings_table,
    has,
    teachers_table,
    verdict_counts,
)
from odp_callbacks.files import write_atomically

IMAGES = "images"
CAPTIONS = {
    "gaps": "Incorrect minus correct, of every teacher in every cell.",
    "where": "Mean cosine by difficulty of the question and by depth of the token.",
}
NOT_ASKED = (
    "Not asked here: external teachers (Qwen3-4B to 14B), demonstrations and summaries of a 32B model, BoolQ, MMLU and "
    "AIME. The paper's oracle filter raises the mean by construction, so that it is a figure and no finding."
)


def write_study_page(cells: Sequence[CellSummary], path: Path, confidence: float = 0.95) -> None:
    """Write the markdown page, and its pictures beside it.

    Args:
        cells: Summaries of cells.
        path: The ``.md`` file. Pictures go to the folder ``images`` beside it, under names that begin with the page's.
        confidence: Level of the intervals, in (0, 1).
    """
    drawn: dict[str, str] = {}
    if has(cells, "paper") or has(cells, "update"):
        drawn["gaps"] = gap_picture(cells, confidence)
    if has(cells, "paper"):
        drawn["where"] = where_picture(cells, confidence)
    images = path.parent / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_atomically(images / f"{path.stem}-{name}.svg", picture)
    places = {name: f"{IMAGES}/{path.stem}-{name}.svg" for name in drawn}
    write_atomically(path, study_page(cells, confidence, places))


def study_page(cells: Sequence[CellSummary], confidence: float, pictures: dict[str, str]) -> str:
    """The page as markdown.

    Args:
        cells: Summaries of cells.
        confidence: Level of the intervals, in (0, 1).
        pictures: Paths of the pictures that there are, relative to the page: ``gaps`` and ``where``.
    """
    verdicts = study_verdicts(cells, confidence)
    parts = [
        "# Do the paper's findings hold here?",
        f"`odp-callbacks study` wrote this page from {_described(cells)}. Each finding of arXiv:2605.10889 is a "
        f"contrast. It **holds** if its {confidence:.0%} interval lies in the range that the paper claims, **does not "
        "hold** if it lies outside, and otherwise the data **cannot tell**. Contrasts are means over the cells "
        "(student and task); intervals are a jackknife over questions, stratified by task, and not corrected for the "
        "number of findings. *Italics* name the paper's table.",
        _count_sentence(verdicts),
        "## Findings",
        findings_table(verdicts),
        "Update gain and figures at nodes are [other quantities](method.md#what-is-the-papers-and-what-is-ours) than "
        f"the paper's cosine; only the question is the same. {NOT_ASKED}",
        "## By student and task",
        f"In the paper's protocol; ± is half of the interval. {_signs()}",
        cells_table(verdicts),
    ]
    if has(cells, "paper"):
        parts += [
            "## The paper's tables",
            "Correct → incorrect paths (difference), mean of the teachers:",
            classes_table(cells, confidence),
            "Mean cosine of each teacher:",
            teachers_table(cells, "paper", "cosine", confidence),
            "Oracle filter, and what it does to SR range x cosine:",
            filter_table(cells, confidence),
        ]
    if has(cells, "accuracy"):
        parts += [
            "The teacher's own accuracy under each context (the paper's Tables 8 and 9):",
            teachers_table(cells, "accuracy", "accuracy", confidence),
        ]
    if has(cells, "update"):
        parts += ["## Update gain", teachers_table(cells, "update", "update_gain", confidence)]
    if has(cells, "nodes"):
        parts += ["Predicted gain at nodes:", teachers_table(cells, "nodes", "predicted_gain", confidence)]
    if pictures:
        parts += ["## Pictures", *(f"![{CAPTIONS[name]}]({place})" for name, place in pictures.items())]
    parts += [
        "## Cost",
        "Rollouts for an interval of ±0.02 on the mean cosine, and to decide whether Self-1C is above Self-1C1W, "
        "judging by the present interval. The paper took 45,000 to 200,000 targeted rollouts a question.",
        cost_table(cells, confidence),
        "## How it was measured",
        _notes(cells),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _described(cells: Sequence[CellSummary]) -> str:
    students = list(dict.fromkeys(cell.student for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    return f"{_enumerate(students)} on {_enumerate(tasks)}"


def _count_sentence(verdicts: Sequence[Verdict]) -> str:
    counts = verdict_counts(verdicts, "paper")
    return (
        f"In the paper's own protocol, {counts[HOLDS]} of {sum(counts.values())} findings hold, "
        f"{counts[DOES_NOT_HOLD]} do not, and of {counts[CANNOT_TELL]} these data cannot tell."
    )


def _signs() -> str:
    return f"✓ {HOLDS}, ✗ {DOES_NOT_HOLD}, ? {CANNOT_TELL}."


def _notes(cells: Sequence[CellSummary]) -> str:
    """Deviations from the paper, and the size of each cell."""
    deviations = dict.fromkeys(one for cell in cells for one in cell.facts.get("deviations", ()))
    lines = [f"- Deviation: {deviation}." for deviation in deviations]
    own_contexts = dict.fromkeys(name for cell in cells for name in cell.facts.get("own_contexts", ()))
    if own_contexts:
        lines.append(f"- Contexts in the study's own form, not the paper's: {', '.join(own_contexts)}.")
    for cell in cells:
        if cell.measurement == "paper":
            left_out = ", ".join(f"{count} left out ({reason})" for reason, count in cell.facts["left_out"].items())
            lines.append(
                f"- {cell.student} on {cell.task}: {cell.questions} questions{', ' + left_out if left_out else ''}; "
                f"{cell.facts['scored_nodes']} scored nodes; {cell.facts['seconds']:.0f} s."
            )
    lines.append(
        "- `odp-callbacks study --config study.yaml --hours 2` measures what is missing, and can be interrupted. "
        "`odp-callbacks study --config study.yaml --records summaries.json --page study.md` builds it again without a "
        "model."
    )
    return "\n".join(lines)


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
