"""The user's functions run under the user's defaults of torch, whatever a measurement runs under."""

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch

from odp_callbacks.engine import Probe, ProbeConfig, Teacher
from odp_callbacks.engine.tree.nodes import every_node
from odp_callbacks.engine.user_defaults import UserDefaults, call_with_user_defaults, remembering_user_defaults
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.probes import ROWS
from tests.helpers.training import make_callback, make_loader, make_module, make_trainer


class Watch:
    """Functions of the user that note the defaults they run under, and in which thread."""

    def __init__(self) -> None:
        self.seen: dict[str, list[UserDefaults]] = {}
        self.threads: set[str] = set()
        self.values: set[float] = set()

    def note(self, function: str) -> None:
        self.seen.setdefault(function, []).append(UserDefaults())
        self.threads.add(threading.current_thread().name)

    def reward(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        self.note("reward")
        values = [float(torch.tensor(0.7 if len(text.split()) % 2 else 0.3)) for text in completions]
        self.values |= set(values)
        return values

    def lazy_reward(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        for text in completions:
            self.note("reward")
            yield float(len(text.split()) % 2)

    async def awaited_reward(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return self.reward(prompts, completions)

    def context(self, row: Any) -> str:
        self.note("context")
        return f"b {row['prompt']}"

    def nodes(self, rollout: Any, generator: torch.Generator) -> list[tuple[int, float]]:
        self.note("nodes")
        return every_node(rollout, generator)

    def check(self, expected: UserDefaults, functions: set[str]) -> None:
        assert set(self.seen) == functions
        for function, seen in self.seen.items():
            assert all(defaults == expected for defaults in seen), function


@pytest.mark.parametrize(
    ("precision", "reward"),
    [("bf16-true", "reward"), ("bf16-true", "lazy_reward"), ("bf16-true", "awaited_reward"), ("bf16-mixed", "reward")],
)
def test_a_probe_in_lightning_calls_the_user_s_functions_under_the_user_s_defaults(precision: Any, reward: str) -> None:
    watch, expected = Watch(), UserDefaults()
    callback = make_callback(
        reward=getattr(watch, reward), teachers={"hint": Teacher(watch.context)}, nodes=watch.nodes, update=False
    )
    make_trainer(callback, precision=precision, max_steps=2).fit(make_module(reward=None), make_loader())
    assert callback.monitor.probe_count == 1
    watch.check(expected, {"reward", "context", "nodes"})
    assert UserDefaults() == expected


def test_a_reward_of_0_7_stays_0_7_under_bf16_true() -> None:
    watch = Watch()
    callback = make_callback(reward=watch.reward, update=False)
    make_trainer(callback, precision="bf16-true", max_steps=2).fit(make_module(reward=None), make_loader())
    assert {round(value, 6) for value in watch.values} <= {0.7, 0.3}
    assert callback.last_report is not None
    assert {round(rollout.reward, 6) for rollout in callback.last_report.rollouts} <= {0.7, 0.3}


def test_a_default_dtype_of_the_user_s_own_holds_for_the_reward() -> None:
    watch = Watch()
    torch.set_default_dtype(torch.float64)
    try:
        expected = UserDefaults()
        make_trainer(make_callback(reward=watch.reward, update=False), precision="bf16-true", max_steps=2).fit(
            make_module(reward=None), make_loader()
        )
    finally:
        torch.set_default_dtype(torch.float32)
    watch.check(expected, {"reward"})


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_reward_of_a_training_step_runs_under_the_user_s_defaults(precision: Any) -> None:
    watch, expected = Watch(), UserDefaults()
    make_trainer(None, precision=precision, max_steps=1).fit(make_module(reward=watch.reward), make_loader())
    watch.check(expected, {"reward"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("around", ["nothing", "no_grad", "autocast"])
def test_a_probe_without_a_trainer_calls_them_as_outside_in_whichever_thread(
    dtype: torch.dtype, around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("odp_callbacks.engine.verifier.BATCH_SIZE", 2)
    watch = Watch()
    blocks: dict[str, Callable[[], Any]] = {
        "nothing": nullcontext,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    config = ProbeConfig(max_new_tokens=6, nodes=watch.nodes, update=False)
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        stack.enter_context(blocks[around]())
        expected = UserDefaults()
        probe = Probe(tiny("llama").float(), word_tokenizer(), watch.reward, Teacher(watch.context), config)
        probe.run(ROWS)
    watch.check(expected, {"reward", "nodes", "context"})
    assert "odp-verifier" in watch.threads


def test_no_thread_scores_while_the_default_dtype_is_another() -> None:
    """All threads share the default dtype, so the reward is called between the model's forwards."""
    watch = Watch()
    probe = Probe(
        tiny("llama").float(), word_tokenizer(), watch.reward, Teacher("b {prompt}"), max_new_tokens=6, update=False
    )
    probe.run(ROWS)
    assert "odp-verifier" in watch.threads
    watch.threads.clear()
    with remembering_user_defaults(), ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.float32)
        torch.set_default_dtype(torch.bfloat16)
        probe.run(ROWS)
    assert watch.threads == {threading.main_thread().name}


def test_everything_is_put_back_after_a_call_that_raises() -> None:
    def failing() -> None:
        raise KeyError("verifier")

    with (
        remembering_user_defaults(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
        torch.inference_mode(),
        ExitStack() as stack,
    ):
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        before = UserDefaults()
        inside = call_with_user_defaults(UserDefaults)
        assert inside.device == torch.device("cpu")
        assert inside.gradients
        assert not inside.inference
        assert inside.deterministic == (False, False)
        assert not inside.autocast["cpu"][0]
        with pytest.raises(KeyError, match="verifier"):
            call_with_user_defaults(failing)
        assert UserDefaults() == before
