"""The arguments of the demo, and what they are unless someone gives others."""

from dataclasses import dataclass, field

from odp_callbacks.engine.config import ProbeConfig, ProbeOptions
from odp_callbacks.files import check_can_be_written, local_path

PROBE_DEFAULTS: ProbeOptions = {"rollouts_per_question": 4, "max_new_tokens": 24, "budget": 0}
"""Options of a probe that is done in a minute on two cores: rollouts alone, no continuations."""
TEACHERS = {
    "solution": "{solution}\n{prompt}",
    "answer": "The answer is {answer}.\n{prompt}",
    "wrong answer": "The answer is {wrong_answer}.\n{prompt}",
}
"""Contexts that are compared, by name; each is shown to the student itself, which so becomes a teacher."""
CONTROL = "wrong answer"
"""The context that should not come first."""
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Settings of arithmetic tasks under which SmolLM2-135M-Instruct sometimes succeeds and sometimes fails."""


@dataclass(frozen=True)
class DemoConfig:
    """The arguments of ``odp-callbacks demo``.

    Attributes:
        model: Local folder or hub name of the student; none for SmolLM2-135M-Instruct.
        task: An arithmetic task of reasoning-gym, such as ``products`` or ``chain_sum``.
        questions: Questions that the teachers are measured on.
        held_out: Other questions, on which success is measured before and after a step.
        held_out_responses: Responses to each of them.
        step_length: Euclidean length of the step on the LoRA parameters.
        seed: Seed of all random draws.
        output: Folder for TensorBoard's files, records and report.
        probe: How to measure.
    """

    model: str | None = None
    task: str = "products"
    questions: int = 24
    held_out: int = 32
    held_out_responses: int = 6
    step_length: float = 0.3
    seed: int = 0
    output: str = "odp-demo"
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(**PROBE_DEFAULTS))

    def __post_init__(self) -> None:
        """Check what nothing else checks."""
        for name, least in (("questions", 2), ("held_out", 2), ("held_out_responses", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, but {getattr(self, name)!r} was given."
                )
        if not 0 < self.step_length < float("inf"):
            raise ValueError(f"`step_length` must be a positive number, but {self.step_length!r} was given.")
        if not self.probe.update:
            raise ValueError("`update` is False, but the demo is about the update; leave it True.")
        check_can_be_written("output", local_path("output", self.output))
