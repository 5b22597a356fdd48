"""Contexts of demonstrations, as the self-distillation teachers of arXiv:2605.10889 are given.

The order of the parts is the paper's: the question, a heading, each demonstration between triple quotes, and a request
for an answer of one's own. The wording is ours. The columns are those that
:func:`~odp_callbacks.engine.demonstrations.sample_demonstrations` makes.
"""

import re

DEMONSTRATIONS, WRONG_DEMONSTRATIONS, SUMMARY = "demonstrations", "wrong_demonstrations", "summary"
"""The columns with correct responses, with wrong ones, and with a summary of a correct one."""
CONTEXT_NAME = re.compile(r"self-(sum-)?(\d+)c(?:(\d+)w)?(?: \((\w+)\))?", re.IGNORECASE)
"""The paper's names, such as Self-1C, Self-Sum-1C1W and Self-1C (32B), and the like with other numbers."""
REQUEST = "Now answer the question with a response of your own, and include your thinking."


def demonstration_context(correct: int = 1, wrong: int = 0, *, summary: bool = False, source: str = "") -> str:
    '''The template of a context with demonstrations.

    Args:
        correct: How many correct responses it shows, from the column ``demonstrations``.
        wrong: How many wrong ones, from the column ``wrong_demonstrations``. With any, the heading says that they are
            wrong and must not be imitated.
        summary: Show the column ``summary`` in place of the correct response; ``correct`` must be 1.
        source: Whose demonstrations it shows, if there are those of several models: ``"32B"`` for the columns
            ``32B_demonstrations`` and so on.

    Returns:
        A template for :class:`~odp_callbacks.Teacher`.

    Raises:
        ValueError: If a number is negative, or both are 0, or if several responses shall be summarised.

    Examples:
        >>> row = {"prompt": "1 + 1?", "demonstrations": ["Two."]}
        >>> from odp_callbacks import Teacher
        >>> print(Teacher(demonstration_context()).prompt(row))
        1 + 1?
        <BLANKLINE>
        # Demonstration
        <BLANKLINE>
        What follows is a correct response to the question.
        """
        Two.
        """
        <BLANKLINE>
        Now answer the question with a response of your own, and include your thinking.
    '''
    if min(correct, wrong) < 0 or correct + wrong == 0:
        raise ValueError(
            "`correct` and `wrong` must be numbers of demonstrations, at least one of them positive, but "
            f"{correct} and {wrong} were given."
        )
    if summary and correct != 1:
        raise ValueError(
            f"`summary` is of one correct response, but `correct` is {correct}; give 1, or `summary=False`."
        )
    heading = "Demonstration" if correct + wrong == 1 else "Demonstrations"
    if wrong:
        heading += " (wrong, not to be imitated)" if not correct else " (some are wrong and must not be imitated)"
    kind = "a summary of a correct response" if summary else "a correct response"
    columns = [SUMMARY] if summary else [f"{DEMONSTRATIONS}[{place}]" for place in range(correct)]
    wrong_columns = [f"{WRONG_DEMONSTRATIONS}[{place}]" for place in range(wrong)]
    parts = ["{prompt}", f"# {heading}"]
    parts += [_quoted(kind, source_column(column, source)) for column in columns]
    parts += [_quoted("a wrong response", source_column(column, source)) for column in wrong_columns]
    return "\n\n".join([*parts, REQUEST])


def named_context(name: str) -> str | None:
    """The template of a context by its name in the paper.

    Args:
        name: ``"self-1c"``, ``"self-sum-1c"``, ``"self-1c1w"``, ``"self-sum-1c1w"``, or the like with other numbers of
            correct and wrong demonstrations, as in ``"self-2c3w"``, or with those of another model, as in
            ``"self-1c (32B)"``.

    Returns:
        The template; None if this is no such name.

    Examples:
        >>> named_context("Self-1C1W") == demonstration_context(correct=1, wrong=1)
        True
    """
    match = CONTEXT_NAME.fullmatch(name.strip())
    if match is None:
        return None
    summary, correct, wrong, source = match.groups()
    return demonstration_context(int(correct), int(wrong or 0), summary=summary is not None, source=source or "")


def source_column(column: str, source: str) -> str:
    """The name of a column with the demonstrations of one model.

    Examples:
        >>> source_column("summary", ""), source_column("summary", "32B")
        ('summary', '32B_summary')
    """
    return f"{source}_{column}" if source else column


def _quoted(kind: str, column: str) -> str:
    return f'What follows is {kind} to the question.\n"""\n{{{column}}}\n"""'
