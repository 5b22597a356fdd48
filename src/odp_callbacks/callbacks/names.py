"""What several callbacks in one trainer are called, so that their figures, pictures, states and records stay apart."""

import re
from collections.abc import Iterable, Mapping

ROOT = "odp"
"""How everything begins that a callback without a name logs."""
NAME = re.compile(r"(?!step-)\w[\w.-]*")
"""Names that can stand in the name of a metric, a tag and a folder; records are in folders ``step-…``."""


def check_name(name: object) -> None:
    """Raise ``ValueError`` unless ``name`` can be a callback's name."""
    if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ValueError(
            "`name` must be None, or letters, digits, '_', '-' and '.' that do not begin with 'step-', but "
            f"{name!r} was given."
        )


def root_of(name: str | None) -> str:
    """How everything begins that a callback logs.

    Examples:
        >>> root_of(None), root_of("hard")
        ('odp', 'odp-hard')
    """
    return ROOT if name is None else f"{ROOT}-{name}"


def named_metrics(metrics: Mapping[str, float], name: str | None) -> dict[str, float]:
    """Return metrics under the names at which the callback ``name`` logs them.

    Examples:
        >>> named_metrics({"odp/nodes/answer/all": 8.0, "threshold": 0.5}, "hard")
        {'odp-hard/nodes/answer/all': 8.0, 'odp-hard/threshold': 0.5}
    """
    if name is None:
        return dict(metrics)
    root = root_of(name)
    return {f"{root}/{metric.removeprefix(f'{ROOT}/')}": value for metric, value in metrics.items()}


def refuse_equal_names(name: str | None, other_names: Iterable[str | None]) -> None:
    """Raise ``ValueError`` if another callback of the same trainer has the same name.

    Args:
        name: The name of one callback.
        other_names: The names of the trainer's other callbacks of this library.
    """
    if name in list(other_names):
        given = "no name" if name is None else f"the name {name!r}"
        raise ValueError(
            f"`name`: two callbacks of odp-callbacks in one trainer have {given}, so their figures and states would "
            'overwrite each other; give each a `name` of its own, such as `name="hard"`.'
        )
