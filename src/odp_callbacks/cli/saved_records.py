"""Find the records that a user names by their folder."""

from collections.abc import Sequence
from pathlib import Path

from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import load

NODES_FILE = "nodes.parquet"


def load_reports(folders: Sequence[str]) -> list[tuple[str, ProbeReport]]:
    """Load the records in some folders, each with a short name that tells it from the others.

    Args:
        folders: Folders of records. A folder of a diagnosis stands for its records, and one that holds several folders
            of records, such as that of a demo, for all of them in the order of their names.

    Raises:
        ValueError: If a folder holds no records.
    """
    record_folders = [record_folder for folder in folders for record_folder in _record_folders(Path(folder))]
    names = short_names(record_folders)
    return [(name, load(record_folder)) for name, record_folder in zip(names, record_folders, strict=True)]


def _record_folders(folder: Path) -> list[Path]:
    for candidate in (folder, folder / "records"):
        if (candidate / NODES_FILE).exists():
            return [candidate]
    for pattern in (f"*/{NODES_FILE}", f"records/*/{NODES_FILE}"):
        if record_folders := sorted(path.parent for path in folder.glob(pattern)):
            return record_folders
    raise ValueError(f"`records` names {str(folder)!r}, where there are no records of odp-callbacks.")


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
