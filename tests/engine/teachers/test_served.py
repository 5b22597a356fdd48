"""Teachers behind servers measure what the same model measures here, and say what is missing."""

import json
import pickle
import re

import numpy as np
import pytest
import torch

from odp_callbacks import ModelTeacher, OnPolicyDistillation, ServedTeacher
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.analysis.teacher_coverage import teacher_coverage
from odp_callbacks.engine.engines import EngineError
from odp_callbacks.engine.teachers import ModelScorer, as_teachers, teacher_logits
from odp_callbacks.storage import concatenate, load, save
from tests.helpers.engines import serving
from tests.helpers.models import BOS, EOS, WORDS, tiny, tiny_base, word_tokenizer
from tests.helpers.monitors import make_monitor, warning_of_failed_probes
from tests.helpers.probes import measure
from tests.helpers.served import ModelClient

SIZE = len(WORDS)
CONTEXT = "{answer} {prompt}"
MODEL = tiny_base(seed=7)
GIVEN = {"prompts": [torch.tensor([BOS, 6])], "responses": [[7, 8, EOS]], "depths": [[0, 2]]}


def test_a_probe_with_all_tokens_is_that_with_the_model(student):
    served = ServedTeacher(ModelClient(MODEL), CONTEXT, top_k=SIZE + 3)
    options = {"influence": True, "continuations": 4}
    expected = measure(student, {"large": ModelTeacher(MODEL, CONTEXT)}, **options)
    report = measure(student, {"large": served}, **options)
    assert len(report.nodes) == len(expected.nodes) > 0
    for node, other in zip(report.nodes, expected.nodes, strict=True):
        np.testing.assert_allclose(node.gram, other.gram, rtol=1e-4, atol=1e-5)
    figures, others = scalars(report), scalars(expected)
    names = [name for name in others if name.endswith("/large/all")]
    assert len(names) > 20
    for name in names:
        assert figures[name] == pytest.approx(others[name], rel=1e-3, abs=1e-5, nan_ok=True), name
    coverage = teacher_coverage(report)["large"]
    assert coverage.tokens == sum(len(rollout.pieces) for rollout in report.rollouts)
    assert coverage.largest_missing_mass < 1e-6
    assert coverage.unaligned_tokens == 0
    assert len(served.client.asked) == len({tuple(sequence) for sequence in served.client.asked}), "asked once"


def test_what_is_missing_is_stated_kept_in_records_and_joined(student, tmp_path):
    served = ServedTeacher(ModelClient(MODEL), top_k=2)
    report = measure(student, {"large": served}, budget=0)
    policies = []
    for rollout, sequence in zip(report.rollouts, served.client.asked, strict=False):
        positions = (
            MODEL.requires_grad_(False)(torch.tensor([sequence])).logits[0, -len(rollout.pieces) - 1 : -1].softmax(-1)
        )
        top = positions.topk(2, dim=-1).indices
        actual = torch.tensor(sequence[-len(positions) :])[:, None]
        kept = torch.zeros_like(positions).scatter(-1, torch.cat([top, actual], dim=-1), 1.0)
        policies.append((positions * (1 - kept)).sum(-1))
    missing = torch.cat(policies)
    figures = scalars(report)
    assert figures["odp/probe/missing_mass/large"] == pytest.approx(float(missing.mean()), abs=1e-6)
    assert figures["odp/probe/largest_missing_mass/large"] == pytest.approx(float(missing.max()), abs=1e-6)
    assert figures["odp/probe/unaligned_share/large"] == 0
    save(report, tmp_path / "records")
    loaded = load(tmp_path / "records")
    assert teacher_coverage(loaded) == teacher_coverage(report)
    other = measure(student, {"large": served}, budget=0, seed=1)
    both = teacher_coverage(concatenate([report, other]))["large"]
    parts = [teacher_coverage(part)["large"] for part in (report, other)]
    assert both.tokens == sum(part.tokens for part in parts)
    total = sum(part.missing_mass * part.tokens for part in parts)
    assert both.missing_mass == pytest.approx(total / both.tokens)
    assert not [name for name in scalars(measure(student, "base", budget=0)) if "missing_mass" in name]


def test_another_tokenizer_is_measured_on_the_tokens_whose_text_is_the_same(student):
    order = [0, 1, 2, 3, 4, 5, 10, 9, 7, 8, 6, 11]  # of the student's words in the teacher's vocabulary
    words = [*(WORDS[token] for token in order[:-1]), "of its own"]
    own = ServedTeacher(ModelClient(MODEL), tokenizer=word_tokenizer(words), top_k=SIZE)
    own.check(student, word_tokenizer())
    responses = [[9, 6, 7, EOS]]
    zeros = torch.zeros(4, SIZE, dtype=torch.float64)
    (logits,) = teacher_logits(own, student, [torch.tensor([BOS])], responses, [range(4)], [zeros])
    sequence = [BOS, *(order.index(token) for token in responses[0])]
    expected = MODEL(torch.tensor([sequence])).logits[0, :-1].detach().softmax(-1)  # in the teacher's vocabulary
    policies = logits.softmax(-1)
    for theirs in range(6, SIZE - 1):
        torch.testing.assert_close(policies[:, order[theirs]], expected[:, theirs], rtol=1e-5, atol=1e-6)
    (logits,) = teacher_logits(own, student, [torch.tensor([BOS])], [[9, 11, 7]], [range(3)], [zeros[:3]])
    assert logits[0].any()
    assert not logits[1:].any(), "what follows a word that the teacher lacks is another text to it"
    assert (own.coverage.tokens, own.coverage.unaligned_tokens) == (7, 2)
    report = measure(student, {"large": own}, budget=0)
    coverage = teacher_coverage(report)["large"]
    assert 0 < coverage.unaligned_tokens < coverage.tokens
    assert np.isfinite(scalars(report)["odp/update_gain/large/all"])


def test_a_name_in_a_configuration_and_an_address_make_one(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    by_path = {"class_path": "odp_callbacks.ServedTeacher", "init_args": {"url": "http://me:word@a:1", "top_k": 5}}
    named = as_teachers({"x": by_path, "y": "http://b:2/v1"})
    assert [repr(teacher) for teacher in named.values()] == [
        "ServedTeacher('http://a:1', top_k=5)",
        "ServedTeacher('http://b:2', top_k=64)",
    ]
    assert list(as_teachers(["http://b:2"])) == ["served"]
    assert pickle.loads(pickle.dumps(named["x"])).top_k == 5


def test_what_cannot_be_used_is_refused(student):
    with pytest.raises(ValueError, match="`url` must be the address of a vLLM server, or an object with TRL's method"):
        ServedTeacher(3)
    with pytest.raises(ValueError, match="`teachers` must be the address of a server"):
        ServedTeacher("localhost:8000")
    with pytest.raises(ValueError, match="`top_k` must be a positive integer, but 0"):
        ServedTeacher("http://a", top_k=0)
    with pytest.raises(ValueError, match="which probes can ask, but OnPolicyDistillation trains"):
        OnPolicyDistillation(student, word_tokenizer(), ServedTeacher("http://a"))
    wide = ServedTeacher(ModelClient(tiny_base(vocabulary=SIZE + 8)), top_k=SIZE + 8)
    with pytest.raises(ValueError, match=r"the student knows 12 tokens; give the teacher's own `tokenizer`"):
        teacher_logits(wide, student, *GIVEN.values(), [torch.zeros(2, SIZE)])


def prompt_log_probs(body, **changes):
    """An answer that gives every token of the prompt a log-probability of -1."""
    positions = [None, *({str(token): {"logprob": -1.0}} for token in body["prompt"][1:])]
    return json.dumps({"choices": [{"prompt_logprobs": positions} | changes]}).encode()


REFUSAL = b'{"error": {"message": "Requested prompt_logprobs of 64, which is greater than max allowed: 20"}}'
FAULTS = {
    "dies": (lambda body: b"", r"is not there: RemoteDisconnected"),
    "hangs": (lambda body: None, r"has answered nothing for 0\.3 seconds; see whether the server hangs"),
    "no JSON": (lambda body: b"<html>busy</html>", r"answered nonsense: no completion with the log-prob.*<html>busy"),
    "none": (
        lambda body: prompt_log_probs(body, prompt_logprobs=None),
        "answered nonsense: no completion with the log",
    ),
    "too few": (
        lambda body: prompt_log_probs(body, prompt_logprobs=[]),
        "answered nonsense: not one position for each token",
    ),
    "not a number": (
        lambda body: prompt_log_probs(body).replace(b"-1.0", b"NaN"),
        "answered nonsense: a log-probability is not a number",
    ),
    "refuses": (
        lambda body: (400, REFUSAL),
        "refused /v1/completions: 400, .* Start the server with `--max-logprobs 64`",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_at_fault_costs_the_probe_and_not_the_training(fault):
    answer, message = FAULTS[fault]
    with serving(lambda path, body: answer(body)) as url:
        monitor = make_monitor(every_n_steps=1, strict=False)
        monitor.teachers["served"] = ServedTeacher(url, timeout=0.3 if fault == "hangs" else 60)
        warning = warning_of_failed_probes(monitor)
    assert f"a probe failed; training continues without it: EngineError: `teachers` ({url}) " in warning
    assert re.search(message, warning)


def test_a_client_at_fault_is_an_error_of_the_engine():
    class Broken:
        def get_sequence_logprobs(self, **options):
            raise ConnectionError("gone")

    with pytest.raises(EngineError, match=r"`teachers` \(Broken\) failed to score: ConnectionError: gone"):
        ServedTeacher(Broken()).returned_tokens(*GIVEN.values())
    broken = Broken()
    broken.get_sequence_logprobs = lambda **options: {"logprobs": [[]]}
    with pytest.raises(EngineError, match=r"answered nonsense: no log-probabilities of sequences"):
        ServedTeacher(broken).returned_tokens(*GIVEN.values())


def test_requests_ask_for_the_policy_as_it_is():
    bodies = []

    def answer(path, body):
        bodies.append((path, body))
        return prompt_log_probs(body)

    with serving(answer) as url:
        (returned,) = ServedTeacher(url, model_name="large", top_k=7).returned_tokens(*GIVEN.values())
    ((path, body),) = bodies
    assert path == "/v1/completions"
    assert {name: body[name] for name in ("model", "prompt", "prompt_logprobs", "temperature", "top_p")} == {
        "model": "large",
        "prompt": [BOS, 6, 7, 8, EOS],
        "prompt_logprobs": 7,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    assert returned.token_ids.tolist() == [[7], [EOS]]


def test_a_model_in_this_process_takes_the_place_of_a_server(student):
    model = tiny_base(seed=7).train()
    for top_k in (3, SIZE + 3):
        (own,), (other,) = (
            ServedTeacher(client, top_k=top_k).returned_tokens(*GIVEN.values())
            for client in (ModelScorer(model), ModelClient(MODEL))
        )
        torch.testing.assert_close(own.logits(torch.zeros(2, SIZE)), other.logits(torch.zeros(2, SIZE)))
    assert model.training
    with pytest.raises(ValueError, match=r"`ServedTeacher\(ModelScorer\(model\), tokenizer=...\)` pairs"):
        ModelTeacher(model, tokenizer=word_tokenizer(WORDS[:-1])).check(student, word_tokenizer())


def test_memory_of_what_was_asked_is_bounded(monkeypatch):
    monkeypatch.setattr("odp_callbacks.engine.teachers.served.KEPT_NUMBERS", 10)
    served = ServedTeacher(ModelClient(tiny()), top_k=2)
    for token in (6, 7, 6):
        served.returned_tokens([torch.tensor([BOS])], [[token] * 4], [[0]])
    assert len(served.client.asked) == 3
