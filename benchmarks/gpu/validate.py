"""What works on a GPU, how fast and with how much memory: a random student of a real shape, sections one by one.

``python benchmarks/gpu/validate.py`` on a machine with a GPU prints a line for each figure; ``--output FILE`` keeps
them as JSON. A section that fails is reported with its error, and the others run; what would start after
``--minutes`` (10) is left out. ``--smoke`` runs every section with a tiny student on whatever device there is.
"""

import argparse
import copy
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from odp_callbacks import BaseTeacher, ProbeConfig, Teacher, diagnose
from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.backends import PrefilledRollouts, prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.decoder.choice import DecoderChoice, choose_decoder
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.update.gradient_rows import UpdateGradients

SHAPES = {
    "1.7B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 200,
    },
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Validation:
    """The student and what was measured so far."""

    def __init__(self, smoke: bool, device: str) -> None:
        self.smoke, self.device = smoke, torch.device(device)
        self.shape = SHAPES["tiny" if smoke else "1.7B"]
        self.figures: dict[str, Any] = {}
        words = {"<pad>": 0, "<eos>": 1} | {f"t{token}": token for token in range(2, self.shape["vocab_size"])}
        backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
        backend.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
        self.student = self.make_student()

    def make_student(self, attention: str = "sdpa", dtype: torch.dtype | None = None) -> nn.Module:
        """A seeded student with LoRA on all linear layers whose adapters are not zero."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen3", **self.shape, max_position_embeddings=8192, eos_token_id=1, pad_token_id=0, bos_token_id=2
        )
        dtype = dtype or (torch.float32 if self.smoke else torch.bfloat16)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        student = get_peft_model(model, LoraConfig(r=16, target_modules=LINEARS)).to(self.device)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        return student.eval()

    def rows(self, count: int, length: int) -> list[dict[str, Any]]:
        """Questions of random words."""
        generator = torch.Generator().manual_seed(length)
        size = self.shape["vocab_size"]
        drawn = torch.randint(3, size, (count, length), generator=generator).tolist()
        return [{"prompt": " ".join(f"t{token}" for token in row), "answer": f"t{row[0]}"} for row in drawn]

    def questions(self, count: int, length: int) -> list[Question]:
        """The same, encoded."""
        return [
            Question(str(index), row, torch.tensor(self.tokenizer(row["prompt"])["input_ids"]))
            for index, row in enumerate(self.rows(count, length))
        ]

    def note(self, name: str, value: Any) -> None:
        """Keep a figure and print it."""
        self.figures[name] = value
        print(f"{name}: {value}", flush=True)

    def peak(self, work: Callable[[], Any]) -> tuple[float, float, Any]:
        """Seconds, peak GiB above what was held before, and the result of some work."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        start = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else float("nan")
        return seconds, peak, result


def even_reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """One where the first word's number is even: random students succeed half of the time."""
    return [float(bool(text.split()) and int(text.split()[0].strip("t<>eospad") or 0) % 2 == 0) for text in completions]


def machine(validation: Validation) -> None:
    """What this runs on."""
    import transformers

    name = torch.cuda.get_device_name() if validation.device.type == "cuda" else platform.processor() or "CPU"
    validation.note("device", name)
    validation.note("versions", f"torch {torch.__version__}, transformers {transformers.__version__}")


def decode_against_full_forward(validation: Validation) -> None:
    """Logits by the path with a shared prefix cache, against the full forward, for each attention."""
    prompt, length = (8, 6) if validation.smoke else (200, 48)
    question = validation.questions(1, prompt)[0]
    response = torch.randint(3, validation.shape["vocab_size"], (length,), generator=torch.Generator().manual_seed(5))
    depths = list(range(length))
    for attention in ("eager", "sdpa"):
        student = validation.make_student(attention)
        sequence = torch.cat([question.prompt_ids, response]).to(validation.device)
        with torch.no_grad():
            (cached,) = response_logits(student, [question.prompt_ids], [response.tolist()], [depths])
            full = student(input_ids=sequence[None]).logits[0, prompt - 1 : prompt - 1 + length].float()
            exact = None
            if not validation.smoke:
                wide = copy.deepcopy(student).float()
                exact = wide(input_ids=sequence[None]).logits[0, prompt - 1 : prompt - 1 + length]
                del wide
        variation = 0.5 * (torch.softmax(cached.float(), -1) - torch.softmax(full, -1)).abs().sum(-1)
        validation.note(f"total variation to the full forward, {attention}", round(float(variation.max()), 6))
        if exact is not None:
            rounding = 0.5 * (torch.softmax(exact, -1) - torch.softmax(full, -1)).abs().sum(-1)
            validation.note(f"total variation of bf16 to float32, {attention}", round(float(rounding.max()), 6))


@torch.no_grad()
def steps_against_full_forward(validation: Validation) -> None:
    """Logits of the steps of continuations, by few calls and by the model's forward pass, against the full forward."""
    prompt, length, steps = (8, 6, 3) if validation.smoke else (200, 64, 16)
    generator = torch.Generator().manual_seed(6)
    size = validation.shape["vocab_size"]
    prompts = [question.prompt_ids for question in validation.questions(2, prompt)]
    responses = [torch.randint(3, size, (length - 2 * place,), generator=generator) for place in range(3)]
    for attention in ("eager", "sdpa"):
        student = validation.make_student(attention)
        prefixes = prefill_rollouts(student, prompts, responses, (0, 0, 1), "shared prefix")
        assert prefixes.cache is not None
        requests = [
            ContinuationRequest(sequence, len(prefixes.sequences[sequence]) - back, 3, steps)
            for sequence in range(3)
            for back in (0, 2)
        ]
        tokens = torch.randint(3, size, (steps, len(requests)), generator=generator).to(validation.device)
        choice = choose_decoder(student, prefixes.cache, prompt + length + steps, 2**36)
        validation.note(f"few calls, {attention}", choice.reason or f"used, by table: {choice.by_table}")
        ways = {"forward pass": DecoderChoice(None)}
        if choice.parts is not None:
            ways["blocks"] = choice._replace(by_table=False)
        if choice.by_table:
            ways["table"] = choice
        for name, way in ways.items():
            slots = way.slots(student, prefixes.cache, steps)
            view = prefixes.cache.shared_prefix_view(requests, validation.device, steps)
            slots.set_row_count(len(requests))
            slots.set_view(view)
            found = []
            for step in range(steps):
                found.append(slots.logits(tokens[step], view.prefix_lengths + step).float())
                view.set_suffix_lengths(view.suffix_lengths + 1, step + 1, True)
            worst = 0.0
            for row, request in enumerate(requests):
                prefix = prefixes.sequences[request.sequence][: request.prefix_length].to(validation.device)
                whole = torch.cat([prefix, tokens[:, row]])
                full = student(input_ids=whole[None]).logits[0, -steps:].float()
                own = torch.stack([logits[row] for logits in found])
                worst = max(worst, float(0.5 * (torch.softmax(own, -1) - torch.softmax(full, -1)).abs().sum(-1).max()))
            validation.note(f"total variation of steps by {name}, {attention}", round(worst, 6))


def prefixes_and_requests(
    validation: Validation, slots: int, prompt: int, length: int
) -> tuple[PrefilledRollouts, list[ContinuationRequest]]:
    """As many continuations as there are slots, eight of each prompt."""
    prompts = [question.prompt_ids for question in validation.questions(max(1, slots // 8), prompt)]
    requests = [
        ContinuationRequest(row % len(prompts), len(prompts[0]) - 1, int(prompts[0][-1]), length)
        for row in range(slots)
    ]
    return prefill_rollouts(validation.student, prompts, backend="shared prefix"), requests


@torch.no_grad()
def sampling_speed(validation: Validation) -> None:
    """Tokens per second of rollouts and continuations, beside the full forward over as many tokens and vLLM."""
    prompt, length = (6, 4) if validation.smoke else (256, 128)
    all_slots = (2, 4) if validation.smoke else (32, 64, 256)
    for slots in all_slots:
        prefixes, requests = prefixes_and_requests(validation, slots, prompt, length)

        def sample(requests: list[ContinuationRequest] = requests, prefixes: PrefilledRollouts = prefixes) -> None:
            sample_continuations(
                validation.student, prefixes, requests, temperature=1.0, eos_token_ids=(),
                keys=range(len(requests)), batch_size=len(requests),
            )  # fmt: skip

        # A few tokens first: kernels are chosen and compiled when they are first needed.
        sample([replace(request, max_new_tokens=4) for request in requests])
        seconds, peak, _ = validation.peak(sample)
        validation.note(f"tokens/s, {slots} slots", round(slots * length / seconds))
        validation.note(f"milliseconds a step, {slots} slots", round(1000 * seconds / length, 1))
        validation.note(f"peak GiB of sampling, {slots} slots", round(peak, 2))
    ids = torch.randint(3, validation.shape["vocab_size"], (8, 16 if validation.smoke else 512))

    def run() -> Any:
        return validation.student(input_ids=ids.to(validation.device), logits_to_keep=1)

    run()
    seconds, _, _ = validation.peak(run)
    validation.note("full forward tokens/s", round(ids.numel() / seconds))
    student: Any = validation.student
    embedding = student.get_input_embeddings().weight
    is_read = [p for p in student.parameters() if p is not embedding or p is student.get_output_embeddings().weight]
    bytes_read = sum(parameter.numel() * parameter.element_size() for parameter in is_read)
    validation.note("GiB of weights that a step reads at least", round(bytes_read / 2**30, 3))
    source = torch.empty(2**20 if validation.smoke else 2**32, dtype=torch.uint8, device=validation.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds, _, _ = validation.peak(lambda: [target.copy_(source) for _ in range(10)])
    bytes_a_second = 20 * source.numel() / seconds
    validation.note("milliseconds to read these once (roofline)", round(1000 * bytes_read / bytes_a_second, 2))
    vllm_speed(validation, all_slots, prompt, length)


def vllm_speed(validation: Validation, all_slots: tuple[int, ...], prompt: int, length: int) -> None:
    """The same by vLLM in this process, on the student without its adapter, if vLLM is installed."""
    if importlib.util.find_spec("vllm") is None or validation.device.type != "cuda":
        validation.note("vLLM tokens/s", "vLLM is not installed here")
        return
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        base: Any = copy.deepcopy(validation.student)
        base.unload().save_pretrained(folder)
        validation.tokenizer.save_pretrained(folder)
        del base
        engine = LLM(folder, dtype="bfloat16", gpu_memory_utilization=0.4, max_model_len=2 * (prompt + length))
        for slots in all_slots:
            texts = [question.prompt_ids.tolist() for question in validation.questions(max(1, slots // 8), prompt)]
            inputs = [{"prompt_token_ids": texts[row % len(texts)]} for row in range(slots)]
            options = SamplingParams(max_tokens=length, temperature=1.0, ignore_eos=True, detokenize=False)
            engine.generate(inputs, options, use_tqdm=False)
            start = time.perf_counter()
            engine.generate(inputs, options, use_tqdm=False)
            validation.note(f"vLLM tokens/s, {slots} slots", round(slots * length / (time.perf_counter() - start)))


def gradient_memory(validation: Validation) -> None:
    """Seconds and peak memory of the update's gradients and of token influence, one response after a short prompt."""
    teachers = {"base": BaseTeacher()}
    direction = distillation_direction("reverse_kl", None, None, 1.0)
    for name, limit in (("", None), (", at most 6 GiB", 6 * 2**30)):
        gradients = UpdateGradients(
            validation.student, validation.tokenizer, teachers, direction, 1.0, max_memory_bytes=limit
        )
        validation.note(f"body and head apart{name}", gradients.model.splits)
        for length in (8, 16) if validation.smoke else (1024, 1024, 2048, 4096):
            gradients_of_length(validation, gradients, length, name)


def gradients_of_length(validation: Validation, gradients: UpdateGradients, length: int, name: str) -> None:
    """The figures of one length; the first time that a length is run, kernels are chosen, so 1,024 is run twice."""
    question = validation.questions(1, 32)[0]
    drawn = torch.randint(3, validation.shape["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))
    rollout = Rollout(question, tuple(drawn.tolist()), "", True, 1.0)
    seconds, peak, (rows, directions) = validation.peak(lambda: gradients.rows([rollout], [0.5]))
    validation.note(f"gradient rows, {length} tokens{name}", f"{seconds:.2f} s, {peak:.2f} GiB")
    tangents = {parameter: row[:1] for parameter, row in rows.items()}
    try:
        seconds, peak, _ = validation.peak(lambda: gradients.influences([rollout], tangents, directions))
        validation.note(f"token influence, {length} tokens{name}", f"{seconds:.2f} s, {peak:.2f} GiB")
    except torch.OutOfMemoryError:
        validation.note(f"token influence, {length} tokens{name}", "out of memory")


def probe_and_update(validation: Validation) -> None:
    """A whole probe with continuations, and the update alone, by stage."""
    rows = validation.rows(4 if validation.smoke else 8, 6 if validation.smoke else 64)
    teachers = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher()}
    options: dict[str, Any] = {
        "rollouts_per_question": 2 if validation.smoke else 4, "max_new_tokens": 4 if validation.smoke else 128,
    }  # fmt: skip
    for name, budget in (("update", 0), ("probe", 40 if validation.smoke else 20_000)):
        config = ProbeConfig(**options, budget=budget)
        seconds, peak, report = validation.peak(
            lambda c=config: diagnose(validation.student, validation.tokenizer, rows, even_reward, teachers, config=c)
        )
        stages = {stage: round(spent, 2) for stage, spent in report.stage_seconds.items()}
        validation.note(f"{name}, seconds and peak GiB", f"{seconds:.1f} s, {peak:.2f} GiB")
        validation.note(f"{name}, stages", stages)
        gains = [s.figures["update_gain"] for s in report.summary() if s.split == "all"]
        validation.note(f"{name}, update gains", [(round(g.value, 4), round(g.half_width, 4)) for g in gains])


def training_bits(validation: Validation) -> None:
    """Three training steps end in the same bits with and without probes."""
    from lightning.pytorch import Trainer, seed_everything
    from torch.utils.data import DataLoader

    from odp_callbacks import GradientAlignmentCallback, OnPolicyDistillation

    own_shape, validation.shape = validation.shape, SHAPES["tiny"]
    rows = validation.rows(8, 5)

    def train(with_callback: bool) -> list[torch.Tensor]:
        seed_everything(0, verbose=False)
        student = validation.make_student(dtype=torch.float32).train()
        module = OnPolicyDistillation(
            student, validation.tokenizer, Teacher("{answer} {prompt}"), max_new_tokens=4, learning_rate=1e-2
        )
        callbacks = [
            GradientAlignmentCallback(
                {"base": BaseTeacher()}, rows, even_reward, every_n_steps=1, max_overhead=None, questions_per_probe=3,
                rollouts_per_question=2, max_new_tokens=4, continuations=2, strict=True,
            )
        ]  # fmt: skip
        trainer = Trainer(
            max_steps=3, accelerator="gpu" if validation.device.type == "cuda" else "cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            callbacks=callbacks if with_callback else [],
        )  # fmt: skip
        trainer.fit(module, DataLoader(rows, batch_size=2, shuffle=True, collate_fn=list))
        state = [parameter.detach().cpu().clone() for parameter in module.parameters()]
        if validation.device.type == "cuda":
            state.append(torch.cuda.get_rng_state())
        return [*state, torch.get_rng_state()]

    try:
        without, with_probes = train(False), train(True)
    finally:
        validation.shape = own_shape
    validation.note("three steps end in the same bits", all(map(torch.equal, without, with_probes)))


SECTIONS = (
    machine,
    training_bits,
    decode_against_full_forward,
    steps_against_full_forward,
    gradient_memory,
    probe_and_update,
    sampling_speed,
)


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny student")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="no section starts later")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--sections", nargs="*", default=[section.__name__ for section in SECTIONS])
    arguments = parser.parse_args()
    begin = time.perf_counter()
    validation = Validation(arguments.smoke, arguments.device)
    for section in SECTIONS:
        if section.__name__ not in arguments.sections:
            continue
        start = time.perf_counter()
        if start - begin > 60 * arguments.minutes:
            validation.note(f"{section.__name__} left out", f"{arguments.minutes:g} minutes are over")
            continue
        try:
            section(validation)
        except Exception as error:
            if arguments.smoke:
                raise
            validation.note(f"{section.__name__} failed", f"{type(error).__name__}: {str(error)[:600]}")
        print(f"[{section.__name__}: {time.perf_counter() - start:.0f} s]", flush=True)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(validation.figures, indent=1))


if __name__ == "__main__":
    main()
