"""Programs that run where vLLM is: ``python -m tests.helpers.vllm_programs NAME BASE RESULT``.

Each measures with an engine in its own process, and writes what the tests compare as JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CPU_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_batched_tokens": 4096,
}
QUESTIONS = [{"prompt": "a b"}, {"prompt": "c d"}]
MEASURED: dict[str, Any] = {"max_new_tokens": 8, "rollouts_per_question": 8, "continuations": 2, "influence": False}


def reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float("a" in completion) for completion in completions]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def in_process(base: Path) -> dict[str, Any]:
    """A ``vllm.LLM`` that the user made, with two adapters one after the other, and a limit of the time."""
    from vllm import LLM

    from odp_callbacks import diagnose
    from odp_callbacks.engine.engines import VllmInProcess
    from odp_callbacks.engine.engines.agreement import check_agreement
    from odp_callbacks.engine.sampling.randomness import Randomness
    from odp_callbacks.engine.teachers import BaseTeacher
    from tests.helpers.models import EOS, word_tokenizer
    from tests.helpers.vllm import served_student

    llm = LLM(model=str(base), enable_lora=True, max_lora_rank=8, max_num_seqs=64, seed=0, **CPU_OPTIONS)
    engine = VllmInProcess(llm)
    differences = []
    for seed in (1, 2):
        student = served_student(seed)
        engine.sync(student, seed)
        options: dict[str, Any] = {"max_new_tokens": 16, "stop_token_ids": [EOS], "randomness": Randomness(0)}
        differences.append(check_agreement(engine, student, [torch.tensor([1, 6, 7])] * 4, **options))
    with BaseTeacher().policy(student):
        engine.sync(student, 3)
        differences.append(check_agreement(engine, student, [torch.tensor([1, 6, 7])] * 4, **options))
    engine.sync(student, 4)
    sampling: dict[str, Any] = {"temperature": 1.0, "stop_token_ids": [EOS]}
    many = engine.sample([[1, 6]] * 64, max_tokens=[200] * 64, seeds=range(64), **sampling, seconds=0.02)
    few = engine.sample([[1, 6]] * 8, max_tokens=[8] * 8, seeds=range(8), **sampling)
    alone = [engine.sample([[1, 6]], max_tokens=[8], seeds=[seed], **sampling)[0] for seed in range(8)]
    engine.release()
    report = diagnose(student, word_tokenizer(), QUESTIONS, reward, {"base": "base"}, engine=llm, **MEASURED)
    return {
        "differences": differences,
        "unfinished": sum(sample.finish_reason == "unfinished" for sample in many),
        "alone": [one.token_ids == other.token_ids for one, other in zip(few, alone, strict=True)],
        "engine": report.settings["engine"],
        "continuations": report.continuations,
        "adapters": len(llm.llm_engine.list_loras()),
    }


def trl_trainer(base: Path) -> dict[str, Any]:
    """The engine of a GRPO trainer: the same training without and with probes, and what they leave behind."""
    with_plain_weights()
    plain, _, _ = _train(base, with_probes=False)
    probed, callback, trainer = _train(base, with_probes=True)
    engine_model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    student_before, engine_before = bits(trainer.model), bits(engine_model)
    callback.monitor.run_probe(callback.trainer_context())
    report = callback.last_report
    return {
        "same_training": same(plain, probed),
        "trained": not same(plain, {name: torch.zeros_like(weight) for name, weight in plain.items()}),
        "same_student": same(student_before, bits(trainer.model)),
        "same_engine": same(engine_before, bits(engine_model)),
        "probes": callback.monitor.probe_count,
        "engine": report.settings["engine"],
        "continuations": report.continuations,
    }


def with_plain_weights() -> None:
    """Let vLLM keep its weights as it does on a GPU, where a trainer can replace them; on CPUs it packs them."""
    import vllm._custom_ops as operations
    from vllm.model_executor.layers import utils

    operations._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *sizes: False


def _train(base: Path, with_probes: bool) -> tuple[dict[str, Tensor], Any, Any]:
    """Train two steps; the trained parameters, the callback and the trainer."""
    import trl.generation.vllm_generation as generation
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from odp_callbacks import GradientAlignmentTrainerCallback
    from tests.helpers.models import randomise, word_tokenizer

    original = generation.LLM
    generation.LLM = lambda **options: original(**{**options, **CPU_OPTIONS})
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    student = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise(student, "default", 0.3, 0)
    args = GRPOConfig(
        output_dir=str(base / "output"),
        use_vllm=True,
        vllm_mode="colocate",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(QUESTIONS * 4)
    trainer = GRPOTrainer(student, reward, args=args, train_dataset=rows, processing_class=word_tokenizer())
    generation.LLM = original
    callback = None
    if with_probes:
        options: dict[str, Any] = {"engine": "trainer", "every_n_steps": 1, "max_overhead": None, "strict": True}
        callback = GradientAlignmentTrainerCallback(
            trainer, {"base": "base"}, QUESTIONS, reward, questions_per_probe=2, **options, **MEASURED
        )
        trainer.add_callback(callback)
    trainer.train()
    return bits(student), callback, trainer


PROGRAMS: dict[str, Callable[[Path], dict[str, Any]]] = {"in_process": in_process, "trl_trainer": trl_trainer}

if __name__ == "__main__":
    name, base, result = sys.argv[1:]
    Path(result).write_text(json.dumps(PROGRAMS[name](Path(base))))
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would keep the process
