"""Find the records that a user names by their folder."""

from collections.abc import Sequence
from pathlib import Path

from odp_callbacks.files import local_path
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import RUN_SETTING, load, record_folders


def load_reports(folders: Sequence[str]) -> list[tuple[str, ProbeReport]]:
    """Load the records in some folders, each with a short name that tells it from the others.

    Args:
        folders: Folders of records. A folder of a diagnosis stands for its records, and one that holds several folders
            of records, such as that of a demo, for all of them in the order of their names.

    Raises:
        ValueError: If a folder holds no records, or the probes of several runs.
    """
    loaded: list[tuple[Path, ProbeReport]] = []
    for folder in folders:
        found = record_folders(local_path("records", folder))
        if not found:
            raise ValueError(f"`records` names {folder!r}, where there are no records of odp-callbacks.")
        probes = [(record_folder, load(record_folder)) for record_folder in found]
        _check_one_run(folder, probes)
        loaded += probes
    names = short_names([record_folder for record_folder, _ in loaded])
    return [(name, report) for name, (_, report) in zip(names, loaded, strict=True)]


def _check_one_run(folder: str, probes: Sequence[tuple[Path, ProbeReport]]) -> None:
    """Check that all probes that were found in a folder are of one training run."""
    runs: dict[object, list[Path]] = {}
    for record_folder, report in probes:
        runs.setdefault(report.settings.get(RUN_SETTING), []).append(record_folder)
    if len(runs) > 1:
        names = "; ".join(", ".join(path.name for path in paths) for paths in runs.values())
        raise ValueError(
            f"`records` names {folder!r}, which holds the probes of {len(runs)} runs ({names}). "
            "Name the folders of one of them."
        )


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of some paths that differ from one another.

    Examples:
        >>> short_names([Path("/runs/a/records"), Path("/runs/b/records")])
        ['a', 'b']
    """
    all_parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, all_parts)) + 1):
        names = ["/".join(parts[-length:]) for parts in all_parts]
        if len(set(names)) == len(set(all_parts)):
            break
    return [name.removesuffix("/records") for name in names]
