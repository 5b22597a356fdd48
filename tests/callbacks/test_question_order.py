"""The order of the questions, and what of it is kept in checkpoints."""

import io
import tracemalloc
from typing import Any

import pytest
import torch

from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.callbacks.question_order import QuestionOrder
from odp_callbacks.engine.prompts import Row
from tests.helpers.training import make_callback


class ManyRows:
    """Ten million rows, made when they are asked for."""

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> Row:
        return {"prompt": "a b", "answer": "a"}


def order_of(rows: Any, per_probe: int = 3, seed: int = 0) -> QuestionOrder:
    prompts = [{"prompt": str(index)} for index in range(rows)] if isinstance(rows, int) else rows
    return QuestionOrder(prompts, per_probe, seed)


def take(order: QuestionOrder, probes: int) -> list[list[str]]:
    return [list(order.next_questions(Processes())[0]) for _ in range(probes)]


@pytest.mark.parametrize(("rows", "per_probe"), [(1, 3), (3, 3), (5, 4), (7, 3), (10, 4), (12, 3), (50, 7)])
def test_every_question_comes_once_before_any_comes_twice_and_never_twice_in_a_probe(rows: int, per_probe: int) -> None:
    order = order_of(rows, per_probe)
    probes = take(order, 40)
    assert all(len(set(probe)) == len(probe) == min(per_probe, rows) for probe in probes)
    taken = [question for probe in probes for question in probe]
    assert len(set(taken[:rows])) == rows
    counts = [taken.count(str(question)) for question in range(rows)]
    assert max(counts) - min(counts) <= 1
    assert len(order.postponed) < per_probe


def test_passes_are_shuffled_anew() -> None:
    taken = [question for probe in take(order_of(12, 3), 12) for question in probe]
    passes = {tuple(taken[first : first + 12]) for first in range(0, 48, 12)}
    assert len(passes) > 2
    assert take(order_of(12, seed=1), 4) != take(order_of(12, seed=2), 4)


def test_processes_share_each_probe_s_questions() -> None:
    whole = take(order_of(10, 4), 5)
    orders = [order_of(10, 4) for _ in range(3)]
    shares = [
        [list(order.next_questions(Processes(rank, 3))[0]) for _ in range(5)] for rank, order in enumerate(orders)
    ]
    assert [[*first, *second, *third] for first, second, third in zip(*shares, strict=True)] == whole


def test_a_resumed_order_goes_on_where_it_stopped() -> None:
    uninterrupted, stopped, resumed = order_of(5, 4), order_of(5, 4), order_of(5, 4, seed=9)
    expected = take(uninterrupted, 8)
    take(stopped, 3)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 5) == expected[3:]


def test_fewer_questions_in_a_resumed_run_repeat_none_in_a_probe() -> None:
    stopped, resumed = order_of(8, 7), order_of(8, 2)
    take(stopped, 2)
    resumed.load_state_dict(stopped.state_dict())
    assert all(len(set(probe)) == 2 for probe in take(resumed, 20))


@pytest.mark.parametrize(
    "change", [{"rows": 6}, {"rows": None}, {"position": -1}, {"postponed": [7]}, {"position": None}]
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    order = order_of(5)
    before = order.state_dict()
    with pytest.raises((ValueError, TypeError)):
        order.load_state_dict({**before, "seed": 4, **change})
    assert order.state_dict() == before


def test_ten_million_prompts_take_no_time_no_memory_and_no_checkpoint() -> None:
    tracemalloc.start()
    order = order_of(ManyRows(), 8)
    probes = take(order, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({question for probe in probes for question in probe}) == 24
    assert peak < 100_000
    buffer = io.BytesIO()
    torch.save(make_callback(prompts=ManyRows()).state_dict(), buffer)
    assert len(buffer.getvalue()) < 20_000
