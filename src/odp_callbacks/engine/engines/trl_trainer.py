"""The vLLM engine that TRL's trainer samples with, as a guest: its weights are as before when a probe ends.

TRL 1.16 keeps the engine in ``trainer.vllm_generation``, OnlineDPOTrainer in ``trainer.llm``. Either has the merged
weights of the student at the step of the training's last rollouts, and no adapter. A probe comes later than that, so
the weights of the moment are put in place first. The methods of the trainer that do so are not called: they merge the
student in place, in all processes together, and the training notes when it called them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from odp_callbacks.engine.engines.completions_client import CompletionsClient
from odp_callbacks.engine.engines.interface import TOLERANCE, EngineError, EngineSample, SamplingEngine, SamplingOptions
from odp_callbacks.engine.engines.merged_weights import merged_weights
from odp_callbacks.engine.engines.vllm_in_process import failing_as_engine_error, sample_with_llm

LOADED_STEPS = ("_last_loaded_step", "_last_vllm_sync_step")
"""Attributes in which trainers keep the step at which their engine got the student's weights last."""


def engine_of_trainer(trainer: Any) -> SamplingEngine:
    """Return the engine that a trainer of TRL samples with.

    Args:
        trainer: The trainer, with ``use_vllm=True``.

    Raises:
        ValueError: If it has none, or one that a guest cannot use.
    """
    generation = getattr(trainer, "vllm_generation", None)
    holder = trainer if generation is None else generation
    if getattr(holder, "llm", None) is not None:
        sizes = ("tensor_parallel_size", "vllm_tensor_parallel_size")
        parallel = max(getattr(holder, size, 1) for size in sizes)
        if parallel > 1:
            raise ValueError(
                f"`engine` is that of the trainer, which spreads each request over {parallel} processes; a probe "
                "samples in one, so use `vllm_tensor_parallel_size=1`, or another engine."
            )
        return ColocatedEngine(holder)
    if getattr(holder, "vllm_client", None) is not None:
        if trainer.accelerator.num_processes > 1:
            raise ValueError(
                "`engine` is the server of the trainer, whose weights only the main process can set; with several "
                "processes, use `vllm_mode='colocate'`, or a server that loads adapters."
            )
        return TrainerServerEngine(trainer, holder.vllm_client)
    raise ValueError(
        f"`engine` is that of the trainer, but {type(trainer).__name__} does not sample with vLLM in this process; set "
        "`use_vllm=True`, or leave `engine` out."
    )


class ColocatedEngine:
    """The engine of a trainer in the same process (``vllm_mode="colocate"``).

    Args:
        holder: What holds the ``vllm.LLM`` as ``llm``.
        tolerance: Mean absolute difference between its log-probabilities and the student's, in nats, above which a
            probe refuses it.

    Attributes:
        name: ``"vLLM of the trainer"``.
        is_colocated: It is on the student's device.
    """

    is_colocated = True

    def __init__(self, holder: Any, *, tolerance: float = TOLERANCE) -> None:
        self.holder, self.llm, self.tolerance = holder, holder.llm, tolerance
        self.name = "vLLM of the trainer"
        self._kept: dict[str, Tensor] = {}
        self._was_sleeping = self._is_synced = False

    @property
    def model(self) -> Any:
        """The engine's own model, a module that can load weights by their names in the student's base."""
        model: Any = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        return model

    def sync(self, student: nn.Module, step: int) -> None:
        """Put the student's weights of the moment in place, and keep those that were there."""
        self.release()
        with failing_as_engine_error(self.name, "to take the student's weights"):
            self._is_synced = True
            # Asleep, it has no weights: the trainer's generation puts them all in place again when it wakes it.
            self._was_sleeping = bool(getattr(self.holder, "_llm_weights_sleeping", False)) or (
                self.llm.llm_engine.is_sleeping()
            )
            if self._was_sleeping:
                torch.cuda.empty_cache()  # it takes its memory from the device, beside what torch keeps
                self.llm.wake_up()
            else:
                self._kept = self._copies([name for name, _ in merged_weights(student)])
            for name, weight in merged_weights(student, every_weight=self._was_sleeping):
                self.model.load_weights([(name, weight)])
            self.llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[EngineSample]:
        """Sample one response to each prompt from the weights of the last :meth:`sync`."""
        if not self._is_synced:
            raise EngineError(f"`engine` ({self.name}) has no weights of the student; call `sync` first.")
        return sample_with_llm(self.llm, self.name, None, prompts, **options)

    def release(self) -> None:
        """Put the weights back that were there, bit for bit, or let the engine sleep again."""
        if not self._is_synced:
            return
        self._is_synced = False
        kept, self._kept = self._kept, {}
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in kept.items():
                parameters[name].copy_(weight)
        self.llm.reset_prefix_cache()
        if self._was_sleeping:
            self.llm.sleep(level=2)

    def _copies(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies, on the CPU, of the parameters that hold these weights: an engine joins those of neighbours."""
        blocks = {name.rsplit(".", 2)[0] + "." for name in names}  # "model.layers.0.mlp." of "….up_proj.weight"
        parameters = dict(self.model.named_parameters())
        of_blocks = {name for name in parameters if any(name.startswith(block) for block in blocks)}
        if any(not any(name.startswith(block) for name in of_blocks) for block in blocks):
            of_blocks = set(parameters)  # the engine has other names
        return {name: parameters[name].detach().to("cpu", copy=True) for name in of_blocks}


class TrainerServerEngine:
    """The server of a trainer (``vllm_mode="server"``), which receives weights over NCCL.

    Weights cannot be read back from a server. So they are set only where the trainer will set its own before it samples
    again, which it does at every step that it has not noted yet.

    Args:
        trainer: The trainer.
        client: Its client of the server.
        tolerance: Mean absolute difference between the server's log-probabilities and the student's, in nats, above
            which a probe refuses it.

    Attributes:
        name: The address of the server.
    """

    def __init__(self, trainer: Any, client: Any, *, tolerance: float = TOLERANCE) -> None:
        self.trainer, self.client, self.tolerance = trainer, client, tolerance
        self.completions = CompletionsClient(client.base_url)
        self.name = self.completions.name

    def sync(self, student: nn.Module, step: int) -> None:
        """Send the student's weights of the moment, unless the server has them."""
        if getattr(self.trainer, "vllm_sync_frequency", 1) != 1:
            raise EngineError(
                f"`engine` ({self.name}) would get newer weights than the training means it to have; set "
                "`vllm_sync_frequency=1`, or use another engine."
            )
        loaded = [getattr(self.trainer, name) for name in LOADED_STEPS if hasattr(self.trainer, name)]
        if not loaded:
            raise EngineError(
                f"`engine` ({self.name}): {type(self.trainer).__name__} does not note when it got weights."
            )
        if self.trainer.state.global_step in loaded:
            return
        with failing_as_engine_error(self.name, "to take the student's weights"):
            described = [
                (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                for name, weight in merged_weights(student)
            ]
            self.client.update_named_params(described, merged_weights(student))
            self.client.reset_prefix_cache()

    def sample(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[EngineSample]:
        """Sample one response to each prompt from the server's weights."""
        return self.completions.sample(self.client.model, prompts, **options)

    def release(self) -> None:
        """Do nothing: the trainer sets its weights itself before it samples again."""
