"""Kill processes in the middle of writing and overwriting, and look at what is left.

A process writes records, a journal, a checkpoint's state or ``diagnosis.json`` again and again until ``kill -9``; each
time it says what it has finished. What is read afterwards must be what it last finished, or the next one: nothing lost,
nothing half read. Five minutes on two cores.

The state of the transformers callback lies in ``trainer_state.json``, which transformers itself writes, and not
atomically. There each write is a new checkpoint, as in training: all but the last must be whole, and the last must be
whole or refused.

Run: python benchmarks/kill.py --kills 200
"""

import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from sizes import parse_sizes
from transformers import TrainerState

from odp_callbacks.callbacks.transformers import state_from_text, state_to_text
from odp_callbacks.cli.saved_records import load_reports
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.sampling.requests import Continuation
from odp_callbacks.files import read_json_object, write_atomically
from odp_callbacks.records import ProbeReport, RolloutRecord
from odp_callbacks.storage import load, save

USUAL = {"kills": 200}
SMOKE = {"kills": 5}
LONGEST_DELAY = 0.15
"""Seconds from a process's first write to its end."""
Say = Callable[[int], None]


def report(number: int) -> ProbeReport:
    """A report in which every part names its number."""
    text = str(number)
    rollouts = tuple(RolloutRecord(text, text, (text,) * 20, text, float(number), True, False) for _ in range(200))
    return ProbeReport((text,), (), rollouts, (), {}, number, 0, {}, settings={"geometry": "euclidean"})


def number_of(stored: ProbeReport) -> int:
    """The number of a report; an error if its parts are of two."""
    (number,) = {stored.continuations, int(stored.teachers[0]), *(int(rollout.reward) for rollout in stored.rollouts)}
    return number


def visible_names(folder: Path) -> list[str]:
    """What a folder holds, without drafts."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def write_records(folder: Path, first: int, say: Say) -> None:
    """Overwrite one record."""
    for number in range(first, 1 << 30):
        save(report(number), folder / "step-1", overwrite=True)
        say(number)


def read_records(folder: Path) -> int | None:
    """The number of the record that is there."""
    if not visible_names(folder):
        return None
    # As `odp-callbacks report` finds it: drafts do not count.
    ((_, found),) = load_reports([str(folder)])
    assert number_of(found) == number_of(load(folder / "step-1"))
    return number_of(found)


def write_new_records(folder: Path, first: int, say: Say) -> None:
    """Write record after record."""
    for number in range(first, 1 << 30):
        save(report(number), folder / f"step-{number}")
        say(number)


def read_new_records(folder: Path) -> int | None:
    """How many records there are; an error if one is not the one that its name says."""
    if not visible_names(folder):
        return None
    numbers = [number_of(stored) for _, stored in load_reports([str(folder)])]
    assert numbers == list(range(len(numbers)))
    return numbers[-1]


def write_journal(folder: Path, first: int, say: Say) -> None:
    """Append continuations."""
    journal = Journal(folder / "journal")
    for number in range(first, 1 << 30):
        journal.write({8 * number + part: Continuation((number,) * 500, False) for part in range(8)})
        say(number)


def read_journal(folder: Path) -> int | None:
    """The number of the last complete entry; an error if one is missing or changed."""
    found = Journal(folder / "journal").continuations
    assert list(found) == list(range(len(found)))
    assert all(continuation.tokens == (key // 8,) * 500 for key, continuation in found.items())
    return len(found) // 8 - 1 if len(found) >= 8 else None


def write_settings(folder: Path, first: int, say: Say) -> None:
    """Overwrite ``diagnosis.json``."""
    for number in range(first, 1 << 30):
        write_atomically(folder / "diagnosis.json", json.dumps({"number": number, "rows": [number] * 5000}))
        say(number)


def read_settings(folder: Path) -> int | None:
    """Its number."""
    path = folder / "diagnosis.json"
    if not path.exists():
        return None
    settings = read_json_object(path)
    assert set(settings["rows"]) == {settings["number"]}
    return int(settings["number"])


def write_checkpoints(folder: Path, first: int, say: Say) -> None:
    """Write checkpoint after checkpoint, of which the callback's state is a part."""
    for number in range(first, 1 << 30):
        checkpoint = folder / f"checkpoint-{number}"
        checkpoint.mkdir(exist_ok=True)
        text = state_to_text({"probe_count": number, "average": torch.full((5000,), float(number))})
        state = TrainerState(stateful_callbacks={"odp_callbacks": {"args": {}, "attributes": {"state": text}}})
        state.save_to_json(str(checkpoint / "trainer_state.json"))
        say(number)


def read_checkpoints(folder: Path) -> int | None:
    """The number of the last checkpoint that transformers accepts; an error if one is another than its name says."""
    last = None
    for number in range(len(list(folder.iterdir()))):
        try:
            state = TrainerState.load_from_json(str(folder / f"checkpoint-{number}" / "trainer_state.json"))
        except (ValueError, FileNotFoundError):
            break
        restored = state_from_text(state.stateful_callbacks["odp_callbacks"]["attributes"]["state"])
        assert restored["probe_count"] == number
        assert set(restored["average"].tolist()) == {float(number)}
        last = number
    return last


TARGETS = {
    "a record, overwritten": (write_records, read_records),
    "records, one after another": (write_new_records, read_new_records),
    "a journal": (write_journal, read_journal),
    "diagnosis.json": (write_settings, read_settings),
    "the state in a transformers checkpoint": (write_checkpoints, read_checkpoints),
}


def run_writer(name: str, folder: Path, first: int, connection: Connection) -> None:
    """What the process does that is killed."""
    torch.set_num_threads(1)
    connection.send(first - 1)
    TARGETS[name][0](folder, first, connection.send)


def kill_once(name: str, folder: Path, first: int, delay: float) -> int:
    """Start a writer, kill it, and return what it last said that it had finished."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    writer = context.Process(target=run_writer, args=(name, folder, first, sender))
    writer.start()
    sender.close()
    finished = int(receiver.recv())
    time.sleep(delay)
    writer.kill()
    writer.join()
    while True:  # what it said before it was killed
        try:
            finished = int(receiver.recv())
        except EOFError:
            return finished


def kill(name: str, kills: int, seed: int) -> Counter[str]:
    """Kill writers of one kind, and count what was found afterwards."""
    generator = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "written"
        folder.mkdir()
        expected = -1
        for _ in range(kills):
            finished = kill_once(name, folder, expected + 1, generator.uniform(0, LONGEST_DELAY))
            try:
                found = TARGETS[name][1](folder)
            except Exception as error:
                counts["half read"] += 1
                print(f"{name}: {type(error).__name__}: {error}")
                found = None
            found = -1 if found is None else found
            counts["lost"] += found < finished
            counts["finished writes"] += finished - expected
            if found > 50 or found < finished:  # start anew, or every reading would take longer than the last
                shutil.rmtree(folder)
                folder.mkdir()
                found = -1
            expected = found
    return counts


def main(kills: int) -> None:
    """Kill writers of every kind, and print a table; exit with an error if anything was lost or half read."""
    multiprocessing.set_forkserver_preload(["odp_callbacks.callbacks.transformers", "odp_callbacks.cli.saved_records"])
    rows = {name: kill(name, kills, seed) for seed, name in enumerate(TARGETS)}
    print("| what is written | kills | finished writes | lost | half read |\n|---|---|---|---|---|")
    for name, counts in rows.items():
        print(f"| {name} | {kills} | {counts['finished writes']} | {counts['lost']} | {counts['half read']} |")
    if any(counts["lost"] + counts["half read"] for counts in rows.values()):
        raise SystemExit("something was lost or half read")


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
