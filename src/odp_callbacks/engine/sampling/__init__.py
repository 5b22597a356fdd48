"""Sample from the student: many continuations of shared prefixes in one batch.

:mod:`~odp_callbacks.engine.sampling.backends` is what the rest of the engine calls. It takes
:mod:`~odp_callbacks.engine.sampling.requests` and samples with the backend that
:mod:`~odp_callbacks.engine.sampling.backend_selection` chooses for the model.
"""
