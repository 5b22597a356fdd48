"""Continuations that an interruption does not cost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odp_callbacks.engine import BaseTeacher, Probe, ProbeConfig
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.sampling.request_source import NumberedRequest
from odp_callbacks.engine.sampling.requests import Continuation
from odp_callbacks.engine.tree import stream
from odp_callbacks.engine.tree.wave_queue import WaveQueue
from tests.helpers.worlds import World, make_world


@pytest.fixture
def world() -> World:
    return make_world("gpt2", seed=3, initializer_range=0.5)


def probe(world: World, **options: Any) -> Probe:
    config = ProbeConfig(**{"rollouts_per_question": 2, "max_new_tokens": 3, "continuations": 8, **options})
    return Probe(world.model, world.tokenizer, world.reward, {"base": BaseTeacher()}, config)


@pytest.mark.parametrize("options", [{}, {"budget": 120}])
def test_an_interrupted_probe_samples_no_continuation_twice(
    options: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe(world, **options).run([world.row], seed=1)
    asked: list[int] = []
    stop = True

    class Watched(WaveQueue):
        """Notes what is sampled, and is interrupted once ten continuations are in the journal."""

        def next_request(self) -> NumberedRequest | None:
            numbered = super().next_request()
            asked.extend([numbered.key] if numbered else [])
            return numbered

        def receive(self, continuations: Any, step: int) -> None:
            super().receive(continuations, step)
            if stop and len(Journal(tmp_path / "journal").continuations) >= 10:
                raise KeyboardInterrupt

    monkeypatch.setattr(stream, "WaveQueue", Watched)
    with pytest.raises(KeyboardInterrupt):
        probe(world, batch_size=4, **options).run([world.row], seed=1, journal=Journal(tmp_path / "journal"))
    kept = set(Journal(tmp_path / "journal").continuations)
    assert len(kept) >= 10
    stop = False
    asked.clear()
    journal = Journal(tmp_path / "journal")
    resumed = probe(world, **options).run([world.row], seed=1, journal=journal)
    assert asked
    assert not kept & set(asked)
    assert resumed.continuations == whole.continuations
    for a, b in zip(whole.nodes, resumed.nodes, strict=True):
        np.testing.assert_array_equal(a.total, b.total)
        np.testing.assert_array_equal(a.count, b.count)
    journal.remove()
    assert not journal.path.exists()


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal")
    first.write({2**62 + 1: Continuation((1, 2), False)})
    with first.path.open("a") as file:
        file.write("[5, [1,")
    second = Journal(first.path)
    second.write({7: Continuation((), True)})
    assert Journal(first.path).continuations == {2**62 + 1: Continuation((1, 2), False), 7: Continuation((), True)}


def test_a_journal_is_read_with_care(tmp_path: Path) -> None:
    """Bytes that are no text and JSON that is no continuation ended the probe; a changed digit was another token."""
    path = tmp_path / "journal"
    whole = Journal(path)
    whole.write({1: Continuation((1, 2), False), 2: Continuation((3,), True)})
    first_line, second_line = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first_line.replace(b"2]", b"3]"), b"\xff\x00", b"5", b"00000000 ", b"", second_line]))
    assert Journal(path).continuations == {2: Continuation((3,), True)}


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_journal_that_was_cut_anywhere_goes_on(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path).write({key: Continuation((key, 2), False) for key in range(3)})
    path.write_bytes(path.read_bytes()[:kept])
    complete = Journal(path).continuations
    assert complete == {key: Continuation((key, 2), False) for key in range(len(complete))}
    Journal(path).write({9: Continuation((9,), True)})
    assert Journal(path).continuations == {**complete, 9: Continuation((9,), True)}


def test_a_full_disk_in_a_journal_costs_the_last_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write({1: Continuation((1,), False)})
    open_path = Path.open

    def open_full(path: Path, mode: str) -> Any:
        with open_path(path, mode) as file:
            file.write(b"0000")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left"):
        journal.write({2: Continuation((2,), False)})
    monkeypatch.undo()
    journal.write({3: Continuation((3,), False)})
    assert set(Journal(journal.path).continuations) == {1, 3}
