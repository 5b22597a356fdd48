"""Every way in which peft adapts a student by LoRA: its gradients are correct, or the student is refused."""

from itertools import combinations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices, supports_projection
from odp_callbacks.engine.gradients.vjp import node_gram_matrices
from odp_callbacks.engine.sampling.backend_selection import BACKENDS, backend_of
from odp_callbacks.engine.student import check_student, difference_from_base, other_trained_parameters
from odp_callbacks.engine.teachers import AdapterTeacher, BaseTeacher, Teacher, teacher_logits
from odp_callbacks.functional import lora_parameters
from odp_callbacks.functional.gradients import evaluation_mode
from tests.helpers.models import Snapshot, randomise, relative, tiny, tiny_base, word_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"
)

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])
POSITIONS = [2, 8, 5]
TARGETS = ["q_proj", "v_proj", "down_proj"]
EMBEDDED = [*TARGETS, "embed_tokens", "lm_head"]
TIED = {"tie_word_embeddings": True}

# Options of the adapter, and changes of the base.
MEASURED = {
    "plain": ({}, {}),
    "rank-stabilised": ({"use_rslora": True}, {}),
    "DoRA": ({"use_dora": True}, {}),
    "DoRA of embeddings": ({"use_dora": True, "target_modules": [*TARGETS, "embed_tokens"]}, {}),
    "with biases": ({"lora_bias": True}, {"attention_bias": True, "mlp_bias": True}),
    "ranks and scales of their own": ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}}, {}),
    "embeddings and head": ({"target_modules": EMBEDDED}, {}),
    "tied embeddings and head, each with its own": ({"target_modules": EMBEDDED}, TIED),
    "tied embeddings": ({"target_modules": [*TARGETS, "embed_tokens"]}, TIED),
    "tied embeddings and head with one": ({"target_modules": EMBEDDED, "ensure_weight_tying": True}, TIED),
    "a parameter": ({"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]}, {}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
}
WITH_OTHER_PARAMETERS = {
    "copy of the head": ({"modules_to_save": ["lm_head"]}, {}),
    "copy of the norms": ({"modules_to_save": ["norm"]}, {}),
    "copies of embeddings and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied copy": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED),
    "token embeddings": ({"trainable_token_indices": [1, 5]}, {}),
    "tied token embeddings": ({"trainable_token_indices": [1, 5]}, TIED),
}
BASE_CHANGED = {
    "biases": ({"bias": "lora_only"}, {"attention_bias": True}, "its own parameters train"),
    "repeated layers": ({"layer_replication": [(0, 2), (1, 2)]}, {}, "`layer_replication`"),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, "`init_lora_weights='pissa'`"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_2"}, {}, "`init_lora_weights='pissa_niter_2'`"),
    "OLoRA": ({"init_lora_weights": "olora"}, {}, "`init_lora_weights='olora'`"),
}


def adapted(options, changes, config=LoraConfig):
    """A student whose trained parameters are all moved from their initial values."""
    base = tiny_base("llama", **changes)
    base = base.float() if options.get("init_lora_weights") in ("pissa", "pissa_niter_2", "olora") else base
    student = get_peft_model(base, config(**{"r": 2, "lora_alpha": 4, "target_modules": TARGETS, **options}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return student.double().eval()


def directions(counts=(3, 1, 5)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(c, 12, generator=generator, dtype=torch.float64) for c in counts]


def reference_gradient(student, position, cotangent):
    """The gradient by one forward and one backward, through ``.grad``."""
    student.zero_grad()
    (student(input_ids=IDS[None]).logits[0, position] @ cotangent).backward()
    trained = {n: p for n, p in student.named_parameters() if ".lora_" in n and p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
    student.zero_grad()
    for (name, p), (other, q) in combinations(trained.items(), 2):
        if p.data_ptr() == q.data_ptr():  # tied parameters, one the transpose of the other
            gradients[name] += gradients.pop(other).T
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize(
    ("options", "changes"),
    [*MEASURED.values(), *WITH_OTHER_PARAMETERS.values(), *[case[:2] for case in BASE_CHANGED.values()]],
    ids=[*MEASURED, *WITH_OTHER_PARAMETERS, *BASE_CHANGED],
)
def test_gradients_and_policy_are_those_of_the_model(options, changes):
    student = adapted(options, changes)
    check_student(student)
    assert backend_of(student) == BACKENDS[0]
    expected = [
        torch.stack([reference_gradient(student, p, v) for v in c])
        for p, c in zip(POSITIONS, directions(), strict=True)
    ]
    before = Snapshot(student)
    for ends in (None, [3, 6, 9]):
        grams = node_gram_matrices(student, IDS, POSITIONS, directions(), ends=ends).grams
        for gram, rows in zip(grams, expected, strict=True):
            assert relative(gram.sum(0), rows @ rows.mT) < 1e-6
            assert float(gram.sum(0).diagonal().min()) > 0
    assert supports_projection(student) == ("target_parameters" not in options)
    if supports_projection(student):
        sketches = projected_gram_matrices(
            student, IDS, POSITIONS, directions(), 2000, torch.Generator().manual_seed(0)
        )
        for sketch, rows in zip(sketches, expected, strict=True):
            assert relative(sketch[0], rows @ rows.mT) < 0.2
    with torch.no_grad():
        (whole,) = student(input_ids=IDS[None]).logits
        (logits,) = teacher_logits(Teacher(), student, [IDS[:4]], [IDS[4:].tolist()], [[0, 3, 5]])
    torch.testing.assert_close(logits, whole[[3, 6, 8]], rtol=1e-6, atol=1e-6)
    if "target_parameters" not in options:  # peft's forward registers and removes a parametrization
        before.check()


def test_all_lora_parameters_are_measured():
    dora = lora_parameters(adapted(*MEASURED["DoRA"]))
    assert sum("lora_magnitude_vector" in name for name in dora) == 6
    assert {n.split(".lora_")[1].split(".")[0] for n in lora_parameters(adapted(*MEASURED["embeddings and head"]))} == {
        *("A", "B", "embedding_A", "embedding_B")
    }
    for options, changes in MEASURED.values():
        assert not other_trained_parameters(adapted(options, changes))


@pytest.mark.parametrize(("options", "changes"), WITH_OTHER_PARAMETERS.values(), ids=WITH_OTHER_PARAMETERS)
def test_other_trained_parameters_give_a_warning_and_are_not_measured(options, changes, tokenizer):
    student = adapted(options, changes)
    other_parameters = other_trained_parameters(student)
    assert other_parameters
    assert all("modules_to_save" in name or "trainable_tokens" in name for name in other_parameters)
    with pytest.warns(UserWarning, match=f"also trains {sum(other_parameters.values()):,} parameters beside its LoRA"):
        probe = Probe(student, tokenizer, lambda prompts, completions, **_: [0.0] * len(prompts), "base")
    assert set(probe.modules) == {f"model.layers.{i}.{m}" for i in (0, 1) for m in (
        "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
    )}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "changes"),
    [*MEASURED.values(), *WITH_OTHER_PARAMETERS.values()],
    ids=[*MEASURED, *WITH_OTHER_PARAMETERS],
)
def test_the_base_teacher_is_the_original_model(options, changes, tokenizer):
    student = adapted(options, changes)
    BaseTeacher().check(student, tokenizer)
    before = Snapshot(student)
    (logits,) = teacher_logits(BaseTeacher(), student, [IDS[:4]], [IDS[4:].tolist()], [[5]])
    if "target_parameters" not in options:
        before.check()
    with torch.no_grad():
        expected = tiny_base("llama", **changes)(input_ids=IDS[None]).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(student(input_ids=IDS[None]).logits[0, -1], expected, atol=1e-3)


@pytest.mark.parametrize(("options", "changes", "reason"), BASE_CHANGED.values(), ids=BASE_CHANGED)
def test_a_base_that_differs_from_the_original_model_is_refused_as_teacher(options, changes, reason, tokenizer):
    student = adapted(options, changes)
    with torch.no_grad(), student.disable_adapter() if "bias" not in options else torch.enable_grad():
        without_adapters = student(input_ids=IDS[None]).logits
        assert not torch.allclose(
            without_adapters, tiny_base("llama", **changes)(input_ids=IDS[None]).logits, atol=1e-3
        )
    with pytest.raises(ValueError, match=f"not the original model: {reason}"):
        BaseTeacher().check(student, tokenizer)


def test_a_base_that_trains_is_refused_as_teacher(student, tokenizer):
    assert difference_from_base(student) is None
    student.get_base_model().model.norm.weight.requires_grad_(True)
    assert other_trained_parameters(student) == {"base_model.model.model.norm.weight": 16}
    with pytest.raises(ValueError, match=r"its own parameters train \(model.norm.weight, …\); give the original model"):
        BaseTeacher().check(student, tokenizer)


@pytest.mark.parametrize("first", [["lm_head"], None])
def test_adapters_with_and_without_a_copied_module(first):
    """If only one adapter has a copy in ``modules_to_save``, the other one runs the original module."""
    student = adapted({"modules_to_save": first}, {})
    other = LoraConfig(r=3, target_modules=["k_proj"], modules_to_save=None if first else ["lm_head"])
    student.add_adapter("other", other)
    randomise(student, "other", 0.3, 1).double()
    before = Snapshot(student)
    (logits,) = teacher_logits(AdapterTeacher("other"), student, [IDS[:4]], [IDS[4:].tolist()], [[5]])
    before.check()
    student.set_adapter("other")
    with torch.no_grad():
        torch.testing.assert_close(logits[0], student(input_ids=IDS[None]).logits[0, -1], rtol=1e-6, atol=1e-6)


def test_two_active_adapters_are_both_measured(student):
    student.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj", "q_proj"]))
    randomise(student, "other", 0.3, 1).double()
    student.base_model.set_adapter(["default", "other"])
    check_student(student)
    expected = torch.stack([reference_gradient(student, 8, v) for v in directions()[0]])
    assert {name.split(".")[-2] for name in lora_parameters(student)} == {"default", "other"}
    (gram,) = node_gram_matrices(student, IDS, [8], directions()[:1]).grams
    assert relative(gram.sum(0), expected @ expected.mT) < 1e-6


def test_layers_without_a_peft_model():
    """peft's layers are inserted into a model, as transformers' ``add_adapter`` does."""
    student = inject_adapter_in_model(LoraConfig(r=2, target_modules=TARGETS), tiny_base())
    randomise(student, "default", 0.3, 0).double()
    check_student(student)
    expected = torch.stack([reference_gradient(student, 8, v) for v in directions()[0]])
    (gram,) = node_gram_matrices(student, IDS, [8], directions()[:1]).grams
    assert relative(gram.sum(0), expected @ expected.mT) < 1e-6


def test_adalora_is_measured():
    options = {"init_r": 2, "target_r": 2, "total_step": 10}
    student = adapted({**options, "r": 8}, {}, AdaLoraConfig)
    check_student(student)
    assert any("lora_E" in name for name in lora_parameters(student))
    expected = torch.stack([reference_gradient(student, 8, v) for v in directions()[0]])
    (gram,) = node_gram_matrices(student, IDS, [8], directions()[:1]).grams
    assert relative(gram.sum(0), expected @ expected.mT) < 1e-6


def merged_student():
    student = tiny()
    student.merge_adapter()
    return student


def student_without_adapters():
    student = tiny()
    student.disable_adapter_layers()
    return student


def mixed_student():
    student = PeftMixedModel(tiny_base(), LoraConfig(r=2, target_modules=TARGETS), "default")
    student.add_adapter("other", LoHaConfig(r=2, target_modules=TARGETS))
    return student


def student_on_several_devices():
    student = tiny()
    student.get_base_model().model.layers[1].mlp.to("meta")  # where accelerate leaves what it has offloaded
    return student


def adapted_by(config):
    return get_peft_model(tiny_base(), config)


REFUSED = {
    "(IA)³": (
        lambda: adapted_by(IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])), "method is IA3"
    ),
    "prompt tuning": (
        lambda: adapted_by(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), "method is PROMPT_TUNING"
    ),
    "LoHa": (lambda: adapted_by(LoHaConfig(target_modules=TARGETS, r=2)), "method is LOHA"),
    "VeRA": (lambda: adapted_by(VeraConfig(target_modules=["q_proj"], r=2)), "method is VERA"),
    "mixed": (mixed_student, "method is LOHA"),
    "merged": (merged_student, "merged into the base's.*call `student.unmerge_adapter"),
    "switched off": (student_without_adapters, "has its adapters switched off"),
    "activated LoRA": (
        lambda: adapted({"alora_invocation_tokens": [6], "task_type": "CAUSAL_LM"}, {}), "peft's ALoraLinearVariant"
    ),
    "several devices": (student_on_several_devices, r"lies on several devices \(cpu, meta\).*`device_map={'': 0}`"),
    "no adapter": (tiny_base, "has no LoRA parameters"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_students_are_refused_at_construction(make, message, tokenizer):
    student = make()
    with pytest.raises(ValueError, match=message):
        Probe(student, tokenizer, lambda prompts, completions, **_: [0.0] * len(prompts), Teacher("a {prompt}"))


def test_a_student_merged_after_construction_is_refused_and_stays_merged():
    student = tiny()
    probe = Probe(
        student,
        word_tokenizer(),
        lambda prompts, completions, **_: [0.0] * len(prompts),
        "base",
        ProbeConfig(max_new_tokens=3),
    )
    student.merge_adapter()
    before = Snapshot(student)
    with pytest.raises(ValueError, match="merged"):
        probe.run([{"prompt": "a b"}])
    before.check()


@pytest.fixture
def make_four_bit_student(tmp_path):
    """A function that makes students with a 4-bit base; bitsandbytes runs on a CPU."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_base(hidden_size=64, intermediate_size=64, head_dim=16).float().save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def make(**options):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map="cpu")
        student = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS, **options))
        return randomise(student, "default", 0.3, 0).train()

    return make


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_gradients_of_a_four_bit_student_are_those_of_its_training(make_four_bit_student, options):
    """The reference is a backward in training mode; after the measurement it gives the same gradients."""
    student = make_four_bit_student(**options)
    expected = torch.stack([reference_gradient(student, 8, v.float()) for v in directions()[0]]).double()
    before = Snapshot(student)
    with evaluation_mode(student):
        check_student(student)
        assert backend_of(student) == BACKENDS[0]
        supports_projection(student)  # must not raise, whatever the result
        (gram,) = node_gram_matrices(student, IDS, [8], directions()[:1]).grams
    assert relative(gram.sum(0), expected @ expected.mT) < 1e-3
    before.check()
    after = torch.stack([reference_gradient(student, 8, v.float()) for v in directions()[0]]).double()
    assert torch.equal(after, expected)


def test_four_bit_weights_packed_for_inference_are_refused(make_four_bit_student):
    student = make_four_bit_student()
    layer = student.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed for inference"):
        check_student(student)
