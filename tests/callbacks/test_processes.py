"""Two processes that share each probe, over gloo."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from odp_callbacks import AlignmentGate
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.callbacks.processes import Processes, current_processes
from odp_callbacks.storage import load
from tests.helpers.probes import ALL_GRADIENTS
from tests.helpers.training import (
    end_state,
    make_loader,
    make_module,
    make_trainer,
    make_watching_callback,
    odd_length_reward,
    states_equal,
)
from tests.helpers.two_processes import run_in_two_processes, trainer_of_two


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 14])
def test_shares_are_disjoint_complete_and_even(size: int, count: int) -> None:
    shares = [list(Processes(rank, size).share(range(count))) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Threads(Processes):
    """Processes that are threads of this one, and wait a few seconds for each other."""

    barrier = threading.Barrier(2)
    objects: ClassVar[dict[int, Any]] = {}

    def gather(self, value: Any) -> list[Any]:
        self.objects[self.rank] = value
        self.barrier.wait(timeout=10)
        gathered = [self.objects[rank] for rank in range(2)]
        self.barrier.wait(timeout=10)
        return gathered


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_what_fails_in_one_process_is_raised_in_all_and_none_waits(failing: int | None) -> None:
    def work(rank: int) -> Any:
        def function() -> int:
            if rank == failing:
                raise KeyError("lost")
            return 10 * rank

        try:
            return Threads(rank, 2).gather_results(function)
        except Exception as error:
            return type(error), str(error)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(work, range(2)))
    if failing is None:
        assert results == [[0, 10], [0, 10]]
    else:
        assert results[failing] == (KeyError, "'lost'")
        assert results[1 - failing] == (RuntimeError, f"in process {failing}: KeyError: 'lost'")


def _ddp_trainer(callback: Any = None, **changes: Any) -> Any:
    return trainer_of_two(DDPStrategy(process_group_backend="gloo"), callback, **changes)


def _probe(rank: int, folder: Path, options: dict[str, Any]) -> None:
    gate = AlignmentGate()
    callback = make_watching_callback(**{"max_new_tokens": 5, "gate": gate, "records": folder / "records", **options})
    trainer = _ddp_trainer(callback, max_steps=2)
    trainer.fit(make_module(reward=odd_length_reward), make_loader())
    outcome = (callback.last_report, gate.state_dict(), dict(trainer.callback_metrics), current_processes().rank)
    torch.save(outcome, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 1])
def test_figures_are_those_of_one_process_on_the_same_questions(count: int, tmp_path: Path) -> None:
    """Compared at the start, where the student is the same; two processes share ``count`` questions."""
    options = {"questions_per_probe": count, "at_start": True, "every_n_steps": 100, "optimizer_geometry": False}
    # A sample of nodes with gradients would be one of each process's own nodes.
    options |= ALL_GRADIENTS
    outcomes = run_in_two_processes(_probe, tmp_path, options)
    (first_report, first_gate, metrics, first_rank), (second_report, second_gate, _, second_rank) = outcomes
    assert (first_rank, second_rank) == (0, 1)
    callback = make_watching_callback(max_new_tokens=5, **options)
    make_trainer(callback, max_steps=2).fit(make_module(reward=odd_length_reward), make_loader())
    expected = callback.last_report
    assert expected is not None
    expected_questions = [rollout.question for rollout in expected.rollouts]
    for report in (first_report, second_report):
        assert [rollout.question for rollout in report.rollouts] == expected_questions
        assert len({rollout.question for rollout in report.rollouts}) == count, "shared, never repeated"
        assert [rollout.text for rollout in report.rollouts] == [rollout.text for rollout in expected.rollouts]
        for node, expected_node in zip(report.nodes, expected.nodes, strict=True):
            np.testing.assert_array_equal(node.total, expected_node.total)
            np.testing.assert_allclose(node.gram, expected_node.gram, rtol=1e-3, atol=1e-6)
        assert report.continuations == expected.continuations
        np.testing.assert_allclose(report.step.gram, expected.step.gram, rtol=1e-3, atol=1e-5)
    expected_scalars = scalars(expected)
    for name, value in scalars(first_report).items():
        # Each process has its own batch of continuations, and measures the update of its own questions; see
        # test_each_process_measures_its_part_of_the_update.
        if not name.startswith(("odp/probe/seconds", "odp/probe/slot_occupancy", "odp/update_")):
            np.testing.assert_allclose(value, expected_scalars[name], rtol=2e-3, atol=1e-4, err_msg=name)
            if name in metrics:
                np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-5)
    assert str(first_gate) == str(second_gate), "the gates of all processes learn the same"
    assert len(load(tmp_path / "records" / "step-00000000").nodes) == len(expected.nodes)


def _probe_update(rank: int, folder: Path) -> None:
    callback = make_watching_callback(
        max_new_tokens=5, questions_per_probe=4, at_start=True, every_n_steps=100, budget=0
    )
    _ddp_trainer(callback).fit(make_module(reward=odd_length_reward), make_loader())
    torch.save(callback.last_report, folder / f"{rank}.pt")


@pytest.mark.slow
def test_each_process_measures_its_part_of_the_update(tmp_path: Path) -> None:
    """The figure is the mean over processes: inner products of gradients in different processes are not known."""
    first, second = run_in_two_processes(_probe_update, tmp_path)
    for report in (first, second):
        assert [update.gram.questions.tolist() for update in report.updates] == [[1.0, 1.0], [1.0, 1.0]]
        assert len(report.tokens()) == sum(len(rollout.pieces) for rollout in report.rollouts)
    logged = [scalars(report)["odp/update_gain/answer/all"] for report in (first, second)]
    assert logged[0] == logged[1]
    assert np.isfinite(logged[0])


def _fail(rank: int, folder: Path, strict: bool) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if rank == 1 and any(completions):
            raise RuntimeError("out of order")
        return odd_length_reward(prompts, completions)

    callback = make_watching_callback(reward=reward, strict=strict)
    trainer = _ddp_trainer(callback)
    message = ""
    try:
        trainer.fit(make_module(), make_loader())
    except RuntimeError as error:
        message = str(error)
    torch.save((callback.last_report, trainer.global_step, message), folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_failure_in_one_process_does_not_stop_the_others(strict: bool, tmp_path: Path) -> None:
    for report, step, message in run_in_two_processes(_fail, tmp_path, strict):
        if strict:
            assert "out of order" in message
        else:
            assert (step, message) == (4, "")
            assert len({rollout.question for rollout in report.rollouts}) == 1, "the other process's question counts"


def _copy_fails(rank: int, folder: Path) -> None:
    from odp_callbacks.callbacks import processes
    from odp_callbacks.engine.update.taken_step import KeptParameters

    processes.TIMEOUT = timedelta(seconds=60)
    copy = KeptParameters.of

    def failing_copy(student: Any, step: int) -> KeptParameters:
        if rank == 1 and step == 3:
            raise MemoryError("no room for a copy")
        return copy(student, step)

    KeptParameters.of = failing_copy
    callback = make_watching_callback(every_n_steps=100, strict=False)
    logged, log = [], callback._log

    def recording_log(trainer: Any, metrics: dict[str, float], report: Any) -> None:
        logged.append((trainer.global_step, "odp/step/gain" in metrics))
        log(trainer, metrics, report)

    callback._log = recording_log
    module = make_module(reward=odd_length_reward, rollouts_per_question=4)
    _ddp_trainer(callback, max_steps=7, max_epochs=-1).fit(module, make_loader())
    torch.save(logged, folder / f"{rank}.pt")


@pytest.mark.slow
def test_a_copy_that_fails_in_one_process_does_not_hang_the_others(tmp_path: Path) -> None:
    first, second = run_in_two_processes(_copy_fails, tmp_path)
    assert first == second
    assert [step for step, has_gain in first if has_gain] == [2, 6, 7], "at step 5 the curves begin anew"


def _undefined(rank: int, folder: Path) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions) if rank == 1 else odd_length_reward(prompts, completions)

    callback = make_watching_callback(reward=reward)
    _ddp_trainer(callback, max_steps=2).fit(make_module(), make_loader())
    assert callback.last_report is not None
    torch.save((callback.last_report, scalars(callback.last_report)), folder / f"{rank}.pt")


@pytest.mark.slow
def test_a_process_without_a_defined_node_is_merged_like_the_others(tmp_path: Path) -> None:
    (report, first_scalars), (_, second_scalars) = run_in_two_processes(_undefined, tmp_path)
    for name, value in first_scalars.items():
        np.testing.assert_equal(value, second_scalars[name])
    assert len({node.question for node in report.nodes}) == 2
    assert {node.question for node in report.nodes if any(node.total)} == {report.nodes[0].question}
    assert first_scalars["odp/nodes/answer/all"] == len(report.nodes)
    assert np.isfinite(first_scalars["odp/predicted_gain/answer/all"])


def _train(rank: int, folder: Path, options: dict[str, Any], accumulate: int) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    end_states, checkpoints = [], folder / "checkpoints"
    for watched in (False, True):
        callback = make_watching_callback(at_start=True) if watched else None
        module = make_module(dropout=0.2, reward=odd_length_reward)
        trainer = _ddp_trainer(callback, accumulate_grad_batches=accumulate, max_steps=4, max_epochs=-1, **options)
        if watched:
            trainer.callbacks.append(ModelCheckpoint(dirpath=checkpoints, every_n_train_steps=2, save_top_k=-1))
        trainer.fit(module, make_loader())
        end_states.append(end_state(trainer))
    resumed = make_watching_callback(at_start=True)
    resumed_trainer = _ddp_trainer(resumed, accumulate_grad_batches=accumulate, max_steps=4, max_epochs=-1, **options)
    (path,) = checkpoints.glob("*step=2.ckpt")
    resumed_trainer.fit(make_module(dropout=0.2, reward=odd_length_reward), make_loader(), ckpt_path=path)
    assert callback is not None
    states = [
        (
            watching.monitor.probe_count,
            watching.monitor.questions.state_dict(),
            watching.monitor.random_stream.get_state().tolist(),
        )
        for watching in (callback, resumed)
    ]
    torch.save((states_equal(*end_states), states), folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "accumulate"), [("32-true", 1), ("32-true", 2), ("bf16-mixed", 2), ("bf16-true", 1)]
)
def test_training_ends_in_the_same_bits(precision: str, accumulate: int, tmp_path: Path) -> None:
    for equal, (uninterrupted, resumed) in run_in_two_processes(_train, tmp_path, {"precision": precision}, accumulate):
        assert equal
        assert uninterrupted == resumed


def test_a_strategy_that_flattens_parameters_is_refused() -> None:
    callback = make_watching_callback()
    trainer = make_trainer(callback)
    trainer.strategy.__class__ = type("UserStrategy", (FSDPStrategy,), {})
    with pytest.raises(ValueError, match="`strategy` is FSDPStrategy, whose shards this callback cannot gather"):
        callback.setup(trainer, make_module(), "fit")
