"""A server that is gone, dies, hangs or answers nonsense costs the probe, not the training."""

import json
import re
import socket
from http.client import HTTPConnection

import pytest

from odp_callbacks.engine.engines import EngineError, VllmServer
from odp_callbacks.engine.engines.completions_client import CompletionsClient
from tests.helpers.engines import serving
from tests.helpers.monitors import make_monitor, run_steps, warning_of_failed_probes


def completion(token_ids, reason="length", log_probs=None):
    log_probs = [-1.0] * len(token_ids) if log_probs is None else log_probs
    choice = {"token_ids": token_ids, "finish_reason": reason, "logprobs": {"token_logprobs": log_probs}}
    return json.dumps({"choices": [choice]}).encode()


def loads(then):
    """A server that loads adapters, and answers completions by a function of their bodies."""
    return lambda path, body: then(body) if path == "/v1/completions" else b"ok"


FAULTS = {
    "dies": (lambda body: b"", r"is not there: RemoteDisconnected: .*; see whether the server runs"),
    "hangs": (lambda body: None, r"has answered nothing for 0\.3 seconds; see whether the server hangs"),
    "no JSON": (lambda body: b"<html>busy</html>", r"answered nonsense: no completion with token ids .*<html>busy"),
    "text only": (lambda body: b'{"choices": [{"text": "a"}]}', "answered nonsense: no completion with token ids"),
    "unknown tokens": (lambda body: completion([10**6] * body["max_tokens"]), "token 1000000 is not in the student's"),
    "another student": (lambda body: completion([6] * body["max_tokens"]), "does not sample from the student"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_at_fault_costs_the_probe_with_one_message(fault):
    answer, message = FAULTS[fault]
    with serving(loads(answer)) as url:
        engine = VllmServer(url, timeout=0.3 if fault == "hangs" else 60)
        warning = warning_of_failed_probes(make_monitor(engine=engine, every_n_steps=1, strict=False))
    assert f"a probe failed; training continues without it: EngineError: `engine` ({url}) " in warning
    assert re.search(message, warning)


def test_a_server_that_is_gone_is_noticed_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        trainer = run_steps(make_monitor(engine=url, every_n_steps=1, strict=False), 1)
    (warning,) = trainer.warnings
    assert "is not there: ConnectionRefusedError" in warning


def test_a_server_that_loads_no_adapters_says_what_it_needs(student, tmp_path):
    refusal = {"error": {"message": "loading lora odp-callbacks-1 of /tmp/odp-callbacks-1-a failed"}}

    def refuses(path, body):
        return 404, json.dumps(refusal).encode()

    with serving(refuses) as url, pytest.raises(EngineError) as error:
        VllmServer(url, folder=tmp_path).sync(student, 3)
    assert "refused /v1/load_lora_adapter: 404, loading lora … of … failed To load the student's" in str(error.value)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in str(error.value)
    assert "odp-callbacks-" not in str(error.value)


def test_adapters_leave_nothing_behind(student, tmp_path):
    requests = []

    def notes(path, body):
        requests.append((path, body["lora_name"]))
        return b"ok"

    with serving(notes) as url:
        server = VllmServer(url, folder=tmp_path)
        server.sync(student, 1)
        assert len(list(tmp_path.iterdir())) == 1
        server.sync(student, 2)
        assert len(list(tmp_path.iterdir())) == 1
        server.release()
    (first, first_name), (unload, unloaded), (_, second_name), (_, last) = requests
    assert (first, unload) == ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    assert first_name == unloaded != second_name == last
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_in_time_is_given_up(student):
    def one_of_two(body):
        return completion([6]) if body["seed"] == 0 else None

    with serving(loads(one_of_two)) as url:
        server = VllmServer(url)
        server.sync(student, 1)
        sampled = server.sample(
            [[6]] * 3, max_tokens=[1] * 3, seeds=[1, 0, 1], temperature=1.0, stop_token_ids=[2], seconds=0.3
        )
    assert [sample.finish_reason for sample in sampled] == ["unfinished", "length", "unfinished"]


def test_a_key_is_sent_and_kept_out_of_names(monkeypatch, student):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    keys = []
    with serving(lambda path, body: b"ok", on_headers=lambda headers: keys.append(headers["Authorization"])) as url:
        server = VllmServer(url)
        server.sync(student, 1)
    assert keys == ["Bearer secret"]
    assert "secret" not in repr(server)


def test_a_connection_that_was_given_up_is_not_opened_again(monkeypatch):
    connections = []
    own_request = HTTPConnection.request

    def given_up_before(connection, *arguments, **options):
        connections.append(connection)
        connection.close()  # as by the thread that waits for the answer, when the time is up
        return own_request(connection, *arguments, **options)

    monkeypatch.setattr(HTTPConnection, "request", given_up_before)
    with serving(lambda path, body: b"ok") as url, pytest.raises(EngineError, match="is not there: NotConnected"):
        CompletionsClient(url).post("/v1/completions", {})
    assert [connection.sock for connection in connections] == [None]
