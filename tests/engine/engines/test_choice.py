"""What `engine` may be, and what is said about anything else."""

import pytest

from odp_callbacks.cli.arguments import command_parser
from odp_callbacks.cli.diagnose import DiagnoseOptions
from odp_callbacks.engine import ProbeConfig
from odp_callbacks.engine.engines import EngineError, EngineSample, VllmInProcess, VllmServer
from odp_callbacks.engine.engines.choice import as_engine
from odp_callbacks.engine.engines.interface import check_samples
from odp_callbacks.engine.probe import Probe
from tests.helpers.engines import OwnSampler
from tests.helpers.probes import word_reward

GOOD = EngineSample((6, 2), (-0.5, -1.0), "stop")


def test_each_form_of_the_option_makes_its_engine():
    engine = OwnSampler()

    class LLM:
        llm_engine = None

        def generate(self):
            raise NotImplementedError

    assert as_engine("local") is None
    assert as_engine(engine) is engine
    assert isinstance(as_engine("https://localhost/v1"), VllmServer)
    assert isinstance(as_engine(LLM()), VllmInProcess)
    path = {"class_path": "odp_callbacks.engine.engines.VllmServer", "init_args": {"url": "http://a:1", "timeout": 7.0}}
    assert as_engine(path).client.timeout == 7.0
    assert ProbeConfig(engine=path).settings()["engine"] == "http://a:1"


@pytest.mark.parametrize("engine", ["vllm", 7, None, VllmServer, "localhost:8000"])
def test_anything_else_is_refused_before_any_work(engine):
    with pytest.raises(ValueError, match="`engine` must be 'local', 'trainer', the address of a vLLM server"):
        ProbeConfig(engine=engine)


def test_the_engine_of_a_trainer_needs_a_trainer(student, tokenizer):
    with pytest.raises(ValueError, match=r"`engine` is 'trainer', .* it works in GradientAlignmentTrainerCallback"):
        Probe(student, tokenizer, word_reward, {"base": "base"}, engine="trainer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://"}, "`engine` must be the address of a server"),
        ({"url": "http://a", "timeout": 0}, "`timeout` must be a positive number of seconds"),
        ({"url": "http://a", "concurrency": 0}, "`concurrency` must be at least 1"),
    ],
)
def test_options_of_a_server_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        VllmServer(**options)


def test_a_class_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=r"`engine` cannot be made of the class 'odp_callbacks\.Nothing'"):
        ProbeConfig(engine={"class_path": "odp_callbacks.Nothing"})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (EngineSample((), (), "stop"), "0 tokens where 1 to 2 were asked for"),
        (EngineSample((6, 6, 6), (-1.0,) * 3, "length"), "3 tokens where 1 to 2 were asked for"),
        (EngineSample((6, 99), (-1.0, -1.0), "length"), "token 99 is not in the student's vocabulary of 12"),
        (EngineSample((2, 6), (-1.0, -1.0), "length"), "goes on after a stop token"),
        (EngineSample((6, 6), (-1.0, -1.0), "stop"), "ends with token 6, and the reason given is 'stop'"),
        (EngineSample((6,), (-1.0,), "length"), "ends at 1 tokens without a stop token; its limit is 2"),
        (EngineSample((6, 2), (-1.0,), "stop"), "1 log-probabilities of 2 tokens"),
        (EngineSample((6, 2), (float("nan"), -1.0), "stop"), "a log-probability is not a number, or above 0"),
        (EngineSample((6, 2), (0.5, -1.0), "stop"), "a log-probability is not a number, or above 0"),
    ],
)
def test_samples_that_no_student_can_have_given_are_noticed(sample, message):
    check_samples("it", [GOOD], [2], (2,), 12)
    with pytest.raises(EngineError, match=rf"`engine` \(it\) answered nonsense: .*{message}"):
        check_samples("it", [sample], [2], (2,), 12)


def test_too_few_samples_are_noticed():
    with pytest.raises(EngineError, match="1 samples for 2 prompts"):
        check_samples("it", [GOOD], [2, 2], (2,), 12)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--measure.engine=http://a:1"],
        [
            "--measure.engine.class_path=odp_callbacks.engine.engines.VllmServer",
            "--measure.engine.init_args.url=http://a:1",
        ],
    ],
    ids=["address", "class path"],
)
def test_the_command_line_takes_an_address_or_a_class_path(arguments):
    parser = command_parser("diagnose", "")
    parser.add_class_arguments(DiagnoseOptions)
    given = parser.parse_args(["--dataset=x", "--reward=x", "--teachers={a: base}", *arguments]).as_dict()
    assert ProbeConfig(**given["measure"]).settings()["engine"] == "http://a:1"
