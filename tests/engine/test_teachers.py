import pytest
import torch
from peft import LoraConfig

from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.teachers import (
    AdapterTeacher,
    BaseTeacher,
    EMATeacher,
    ModelTeacher,
    Teacher,
    as_teachers,
    teacher_logits,
    teacher_prompt_ids,
)
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import (
    BOS,
    WORDS,
    Snapshot,
    flat_parameters,
    paddable,
    randomise,
    tiny,
    tiny_base,
    word_tokenizer,
)

A, B, C = (WORDS.index(w) for w in "abc")
PROMPTS = [torch.tensor([BOS, A, B]), torch.tensor([BOS, A, B])]
RESPONSES = [(C, A, B, 2), (B, 2)]
DEPTHS = [[0, 2], [1]]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def student_with_two_adapters(family="llama", dropout=0.0):
    """A student with a second adapter, which does not train."""
    student = tiny(family, dropout=dropout)
    targets = ["c_attn", "c_proj"] if family == "gpt2" else TARGETS
    student.add_adapter("other", LoraConfig(r=2, target_modules=targets, lora_dropout=dropout))
    return randomise(student, "other", 0.2, 1).double()


def reference_logits(model, prompts=PROMPTS):
    """Logits by one full forward for each sequence."""
    with torch.no_grad():
        return [
            model(input_ids=torch.cat([p, torch.tensor(r)])[None]).logits[0, [len(p) - 1 + t for t in d]]
            for p, r, d in zip(prompts, RESPONSES, DEPTHS, strict=True)
        ]


def assert_all_close(all_logits, expected):
    for a, b in zip(all_logits, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def logits_of(teacher, student, prompts=PROMPTS):
    return teacher_logits(teacher, student, prompts, RESPONSES, DEPTHS)


def test_the_student_as_teacher_gives_bit_identical_logits(family):
    student = paddable(family)
    with torch.no_grad():
        of_student = response_logits(student, PROMPTS, RESPONSES, DEPTHS)
    for a, b in zip(logits_of(Teacher(), student), of_student, strict=True):
        assert torch.equal(a, b)


def test_the_base_teacher_is_the_student_without_adapters(family):
    student = tiny(family)
    with student.disable_adapter():
        expected = reference_logits(student)
    assert_all_close(logits_of(BaseTeacher(), student), expected)
    assert not torch.allclose(expected[0], reference_logits(student)[0], atol=1e-3)


def test_an_adapter_teacher_is_the_student_with_that_adapter(family):
    student = student_with_two_adapters(family)
    of_student = reference_logits(student)
    all_logits = logits_of(AdapterTeacher("other"), student)
    student.set_adapter("other")
    assert_all_close(all_logits, reference_logits(student))
    assert not torch.allclose(all_logits[0], of_student[0], atol=1e-3)


def test_a_model_teacher_is_that_model(student):
    other = tiny_base("gpt2")
    assert_all_close(logits_of(ModelTeacher(other), student), reference_logits(other))


def test_a_teacher_with_a_longer_context_receives_the_same_response(student):
    longer = [torch.tensor([BOS, C, C, A, A, B])] * 2
    all_logits = logits_of(Teacher("c c a {prompt}"), student, longer)
    assert_all_close(all_logits, reference_logits(student, longer))
    assert not torch.allclose(all_logits[0], reference_logits(student)[0], atol=1e-3)


@pytest.mark.parametrize("make", [BaseTeacher, lambda: AdapterTeacher("other"), EMATeacher, Teacher])
@pytest.mark.parametrize("fails", [False, True])
def test_the_student_is_restored(make, fails):
    student = student_with_two_adapters(dropout=0.5)
    student.train()
    next(student.get_base_model().lm_head.parameters()).requires_grad_(True)
    next(iter(lora_parameters(student).values())).requires_grad_(False)
    before = Snapshot(student)
    with pytest.raises(ZeroDivisionError) if fails else torch.no_grad(), make().policy(student):
        if fails:
            raise ZeroDivisionError
    before.check()


def test_disabled_adapters_stay_disabled():
    student = student_with_two_adapters()
    with student.disable_adapter():
        before = Snapshot(student)
        with AdapterTeacher("other").policy(student) as (model, _):
            assert_all_close(
                [model(input_ids=PROMPTS[0][None]).logits], [_switched("other")(input_ids=PROMPTS[0][None]).logits]
            )
        before.check()


def _switched(adapter):
    student = student_with_two_adapters()
    student.set_adapter(adapter)
    return student


@pytest.mark.parametrize("fails", [False, True])
def test_another_model_runs_in_evaluation_mode(student, fails):
    other = tiny(dropout=0.5, seed=4)
    other.train()
    before = Snapshot(other)
    with pytest.raises(ZeroDivisionError) if fails else torch.no_grad(), ModelTeacher(other).policy(student):
        assert not any(m.training for m in other.modules())
        if fails:
            raise ZeroDivisionError
    before.check()


def test_the_average_follows_the_student(student):
    teacher = EMATeacher(decay=0.75)
    vectors = [flat_parameters(student)]
    teacher.update(student, 0)
    for step in (1, 2):
        randomise(student, "default", 0.5, step)
        vectors.append(flat_parameters(student))
        teacher.update(student, step)
        teacher.update(student, step)  # a second call for the same step
    expected = 0.75 * (0.75 * vectors[0] + 0.25 * vectors[1]) + 0.25 * vectors[2]
    average = torch.cat([p.flatten() for p in teacher.average.values()])
    torch.testing.assert_close(average, expected, rtol=1e-14, atol=1e-15)
    # Its logits are those of a student with these parameters.
    reference, start = tiny(), 0
    for parameter in lora_parameters(reference).values():
        parameter.data = expected[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    before = Snapshot(student)
    assert_all_close(logits_of(teacher, student), reference_logits(reference))
    before.check()
    restored = EMATeacher(decay=0.75)
    restored.load_state_dict(teacher.state_dict())
    restored.update(student, 2)  # a step that the average includes already
    assert_all_close(logits_of(restored, student), reference_logits(reference))


def test_the_average_starts_at_the_student(student):
    assert_all_close(logits_of(EMATeacher(), student), reference_logits(student))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\)"):
        EMATeacher(decay)


def test_another_vocabulary_is_refused(student, tokenizer):
    with pytest.raises(ValueError, match="student has 12 logits and this teacher 16; if they differ by padding rows"):
        ModelTeacher(tiny_base(vocabulary=16)).check(student, tokenizer)
    with pytest.raises(ValueError, match=r"this teacher's 12 tokens differs from the student's 12"):
        ModelTeacher(tiny_base(), tokenizer=word_tokenizer(WORDS[:4] + WORDS[:3:-1])).check(student, tokenizer)
    ModelTeacher(tiny_base("gpt2")).check(student, tokenizer)


@pytest.mark.parametrize("rows", [16, 12])
def test_padding_rows_are_left_out(tokenizer, rows):
    """In student and teacher alike, if they have more logits than the tokenizer has tokens."""
    student, other = tiny(vocabulary=28 - rows), tiny_base(vocabulary=rows, seed=2)
    teacher = ModelTeacher(other, tokenizer=word_tokenizer())
    teacher.check(student, tokenizer)
    all_logits = logits_of(teacher, student)
    assert all(x.shape[-1] == 12 for x in all_logits)
    assert_all_close(all_logits, [x[:, :12] for x in reference_logits(other)])


def test_an_unknown_adapter_is_refused(student, tokenizer):
    with pytest.raises(ValueError, match=r"one of the student's adapters \['default'\], but 'gold' was given"):
        AdapterTeacher("gold").check(student, tokenizer)


def user(text):
    return {"role": "user", "content": text}


ROW = {"prompt": "a b", "answer": "c", "facts": {"x": "d"}}
CHAT = [{"role": "system", "content": "e"}, user("f"), {"role": "assistant", "content": "a"}, user("b")]


@pytest.mark.parametrize(
    ("context", "row", "expected"),
    [
        (None, ROW, "a b"),
        ("{answer} {prompt}", ROW, "c a b"),
        ("{facts[x]} {{}} {prompt}", ROW, "d {} a b"),
        (lambda row: row["answer"] * 2, ROW, "cc"),
        (None, {"prompt": CHAT}, CHAT),
        ("{answer} {prompt}", {**ROW, "prompt": CHAT}, [*CHAT[:3], user("c b")]),
        ("{prompt} {answer}", {**ROW, "prompt": [*CHAT, CHAT[2]]}, [*CHAT[:3], user("b c"), CHAT[2]]),
        (lambda row: [user(row["answer"])], ROW, [user("c")]),
    ],
)
def test_prompts_in_context(context, row, expected):
    assert Teacher(context).prompt(row) == expected
    assert row["prompt"] in ("a b", CHAT, [*CHAT, CHAT[2]]), "the row itself is unchanged"


def test_contexts_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"`context` names the column 'solution', but the row has only \['answer'"):
        Teacher("{solution}").prompt(ROW)
    with pytest.raises(ValueError, match=r"`context` replaces the last user message, but .* has none"):
        Teacher("{prompt}").prompt({"prompt": CHAT[:1]})
    with pytest.raises(TypeError, match="`context` must be a template, a function of the row or None, but 3"):
        Teacher(3)


def test_prompt_ids(tokenizer):
    (question,) = as_questions([ROW], tokenizer)
    assert teacher_prompt_ids(Teacher(), tokenizer, question) is question.prompt_ids
    assert teacher_prompt_ids(Teacher("{answer} {prompt}"), tokenizer, question).tolist() == [BOS, C, A, B]


def test_as_teachers(student):
    base, own = BaseTeacher(), Teacher("{answer}")
    assert as_teachers({"x": base, "y": own}) == {"x": base, "y": own}
    assert as_teachers([base, own, AdapterTeacher("gold"), EMATeacher()]).keys() == {"base", "self", "gold", "ema"}
    assert as_teachers(base) == {"base": base}
    assert isinstance(as_teachers("base")["base"], BaseTeacher)
    assert as_teachers(student)["model"].model is student
    assert as_teachers({"t": "see {answer}"})["t"].context == "see {answer}"
    assert as_teachers(str)["self"].context is str


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "`teachers` is empty"),
        ([], "`teachers` is empty"),
        (["{a}", "{b}"], "of the same kind need names"),
        ({"a/b": "base"}, "must have no '/', .* but `teachers` got 'a/b'"),
        ({"a\u202eb": "base"}, "only characters that can be seen"),
        ({"\ud800": "base"}, "only characters that can be seen"),
        ({"a" * 101: "base"}, "at most 100 of them"),
        ({"": "base"}, "must have no '/'"),
        ("basis", "knows 'base' and templates"),
        (3, "takes teachers, models, templates or functions, but 3"),
        (None, "takes teachers, models"),
    ],
)
def test_as_teachers_refuses_other_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        as_teachers(bad)
