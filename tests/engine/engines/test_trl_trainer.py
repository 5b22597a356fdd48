"""The engine of TRL's trainer: when a guest may use it, and what it sends to a server, which needs a GPU to run."""

from types import SimpleNamespace

import pytest
import torch

from odp_callbacks.engine.engines import EngineError
from odp_callbacks.engine.engines.merged_weights import merged_weights
from odp_callbacks.engine.engines.trl_trainer import TrainerServerEngine, engine_of_trainer
from tests.helpers.trainers import add_callback, plain_trainer


def test_a_trainer_without_vllm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`engine` is that of the trainer, but Trainer does not sample with vLLM"):
        add_callback(plain_trainer(tmp_path), engine="trainer")


def test_requests_that_several_processes_share_are_refused():
    generation = SimpleNamespace(llm=object(), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="spreads each request over 2 processes"):
        engine_of_trainer(SimpleNamespace(vllm_generation=generation))


class Client:
    """Notes what TRL's client would send by NCCL."""

    base_url, model = "http://localhost:1", "student"

    def __init__(self):
        self.sent, self.resets = [], 0

    def update_named_params(self, described, weights):
        self.sent.append((described, {name: weight.clone() for name, weight in weights}))

    def reset_prefix_cache(self):
        self.resets += 1


def server_engine(client, processes=1, **notes):
    accelerator, state = SimpleNamespace(num_processes=processes), SimpleNamespace(global_step=7)
    generation = SimpleNamespace(vllm_client=client)
    return engine_of_trainer(SimpleNamespace(accelerator=accelerator, state=state, vllm_generation=generation, **notes))


@pytest.mark.parametrize("note", ["_last_loaded_step", "_last_vllm_sync_step"])
def test_a_server_gets_weights_only_where_the_trainer_will_set_its_own(student, note):
    client = Client()
    server_engine(client, **{note: 7}).sync(student, 0)
    assert not client.sent  # it has them, and the trainer would not set them again
    engine = server_engine(client, **{note: 6})
    assert isinstance(engine, TrainerServerEngine)
    engine.sync(student, 0)
    ((described, weights),) = client.sent
    assert [name for name, _, _ in described] == list(weights)
    assert {(dtype, tuple(shape)) for _, dtype, shape in described} == {
        (str(weight.dtype)[6:], tuple(weight.shape)) for weight in weights.values()
    }
    assert all(torch.equal(weights[name], weight) for name, weight in merged_weights(student))
    assert client.resets == 1


def test_a_server_whose_weights_cannot_be_set_is_refused(student):
    with pytest.raises(ValueError, match="whose weights only the main process can set"):
        server_engine(Client(), processes=2)
    with pytest.raises(EngineError, match="would get newer weights than the training means it to have"):
        server_engine(Client(), _last_vllm_sync_step=6, vllm_sync_frequency=4).sync(student, 0)
    with pytest.raises(EngineError, match="does not note when it got weights"):
        server_engine(Client()).sync(student, 0)
