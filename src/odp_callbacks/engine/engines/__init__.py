"""Engines that sample rollouts and continuations in place of the student's own model.

:class:`SamplingEngine` is all that an engine must do. A teacher behind a server gives log-probabilities of tokens that
exist already (:class:`~odp_callbacks.engine.teachers.ServedTeacher`).
"""

from odp_callbacks.engine.engines.interface import EngineError, EngineSample, SamplingEngine, SamplingOptions
from odp_callbacks.engine.engines.vllm_in_process import VllmInProcess
from odp_callbacks.engine.engines.vllm_server import VllmServer

__all__ = ["EngineError", "EngineSample", "SamplingEngine", "SamplingOptions", "VllmInProcess", "VllmServer"]
