"""Teachers that are models of their own: what they share with the student, their tokenizer, and their embeddings."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from odp_callbacks.engine import BaseTeacher, ModelTeacher, Probe, Teacher
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.teachers import EMATeacher, teacher_logits, teacher_prompt_ids
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import BOS, EOS, WORDS, randomise, tiny, tiny_base, word_tokenizer
from tests.helpers.probes import ROWS, measure, word_reward

A, B, C = (WORDS.index(word) for word in "abc")
SHARED = r"holds the student's own LoRA layers .*; `BaseTeacher\(\)` is the student's base"
OWN_TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}"


def lora_config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def test_the_base_that_became_the_student_is_refused() -> None:
    base = tiny_base()
    student = randomise(get_peft_model(base, lora_config()), "default", 0.3, 0).double()
    for model in (base, student, base.model, nn.ModuleList([base])):
        with pytest.raises(ValueError, match=SHARED):
            Probe(student, word_tokenizer(), word_reward, ModelTeacher(model))


def test_a_second_peft_model_of_the_same_base_is_refused_and_a_copy_is_not() -> None:
    base = tiny_base()
    student = get_peft_model(base, lora_config()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that the base has adapters already
        other = get_peft_model(base, lora_config(), adapter_name="other").double()
    with pytest.raises(ValueError, match="`AdapterTeacher"):
        ModelTeacher(other).check(student, word_tokenizer())
    ModelTeacher(tiny_base()).check(student, word_tokenizer())
    ModelTeacher(get_peft_model(tiny_base(), lora_config())).check(student, word_tokenizer())
    BaseTeacher().check(student, word_tokenizer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_move_by_what_half_precision_cannot_hold(dtype: torch.dtype) -> None:
    """300 steps of 0.001: the average follows in float32 as it does for a student in float32."""
    student = tiny().to(dtype)
    teacher = EMATeacher(0.999)
    teacher.update(student, 0)
    start = {name: average.clone() for name, average in teacher.average.items()}
    targets = {}
    with torch.no_grad():
        for parameter in lora_parameters(student).values():
            parameter.add_(0.5)
        targets = {name: parameter.float() for name, parameter in lora_parameters(student).items()}
    for step in range(1, 301):
        teacher.update(student, step)
        if step == 150:  # a checkpoint, and what an earlier version wrote in half precision
            resumed = EMATeacher(0.999)
            state = teacher.state_dict()
            assert {average.dtype for average in state["average"].values()} == {torch.float32}
            resumed.load_state_dict(state)
            resumed.update(student, step)
            teacher = resumed
    moved = 1 - 0.999**300
    for (name, average), target in zip(teacher.average.items(), targets.values(), strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, start[name] + moved * (target - start[name]), rtol=1e-4, atol=1e-5)
    old = EMATeacher(0.999)
    old.load_state_dict({"average": {name: average.to(dtype) for name, average in start.items()}, "step": 0})
    assert {average.dtype for average in old.average.values()} == {torch.float32}
    with teacher.policy(student) as (_, replacements):
        assert replacements is not None
        assert {value.dtype for value in replacements.values()} == {dtype}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def own_tokenizer(bos: bool = True) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = OWN_TEMPLATE if bos else OWN_TEMPLATE.replace("{{ bos_token }}", "")
    return tokenizer


@pytest.mark.parametrize("context", [None, "{prompt}", lambda row: row["prompt"]])
def test_messages_are_rendered_by_the_template_of_the_teacher(context: Any) -> None:
    tokenizer = word_tokenizer()
    teacher = ModelTeacher(tiny_base(), context, tokenizer=own_tokenizer())
    (question,) = as_questions([{"prompt": [user("a b")]}], tokenizer)
    assert teacher_prompt_ids(teacher, tokenizer, question).tolist() == [BOS, A, B, EOS]
    assert question.prompt_ids.tolist() != [BOS, A, B, EOS]


@pytest.mark.parametrize("tokenizer_of_teacher", [None, own_tokenizer(), own_tokenizer(bos=False)])
def test_a_rendered_string_gets_no_second_bos(tokenizer_of_teacher: Any) -> None:
    tokenizer = word_tokenizer()
    teachers: list[Teacher] = [ModelTeacher(tiny_base(), lambda row: "<s> a b", tokenizer=tokenizer_of_teacher)]
    teachers += [Teacher(lambda row: "<s> a b"), Teacher("<s> {prompt}")]
    (question,) = as_questions([{"prompt": "a b"}], tokenizer)
    for teacher in teachers:
        assert teacher_prompt_ids(teacher, tokenizer, question).tolist() == [BOS, A, B]
    plain = ModelTeacher(tiny_base(), "{prompt}", tokenizer=tokenizer_of_teacher)
    assert teacher_prompt_ids(plain, tokenizer, question).tolist() == [BOS, A, B]


def test_rows_that_came_as_ids_stay_as_they_are() -> None:
    tokenizer = word_tokenizer()
    (question,) = as_questions([{"input_ids": [A, B, C]}], tokenizer)
    teacher = ModelTeacher(tiny_base(), tokenizer=own_tokenizer())
    assert teacher_prompt_ids(teacher, tokenizer, question).tolist() == [A, B, C]


def student_of_padding_rows() -> nn.Module:
    """A student with 16 logits, of which the last is by far the most likely."""
    student = tiny(vocabulary=16)
    head = student.get_base_model().lm_head
    with torch.no_grad():
        head.weight[15] = 0
        head.weight[15] += 20 * torch.sign(head.weight[:12].sum(dim=0))
        head.weight[:15] *= 0.01
    return student


def test_a_token_that_the_teacher_does_not_embed_is_named() -> None:
    teacher = ModelTeacher(tiny_base(), tokenizer=word_tokenizer())
    message = r"a response that the student sampled .* has the token id 15, but LlamaForCausalLM has embeddings for 12"
    with pytest.raises(ValueError, match=message):
        teacher_logits(teacher, tiny(vocabulary=16), [torch.tensor([BOS, A])], [(A, 15, B)], [[0, 2]])
    with pytest.raises(ValueError, match=message):
        measure(student_of_padding_rows(), {"other": teacher}, max_new_tokens=6)


def test_a_prompt_that_a_model_does_not_embed_is_named() -> None:
    """A tokenizer with added tokens, and a model that was not resized."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["extra"])
    with pytest.raises(
        ValueError, match=r"question 0 has the token id 12, but .* embeddings for 12 tokens only.*resize"
    ):
        Probe(tiny(), tokenizer, word_reward, "base", max_new_tokens=4).validate([{"prompt": "a extra"}])
    probe = Probe(tiny(), tokenizer, word_reward, Teacher("{answer}"), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"question 0 for teacher 'self' has the token id 12"):
        probe.validate([{"prompt": "a", "answer": "extra"}])


class FakeProcessor:
    """A multimodal processor: images come first, and a template that reads content in parts."""

    def __init__(self, template: str | None) -> None:
        self.tokenizer = word_tokenizer()
        self.chat_template = template

    def __call__(self, images: Any = None, text: Any = None) -> Any:
        if images is not None:
            raise TypeError("invalid data type 'str'")
        return self.tokenizer(text)


PARTS = (
    "{% for m in messages %}{{ m.role }}{% for part in m.content %} {{ part.text }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


@pytest.mark.parametrize("template", [None, word_tokenizer().chat_template, PARTS], ids=["none", "text", "parts"])
def test_the_tokenizer_of_a_processor_is_used(template: str | None) -> None:
    processor = FakeProcessor(template)
    own = processor.tokenizer.chat_template
    report = measure(tiny(), "base", tokenizer=processor, max_new_tokens=4)
    expected = measure(tiny(), "base", max_new_tokens=4)
    assert [rollout.pieces for rollout in report.rollouts] == [rollout.pieces for rollout in expected.rollouts]
    probe = Probe(tiny(), processor, word_reward, "base", max_new_tokens=4)
    (question,) = probe.encode([{"prompt": [user("a b")]}])
    assert WORDS.index("user") in question.prompt_ids
    assert question.prompt_ids.tolist()[-1] == WORDS.index("assistant")
    assert [token for token in question.prompt_ids.tolist() if token in (A, B)] == [A, B]
    assert processor.tokenizer.chat_template == own


def test_a_processor_without_a_tokenizer_is_refused() -> None:
    class FeatureExtractor:
        def __call__(self, images: Any) -> Any:
            return images

    with pytest.raises(ValueError, match="a processor that holds one, but FeatureExtractor was given"):
        Probe(tiny(), FeatureExtractor(), word_reward, "base")


def test_a_teacher_takes_a_processor_too() -> None:
    teacher = ModelTeacher(tiny_base(seed=4), tokenizer=FakeProcessor(PARTS))
    probe = Probe(tiny(), word_tokenizer(), word_reward, teacher, max_new_tokens=4)
    (question,) = probe.encode([{"prompt": [user("a b")]}])
    user_token, assistant = WORDS.index("user"), WORDS.index("assistant")
    assert question.teacher_prompt_ids["model"].tolist() == [user_token, A, B, assistant]
    assert probe.run(ROWS).rollouts


def test_a_model_given_by_its_folder_teaches_as_the_model_itself(tmp_path: Path) -> None:
    model = tiny_base(seed=3)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    named, given = ModelTeacher(str(tmp_path)), ModelTeacher(model)
    report = measure(tiny(), {"named": named, "given": given}, continuations=1)
    for node in report.nodes:
        torch.testing.assert_close(node.logit_gram[-2], node.logit_gram[-1])
    assert not any(parameter.requires_grad for parameter in named.model.parameters())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model` names '.*', which is neither a folder with a model"):
        ModelTeacher(str(tmp_path)).check(tiny(), word_tokenizer())
