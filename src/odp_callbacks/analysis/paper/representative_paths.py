"""The representative paths of a question: some correct and some incorrect rollouts."""

from collections.abc import Sequence


def representative_paths(
    responses: Sequence[tuple[int, ...]], correct: Sequence[bool], per_class: int = 2
) -> tuple[int, ...]:
    """Choose the paths that are scored: the first different responses of each class.

    Rollouts are independent draws, so the first ones are a random choice. Equal responses are one path of the tree.
    Source: arXiv:2605.10889, which takes 2 correct and 2 incorrect paths and does not say how it chooses them.

    Args:
        responses: ``G`` rollouts as token ids.
        correct: For each rollout, whether it was correct.
        per_class: The largest number of paths of each class.

    Returns:
        Indices of rollouts: the correct ones first, then the incorrect ones. A class with fewer different responses
        gives fewer paths.

    Examples:
        >>> representative_paths([(1, 2), (1, 2), (3,), (4,)], [True, True, False, False], per_class=2)
        (0, 2, 3)
    """
    chosen: list[int] = []
    for wanted in (True, False):
        first_of_response: dict[tuple[int, ...], int] = {}
        for index, (response, is_correct) in enumerate(zip(responses, correct, strict=True)):
            if bool(is_correct) == wanted:
                first_of_response.setdefault(response, index)
        chosen += list(first_of_response.values())[:per_class]
    return tuple(chosen)
