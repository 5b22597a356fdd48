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


def with_other(family="llama", dropout=0.0):
    """A student with a second adapter, which does not train."""
    student = tiny(family, dropout=dropout)
    targets = ["c_attn", "c_proj"] if family == "gpt2" else TARGETS
    student.add_adapter("other", LoraConfig(r=2, target_modules=targets, lora_dropout=dropout))
    return randomise(student, "other", 0.2, 1).double()


def plain(model, prompts=PROMPTS):
    """Logits by one full forward a sequence."""
    with torch.no_grad():
        return [
            model(input_ids=torch.cat([p, torch.tensor(r)])[None]).logits[0, [len(p) - 1 + t for t in d]]
            for p, r, d in zip(prompts, RESPONSES, DEPTHS, strict=True)
        ]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def logits(teacher, student, prompts=PROMPTS):
    return teacher_logits(teacher, student, prompts, RESPONSES, DEPTHS)


def test_the_student_itself_gives_the_same_bits(family):
    student = paddable(family)
    with torch.no_grad():
        own = response_logits(student, PROMPTS, RESPONSES, DEPTHS)
    for a, b in zip(logits(Teacher(), student), own, strict=True):
        assert torch.equal(a, b)


def test_base(family):
    student = tiny(family)
    with student.disable_adapter():
        expected = plain(student)
    close(logits(BaseTeacher(), student), expected)
    assert not torch.allclose(expected[0], plain(student)[0], atol=1e-3)


def test_another_adapter(family):
    student = with_other(family)
    own = plain(student)
    found = logits(AdapterTeacher("other"), student)
    student.set_adapter("other")
    close(found, plain(student))
    assert not torch.allclose(found[0], own[0], atol=1e-3)


def test_another_model(student):
    other = tiny_base("gpt2")
    close(logits(ModelTeacher(other), student), plain(other))


def test_a_longer_context_sees_the_same_response(student):
    longer = [torch.tensor([BOS, C, C, A, A, B])] * 2
    found = logits(Teacher("c c a {prompt}"), student, longer)
    close(found, plain(student, longer))
    assert not torch.allclose(found[0], plain(student)[0], atol=1e-3)


@pytest.mark.parametrize("make", [BaseTeacher, lambda: AdapterTeacher("other"), EMATeacher, Teacher])
@pytest.mark.parametrize("fails", [False, True])
def test_the_student_is_put_back(make, fails):
    student = with_other(dropout=0.5)
    student.train()
    next(student.get_base_model().lm_head.parameters()).requires_grad_(True)
    next(iter(lora_parameters(student).values())).requires_grad_(False)
    before = Snapshot(student)
    with pytest.raises(ZeroDivisionError) if fails else torch.no_grad(), make().policy(student):
        if fails:
            raise ZeroDivisionError
    before.check()


def test_a_student_whose_adapters_are_off_stays_so():
    student = with_other()
    with student.disable_adapter():
        before = Snapshot(student)
        with AdapterTeacher("other").policy(student) as (model, _):
            close([model(input_ids=PROMPTS[0][None]).logits], [_switched("other")(input_ids=PROMPTS[0][None]).logits])
        before.check()


def _switched(adapter):
    student = with_other()
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


def test_average_follows_the_student(student):
    teacher = EMATeacher(decay=0.75)
    vectors = [flat_parameters(student)]
    teacher.update(student, 0)
    for step in (1, 2):
        randomise(student, "default", 0.5, step)
        vectors.append(flat_parameters(student))
        teacher.update(student, step)
        teacher.update(student, step)  # told twice of the same step
    expected = 0.75 * (0.75 * vectors[0] + 0.25 * vectors[1]) + 0.25 * vectors[2]
    average = torch.cat([p.flatten() for p in teacher.average.values()])
    torch.testing.assert_close(average, expected, rtol=1e-14, atol=1e-15)
    # Its logits are those of a student with these parameters.
    reference, start = tiny(), 0
    for parameter in lora_parameters(reference).values():
        parameter.data = expected[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    before = Snapshot(student)
    close(logits(teacher, student), plain(reference))
    before.check()
    again = EMATeacher(decay=0.75)
    again.load_state_dict(teacher.state_dict())
    again.update(student, 2)  # a step that it already knows
    close(logits(again, student), plain(reference))


def test_average_starts_at_the_student(student):
    close(logits(EMATeacher(), student), plain(student))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_average_needs_a_share(decay):
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\)"):
        EMATeacher(decay)


def test_another_vocabulary_is_an_error(student, tokenizer):
    with pytest.raises(ValueError, match="student has 12 logits and this teacher 16; if they differ by padding rows"):
        ModelTeacher(tiny_base(vocabulary=16)).check(student, tokenizer)
    with pytest.raises(ValueError, match=r"this teacher's 12 tokens differs from the student's 12"):
        ModelTeacher(tiny_base(), tokenizer=word_tokenizer(WORDS[:4] + WORDS[:3:-1])).check(student, tokenizer)
    ModelTeacher(tiny_base("gpt2")).check(student, tokenizer)


@pytest.mark.parametrize("rows", [16, 12])
def test_padding_rows_go(tokenizer, rows):
    """Whichever of the two has more logits than the tokenizer has tokens."""
    student, other = tiny(vocabulary=28 - rows), tiny_base(vocabulary=rows, seed=2)
    teacher = ModelTeacher(other, tokenizer=word_tokenizer())
    teacher.check(student, tokenizer)
    found = logits(teacher, student)
    assert all(x.shape[-1] == 12 for x in found)
    close(found, [x[:, :12] for x in plain(other)])


def test_an_unknown_adapter(student, tokenizer):
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
def test_contexts(context, row, expected):
    assert Teacher(context).prompt(row) == expected
    assert row["prompt"] in ("a b", CHAT, [*CHAT, CHAT[2]]), "the row itself is left as it was"


def test_contexts_that_cannot_be(tokenizer):
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
def test_as_teachers_rejects(bad, message):
    with pytest.raises(ValueError, match=message):
        as_teachers(bad)
