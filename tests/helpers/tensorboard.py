"""What TensorBoard finds in a folder: the runs, and the scalars of each."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Scalars = dict[str, list[tuple[int, float]]]
"""Steps and values by tag."""


def read_events(folder: str | Path) -> EventAccumulator:
    """Everything that one run has."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


def read_runs(folder: str | Path) -> dict[str, Scalars]:
    """The scalars of each run, by its path in the folder; that of the folder itself is called ``"."``."""
    folders = sorted({path.parent for path in Path(folder).rglob("*.tfevents.*")})
    runs = {str(run.relative_to(folder)): read_events(run) for run in folders}
    return {
        run: {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for run, events in runs.items()
    }
