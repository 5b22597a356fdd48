import numpy as np
import pytest
import torch
import torch.nn.functional as F

from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED, UNDETERMINED, estimate
from odp_callbacks.engine import BaseTeacher, EMATeacher, ModelTeacher, Teacher, every_node
from tests.helpers.models import WORDS, paddable, tiny, tiny_base
from tests.helpers.probes import ROWS, assert_same_measurements, measure, word_reward


def test_base_teacher_of_an_untrained_student_is_undefined_for_certain(family):
    student = paddable(family, scale=0.0)
    report = measure(student, {"base": BaseTeacher(), "self": Teacher(), "ema": EMATeacher()}, nodes=every_node)
    assert len(report.nodes) > 10
    for node in report.nodes:
        estimates = estimate(node)
        assert list(estimates.status) == [UNDEFINED] * 3
        assert np.isnan(estimates.alignment).all()
        assert np.isnan(estimates.logit_alignment).all()
        assert (estimates.predicted_gain == 0).all()


def test_base_teacher_of_a_trained_student_has_an_alignment(family):
    estimates = [estimate(n) for n in measure(paddable(family), "base").nodes]
    assert any(e.status == [DEFINED] for e in estimates)
    assert all((e.status == [DEFINED]) == np.isfinite(e.alignment) for e in estimates)
    assert not any(e.status == [UNDEFINED] for e in estimates if e.ideal_norm > 0)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("budget", [None, 40])
def test_the_same_reward_everywhere_has_no_alignment(reward, budget, student):
    report = measure(
        student, "base", reward=lambda prompts, completions: [reward] * len(prompts), continuations=3, budget=budget
    )
    for node in report.nodes:
        estimates = estimate(node)
        assert np.isnan(estimates.alignment).all()
        assert np.isnan(estimates.logit_alignment).all()
        assert estimates.predicted_gain == pytest.approx([0], abs=1e-15)
        assert estimates.status[0] in (UNDEFINED, UNDETERMINED)
        seen_all = node.probability.sum() > 1 - 1e-9
        assert (estimates.status == [UNDEFINED]) == (bool(node.exact.all()) and seen_all)


def reverse_kl(student_logits, teacher_logits):
    p, q = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def test_a_users_loss_equals_the_named_one(student):
    assert_same_measurements(measure(student, "base", divergence=reverse_kl), measure(student, "base"), rtol=1e-9)


def test_a_users_loss_and_a_teacher_that_equals_the_student():
    report = measure(tiny(scale=0.0), "base", divergence=reverse_kl)
    assert all(estimate(node).status == [UNDEFINED] for node in report.nodes)


def test_teachers_with_a_context_see_the_same_response(student, tokenizer):
    read, continued = [], []

    def record(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:  # prompts, but for their last token
            read.extend(row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True))
        elif kwargs.get("shared_prefix") is not None:  # what follows them
            continued.extend(ids.tolist())

    hook = student.get_base_model().register_forward_pre_hook(record, with_kwargs=True)
    teachers = {"answer": Teacher("{answer} e {prompt}"), "gold": Teacher(lambda row: row["answer"])}
    report = measure(student, teachers)
    hook.remove()
    for question, row in enumerate(ROWS):
        rollouts = [i for i, r in enumerate(report.rollouts) if r.question == str(question)]
        for prompt in (f"{row['answer']} e {row['prompt']}", row["answer"]):
            ids = tokenizer(prompt)["input_ids"]
            assert ids[:-1] in read
            for i in rollouts:
                response = [WORDS.index(p) for p in report.rollouts[i].pieces]
                deepest = max(n.depth for n in report.nodes if n.rollout == i)
                expected = [ids[-1], *response[:deepest]]
                assert any(seen[: len(expected)] == expected for seen in continued)
    assert all(np.isfinite(n.gram).all() and (np.diagonal(n.gram.sum(0))[-2:] > 0).all() for n in report.nodes)


def test_conversations(student):
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in ROWS]

    def reward(prompts, completions, answer):
        assert all(c[0]["role"] == "assistant" for c in completions)
        return word_reward(prompts, [c[0]["content"] for c in completions])

    report = measure(student, {"answer": "{answer} {prompt}"}, rows=rows, reward=reward)
    assert [r.prompt.split().count("<s>") for r in report.rollouts] == [1] * 6
    assert any(estimate(n).status == [DEFINED] for n in report.nodes)


def unlikely_padding(model):
    """Rows beyond the 12 tokens, as a trained model has them: never sampled."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.where(torch.arange(len(head.weight)) < 12, 0.0, -60.0).double())
    head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("rows", [16, 12])
def test_padding_rows_change_nothing(rows, tokenizer):
    """Whether student or teacher has more logits than the tokenizer has tokens; figures stay finite."""
    student, other = (unlikely_padding(m) for m in (tiny(vocabulary=28 - rows), tiny_base(vocabulary=rows, seed=2)))
    config = {"nodes": every_node, "branch_mass": 1.0, "max_branches": 16}
    with pytest.raises(ValueError, match="if they differ by padding rows only"):
        measure(student, other, **config)
    report = measure(student, ModelTeacher(other, tokenizer=tokenizer), **config, reward=word_reward)
    estimates = [estimate(n) for n in report.nodes]
    assert all(np.isfinite(e.predicted_gain).all() and np.isfinite(e.teacher_advantage).all() for e in estimates)
    assert any(e.status == [DEFINED] for e in estimates)
    for node in report.nodes:
        assert (node.teacher_probability[0, node.tokens >= 12] == 0).all()
        assert node.teacher_probability.sum() + node.teacher_tail[0] == pytest.approx(1, abs=1e-9)


def test_many_teachers_are_each_measured_as_alone(student):
    teachers = {"base": BaseTeacher(), "answer": Teacher("{answer} {prompt}"), "model": tiny_base("gpt2")}
    config = {"teacher_branch_probability": None}  # each teacher proposes branches of its own
    together = measure(student, teachers, **config)
    for k, (name, teacher) in enumerate(teachers.items()):
        alone = measure(student, {name: teacher}, **config)
        for a, b in zip(together.nodes, alone.nodes, strict=True):
            estimates, expected = estimate(a), estimate(b)
            np.testing.assert_allclose(estimates.alignment[k], expected.alignment[0], rtol=1e-6)
            np.testing.assert_allclose(estimates.teacher_advantage[k], expected.teacher_advantage[0], rtol=1e-9)
