"""The models of a study's students, as folders or hub names that the other commands take."""

from collections.abc import Callable

from odp_callbacks.cli.cached_models import is_cached, model_folder
from odp_callbacks.cli.demonstrations import SAME_MODEL
from odp_callbacks.cli.models import HUB_NAME, load_student
from odp_callbacks.cli.study.gemma import GEMMA, gemma_folder
from odp_callbacks.cli.study.plan import StudyOptions

Inform = Callable[[str], None]


def student_model(options: StudyOptions, name: str, inform: Inform) -> str | None:
    """Folder or hub name of a student; None for SmolLM2-135M-Instruct.

    Args:
        options: The options of the study.
        name: Name of the student.
        inform: Called with a line of text about each step that takes time.

    Raises:
        ValueError: If it is Gemma, and its terms were not accepted.
    """
    model = options.students[name].model
    return str(gemma_folder(options.accept_gemma_license, inform)) if model == GEMMA else model


def summary_model(options: StudyOptions, inform: Inform) -> str | None:
    """Who writes the summaries: ``self``, a folder or a hub name; None for nobody.

    Args:
        options: The options of the study.
        inform: Called with a line of text about each step that takes time.
    """
    name = options.summaries
    if name is None or name == SAME_MODEL or name not in options.students:
        return name
    if (model := student_model(options, name, inform)) is not None:
        return model
    load_student(None, inform)  # downloads it if it is not there
    cached_folder = model_folder(HUB_NAME.partition("/")[2])
    return str(cached_folder) if is_cached(cached_folder) else HUB_NAME
