"""A teacher behind a real vLLM server, in vLLM's form and through TRL's client."""

import pytest
import torch
from trl.generation.vllm_client import VLLMClient

from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.analysis.teacher_coverage import teacher_coverage
from odp_callbacks.engine import ModelTeacher, Probe, ServedTeacher
from odp_callbacks.engine.engines import EngineError
from odp_callbacks.engine.gradients.logits import response_logits
from tests.helpers.models import BOS, EOS, WORDS, tiny_base, word_tokenizer
from tests.helpers.vllm import SHAPE, running_server, served_student

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SIZE = len(WORDS)
GIVEN = [torch.tensor([BOS, 6, 7]), torch.tensor([BOS, 9])], [[7, 8, 9, EOS], [10, 11]], [range(4), range(2)]


@pytest.fixture(scope="module")
def teacher_server(vllm_interpreter, served_base, tmp_path_factory):
    """A server without adapters: with them, two requests for log-probabilities at a time kill vLLM 0.32 on CPUs."""
    with running_server(vllm_interpreter, served_base, tmp_path_factory.mktemp("teacher"), options=()) as server:
        yield server


def expected_policies():
    logits = response_logits(tiny_base(**SHAPE).float(), GIVEN[0], GIVEN[1], [list(depths) for depths in GIVEN[2]])
    return torch.cat(logits).detach().double().softmax(-1)


@pytest.mark.parametrize("form", ["vLLM", "TRL"])
@pytest.mark.parametrize("top_k", [SIZE, 4])
def test_log_probabilities_are_the_models(teacher_server, monkeypatch, form, top_k):
    # TRL's client refuses to be made where vLLM is not installed, which it does not need to talk to a server.
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    client = VLLMClient(base_url=teacher_server.url) if form == "TRL" else teacher_server.url
    teacher = ServedTeacher(client, top_k=top_k)
    returned = teacher.returned_tokens(*GIVEN)
    expected = expected_policies()
    actual = torch.tensor([token for response in GIVEN[1] for token in response])[:, None]
    assert [len(part) for part in returned] == [4, 2]
    missing = []
    for place, (token_ids, log_probs) in enumerate(
        pair for part in returned for pair in zip(part.token_ids, part.log_probs, strict=True)
    ):
        came_back = token_ids[torch.isfinite(log_probs)]
        asked = {*expected[place].topk(top_k).indices.tolist(), int(actual[place])}
        assert {*came_back.tolist()} == asked
        values = log_probs[torch.isfinite(log_probs)].double().exp()
        torch.testing.assert_close(values, expected[place, came_back], rtol=1e-4, atol=1e-6)
        missing.append(1 - float(expected[place, came_back].sum()))
    assert teacher.coverage.missing_mass == pytest.approx(sum(missing) / 6, abs=1e-5)
    assert teacher.coverage.largest_missing_mass == pytest.approx(max(missing), abs=1e-5)


def test_a_probe_measures_what_it_measures_with_the_model(teacher_server):
    student, rows = served_student(1), [{"prompt": prompt} for prompt in ("a b", "c d", "e f")]
    responses = [[[6, 7, 8, 9]], [[9, 8, 7, 6, 11]], [[10, 10, 6, 7, EOS]]]

    def reward(prompts, completions, **columns):
        return [float("a" in completion.split()[-2:]) for completion in completions]

    def measured(teacher):
        options = {"max_new_tokens": 8, "continuations": 8, "nodes": 2}
        return Probe(student, word_tokenizer(), reward, {"large": teacher}, **options).run(rows, responses=responses)

    own = scalars(measured(ModelTeacher(tiny_base(**SHAPE).float(), "f {prompt}")))
    whole, part = (measured(ServedTeacher(teacher_server.url, "f {prompt}", top_k=top_k)) for top_k in (SIZE, 3))
    figures = scalars(whole)
    names = [name for name in own if name.endswith("/large/all")]
    assert len(names) > 20
    for name in names:
        assert figures[name] == pytest.approx(own[name], rel=5e-3, abs=1e-4, nan_ok=True), name
    assert teacher_coverage(whole)["large"].largest_missing_mass < 1e-5
    assert 0.01 < teacher_coverage(part)["large"].missing_mass < 1


def test_a_server_that_gives_fewer_tokens_says_how_to_start_it(teacher_server):
    with pytest.raises(
        EngineError, match=r"refused /v1/completions: 400, .* Start the server with `--max-logprobs 50`"
    ):
        ServedTeacher(teacher_server.url, top_k=50).returned_tokens(*GIVEN)
