"""Students whose parameters are spread over processes, and the whole copies on which they are measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from odp_callbacks import EMATeacher, OnPolicyDistillation, Teacher
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.callbacks.student_replica import StudentReplica, WholeStudent
from odp_callbacks.engine.sharded_parameters import copy_whole_values, whole_shape
from odp_callbacks.engine.training_rollouts import TrainingRollout
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.probes import ALL_GRADIENTS
from tests.helpers.training import ROWS, TEACHERS, make_loader, make_watching_callback, states_equal
from tests.helpers.two_processes import run_in_two_processes, trainer_of_two

RESPONSE = [6, 7, 8, 9]


class FixedResponses(LightningModule):
    """Trains on given responses, so that all processes run the same number of forward passes."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.student = tiny("llama", dropout=0.2).float().train()
        self.tokenizer = word_tokenizer()
        self.sharded = sharded
        self.last_rollouts: list[TrainingRollout] = []

    def configure_model(self) -> None:
        if self.sharded:
            shard(self.student, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.last_rollouts = [
            TrainingRollout(ROWS[self.global_rank], RESPONSE[:length], reward=float(length % 2)) for length in (3, 4)
        ]
        input_ids = torch.tensor([[1, 10 + self.global_rank, *RESPONSE]])
        loss: Tensor = self.student(input_ids=input_ids, labels=input_ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2)


def shard(student: Any, mesh: Any = None) -> None:
    """Shard each layer, and the rest of the student, as FSDP2 is used."""
    from torch.distributed.fsdp import fully_shard

    for layer in student.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    values = {name: torch.empty(whole_shape(parameter)) for name, parameter in parameters.items()}
    copy_whole_values(list(parameters.values()), list(values.values()))
    return values


def log_to(callback: Any, logged: list[dict[str, float]]) -> None:
    log = callback._log

    def log_and_keep(trainer: Any, metrics: dict[str, float], report: Any) -> None:
        logged.append(metrics)
        log(trainer, metrics, report)

    callback._log = log_and_keep


def _train(rank: int, folder: Path) -> None:
    outcomes: dict[Any, Any] = {}
    for sharded, watched in ((True, True), (True, False), (False, True)):
        strategy: Any = DDPStrategy(process_group_backend="gloo")
        if sharded:
            strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        teachers = {"answer": TEACHERS["answer"], "ema": EMATeacher(0.5, "{answer} {prompt}")}
        options = {"teachers": teachers, "max_new_tokens": 4, "at_start": True, "step_gain_every_n_steps": 1}
        callback = make_watching_callback(**options, **ALL_GRADIENTS) if watched else None
        logged: list[dict[str, float]] = []
        if callback is not None:
            log_to(callback, logged)
        module = FixedResponses(sharded)
        trainer = trainer_of_two(strategy, callback, max_steps=3, max_epochs=-1)
        trainer.fit(module, make_loader())
        moments = [
            value.full_tensor() if hasattr(value, "full_tensor") else value
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
        ]
        end_state = (whole(dict(module.named_parameters())), moments, torch.get_rng_state())
        report = None if callback is None else callback.last_report
        is_replica = callback is not None and callback.monitor.whole_student.is_replica
        gains = [{name: value for name, value in metrics.items() if "/step/" in name} for metrics in logged]
        outcomes[sharded, watched] = end_state, report, gains, is_replica
    torch.save(outcomes, folder / f"{rank}.pt")


@pytest.mark.slow
def test_fully_sharded_training_keeps_its_bits_and_is_measured_like_ddp(tmp_path: Path) -> None:
    for outcomes in run_in_two_processes(_train, tmp_path):
        end_state, report, gains, is_replica = outcomes[True, True]
        assert is_replica
        assert states_equal(end_state, outcomes[True, False][0])
        ddp_state, ddp_report, ddp_gains, ddp_has_replica = outcomes[False, True]
        assert not ddp_has_replica
        for name, value in end_state[0].items():
            torch.testing.assert_close(value, ddp_state[0][name])
        assert len({rollout.question for rollout in report.rollouts}) == 2
        assert [rollout.text for rollout in report.rollouts] == [rollout.text for rollout in ddp_report.rollouts]
        for node, ddp_node in zip(report.nodes, ddp_report.nodes, strict=True):
            np.testing.assert_array_equal(node.total, ddp_node.total)
            np.testing.assert_allclose(node.gram, ddp_node.gram, rtol=1e-3, atol=1e-6)
        assert sum(map(len, gains)) > 0
        for figures, ddp_figures in zip(gains, ddp_gains, strict=True):
            assert figures.keys() == ddp_figures.keys()
            np.testing.assert_allclose(list(figures.values()), list(ddp_figures.values()), rtol=1e-3, atol=1e-6)


@pytest.fixture
def sharded_student(tmp_path: Path) -> Any:
    """A student sharded in a world of this one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    student = tiny("llama").float()
    shard(student)
    yield student
    dist.destroy_process_group()


def test_a_replica_equals_the_student_also_after_a_step_and_another_adapter_state(sharded_student: Any) -> None:
    input_ids = torch.tensor([[1, 6, 7, 8]])
    held = WholeStudent()
    replica: Any = held.of(sharded_student)
    assert held.of(sharded_student) is replica
    with torch.no_grad():
        for parameter in sharded_student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    for layer in filter(lambda module: isinstance(module, LoraLayer), sharded_student.modules()):
        layer.scaling["default"] = 3.0
    held.synchronize()
    with torch.no_grad():  # an evaluation leaves whole values behind, which are not those that an optimizer steps on
        torch.testing.assert_close(replica(input_ids).logits, sharded_student(input_ids).logits)
    held.synchronize()
    replica.train()
    assert not sharded_student.training
    for parameter in sharded_student.parameters():
        parameter.requires_grad_(False)
    assert held.of(sharded_student) is not replica, "another training needs another copy"


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: tiny("llama", seed=1).float(), "must return the student with the same base, but .* differs"),
        (lambda: tiny("qwen3", num_hidden_layers=1).float(), "the same LoRA, but the student trains .*layers.1"),
    ],
)
def test_a_loaded_replica_must_be_the_student(sharded_student: Any, load: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentReplica(sharded_student, Processes(), load)


def test_a_loaded_replica_gets_the_lora_that_is_trained(sharded_student: Any) -> None:
    loaded = tiny("llama", scale=0.0).float()
    replica = StudentReplica(sharded_student, Processes(), lambda: loaded)
    assert replica.student is loaded
    input_ids = torch.tensor([[1, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, sharded_student(input_ids).logits)


def test_what_cannot_load_a_student_is_refused() -> None:
    with pytest.raises(TypeError, match="`student_replica` must be a function"):
        WholeStudent("folder")  # type: ignore[arg-type]  # that is refused


def test_the_distillation_module_refuses_a_student_whose_processes_it_cannot_keep_together(
    sharded_student: Any,
) -> None:
    module = OnPolicyDistillation(sharded_student, word_tokenizer(), Teacher("{answer} {prompt}"))
    with pytest.raises(ValueError, match="`student` is sharded, but OnPolicyDistillation samples"):
        module.on_fit_start()
