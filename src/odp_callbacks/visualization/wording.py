"""Words that the table, the pictures, TensorBoard and the HTML page share."""

from collections.abc import Iterable

from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, ClassSummary
from odp_callbacks.text import displayable

MAXIMUM_TAG_LENGTH = 100
"""Characters of a teacher's name in a tag."""


def class_title(split: str) -> str:
    """Name a class of rollouts, or the difference between two of them.

    Examples:
        >>> class_title("correct"), class_title("incorrect-correct")
        ('correct rollouts', 'incorrect minus correct rollouts')
    """
    return "incorrect minus correct rollouts" if split == INCORRECT_MINUS_CORRECT else f"{split} rollouts"


def gain_figure(summaries: Iterable[ClassSummary]) -> str:
    """Name of the figure that teachers are judged by: update gain where it was measured, otherwise predicted gain.

    Args:
        summaries: Of one or of several reports.
    """
    return "update_gain" if any("update_gain" in summary.figures for summary in summaries) else "predicted_gain"


def shared_gain_figure(first: Iterable[ClassSummary], second: Iterable[ClassSummary]) -> str:
    """Name of the gain that two reports can be compared by; empty if they have none in common."""
    measured = [{figure for summary in summaries for figure in summary.figures} for summaries in (first, second)]
    shared = [figure for figure in ("update_gain", "predicted_gain") if all(figure in names for names in measured)]
    return shared[0] if shared else ""


def figure_title(figure: str) -> str:
    """Spell out the name of a figure.

    Examples:
        >>> figure_title("gain_weighted_alignment"), figure_title("reverse_kl")
        ('gain-weighted alignment', 'reverse KL')
    """
    return figure.replace("_", " ").replace("gain weighted", "gain-weighted").replace(" kl", " KL")


def level(confidence: float) -> str:
    """Write a confidence level as a percentage.

    Examples:
        >>> level(0.95), level(0.995)
        ('95%', '99.5%')
    """
    return f"{100 * confidence:g}%"


def tag_of(teacher: str) -> str:
    """Turn a teacher's name into a part of a TensorBoard tag; the names in records can contain anything.

    Examples:
        >>> tag_of("org/model")
        'org_model'
    """
    return displayable(teacher, MAXIMUM_TAG_LENGTH).replace("/", "_")
