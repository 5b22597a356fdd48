"""Two processes that share each probe, over gloo."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from odp_callbacks import AlignmentGate
from odp_callbacks.analysis.summaries import scalars
from odp_callbacks.callbacks.processes import Processes, processes
from odp_callbacks.storage import load
from tests.helpers.training import end_state, loader, make_module, make_trainer, odd, same, watcher


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 14])
def test_shares_are_disjoint_whole_and_even(size: int, count: int) -> None:
    shares = [list(Processes(rank, size).share(range(count))) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _enter(rank: int, work: Callable[..., None], port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    work(rank, Path(folder), *arguments)


def two(work: Callable[..., None], folder: Path, *arguments: Any) -> list[Any]:
    """Run ``work`` in two processes, which put what they found into ``folder``."""
    mp.spawn(_enter, args=(work, free_port(), str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _ddp(callback: Any = None, **changes: Any) -> Any:
    import lightning.pytorch as lightning
    from lightning.fabric.plugins.environments import LightningEnvironment

    lightning.seed_everything(int(os.environ["RANK"]), verbose=False)

    class Placed(LightningEnvironment):  # the processes are there already
        creates_processes_externally = True

        def world_size(self) -> int:
            return 2

        def global_rank(self) -> int:
            return int(os.environ["RANK"])

        def local_rank(self) -> int:
            return int(os.environ["RANK"])

    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=Placed())
    return make_trainer(callback, strategy=strategy, devices=2, **changes)


def _probe(rank: int, folder: Path, options: dict[str, Any]) -> None:
    gate = AlignmentGate()
    callback = watcher(**{"max_new_tokens": 5, "gate": gate, "records": folder / "records", **options})
    trainer = _ddp(callback, max_steps=2)
    trainer.fit(make_module(reward=odd), loader())
    report = callback.last_report
    torch.save((report, gate.state_dict(), dict(trainer.callback_metrics), processes().rank), folder / f"{rank}.pt")


@pytest.mark.parametrize("count", [2, 3, 1])
def test_figures_are_those_of_one_process_on_the_same_questions(count: int, tmp_path: Path) -> None:
    """At the start, where the student is the same: two processes with ``count`` questions between them."""
    options = {"questions_per_probe": count, "at_start": True, "every_n_steps": 100, "optimizer_geometry": False}
    found = two(_probe, tmp_path, options)
    (first, first_gate, metrics, rank0), (second, second_gate, _, rank1) = found
    assert (rank0, rank1) == (0, 1)
    callback = watcher(max_new_tokens=5, **options)
    make_trainer(callback, max_steps=2).fit(make_module(reward=odd), loader())
    alone = callback.last_report
    assert alone is not None
    for report in (first, second):
        assert [r.question for r in report.rollouts] == [r.question for r in alone.rollouts]
        assert len({r.question for r in report.rollouts}) == count, "sharded, never repeated"
        assert [r.text for r in report.rollouts] == [r.text for r in alone.rollouts]
        for a, b in zip(report.nodes, alone.nodes, strict=True):
            np.testing.assert_array_equal(a.total, b.total)
            np.testing.assert_allclose(a.gram, b.gram, rtol=1e-3, atol=1e-6)
        assert report.continuations == alone.continuations
        np.testing.assert_allclose(report.step.gram, alone.step.gram, rtol=1e-3, atol=1e-5)
    ours, theirs = scalars(first), scalars(alone)
    for name, value in ours.items():
        if not name.startswith("odp/probe/seconds"):
            np.testing.assert_allclose(value, theirs[name], rtol=2e-3, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-5)
    assert str(first_gate) == str(second_gate), "gates learn the same everywhere"
    assert len(load(tmp_path / "records" / "step-00000000").nodes) == len(alone.nodes)


def _fail(rank: int, folder: Path, strict: bool) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if rank == 1 and any(completions):
            raise RuntimeError("out of order")
        return odd(prompts, completions)

    callback = watcher(reward=reward, strict=strict)
    trainer = _ddp(callback)
    error = ""
    try:
        trainer.fit(make_module(), loader())
    except RuntimeError as found:
        error = str(found)
    torch.save((callback.last_report, trainer.global_step, error), folder / f"{rank}.pt")


@pytest.mark.parametrize("strict", [False, True])
def test_a_failure_in_one_process_stops_no_other(strict: bool, tmp_path: Path) -> None:
    for report, step, error in two(_fail, tmp_path, strict):
        if strict:
            assert "out of order" in error
        else:
            assert (step, error) == (4, "")
            assert len({r.question for r in report.rollouts}) == 1, "the other process's question counts"


def _undefined(rank: int, folder: Path) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions) if rank == 1 else odd(prompts, completions)

    callback = watcher(reward=reward)
    _ddp(callback, max_steps=2).fit(make_module(), loader())
    assert callback.last_report is not None
    torch.save((callback.last_report, scalars(callback.last_report)), folder / f"{rank}.pt")


def test_a_process_without_a_defined_node_counts_as_such(tmp_path: Path) -> None:
    (report, first), (_, second) = two(_undefined, tmp_path)
    for name, value in first.items():
        np.testing.assert_equal(value, second[name])
    defined = [any(n.total) for n in report.nodes]
    assert len({n.question for n in report.nodes}) == 2
    assert {n.question for n, some in zip(report.nodes, defined, strict=True) if some} == {report.nodes[0].question}
    assert first["odp/nodes/answer/all"] == len(report.nodes)
    assert np.isfinite(first["odp/predicted_gain/answer/all"])


def _train(rank: int, folder: Path, options: dict[str, Any], accumulate: int) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    ends, kept = [], folder / "kept"
    for watched in (False, True):
        callback = watcher(at_start=True) if watched else None
        module = make_module(dropout=0.2, reward=odd)
        trainer = _ddp(callback, accumulate_grad_batches=accumulate, max_steps=4, max_epochs=-1, **options)
        if watched:
            trainer.callbacks.append(ModelCheckpoint(dirpath=kept, every_n_train_steps=2, save_top_k=-1))
        trainer.fit(module, loader())
        ends.append(end_state(trainer))
    resumed = watcher(at_start=True)
    again = _ddp(resumed, accumulate_grad_batches=accumulate, max_steps=4, max_epochs=-1, **options)
    (path,) = kept.glob("*step=2.ckpt")
    again.fit(make_module(dropout=0.2, reward=odd), loader(), ckpt_path=path)
    assert callback is not None
    state = [(c.monitor.probes, c.monitor.order, c.monitor.stream.get_state().tolist()) for c in (callback, resumed)]
    torch.save((same(*ends), state), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("precision", "accumulate"), [("32-true", 1), ("32-true", 2), ("bf16-mixed", 2), ("bf16-true", 1)]
)
def test_training_ends_in_the_same_bits(precision: str, accumulate: int, tmp_path: Path) -> None:
    for equal, (whole, resumed) in two(_train, tmp_path, {"precision": precision}, accumulate):
        assert equal
        assert whole == resumed


def test_a_strategy_that_shards_the_student_is_refused() -> None:
    callback = watcher()
    trainer = make_trainer(callback)
    trainer.strategy.__class__ = type("Mine", (ModelParallelStrategy,), {})
    with pytest.raises(ValueError, match="`strategy` is ModelParallelStrategy, under which no process has the whole"):
        callback.setup(trainer, make_module(), "fit")
