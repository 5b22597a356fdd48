"""Choose the backend that samples a model's continuations: the fastest one that gives the model's own logits."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from odp_callbacks.engine.prompts import context_limit
from odp_callbacks.engine.sampling.backend_trials import try_generate, try_repeated_cache, try_shared_prefix
from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly, exact_arithmetic
from odp_callbacks.engine.sampling.length_trials import SHORTEST_TRIAL, CachedTrial, check_independence
from odp_callbacks.engine.sampling.length_verdicts import LengthVerdict, LengthVerdicts, rounded_up
from odp_callbacks.engine.sampling.rotary_state import preserving_rotary_state
from odp_callbacks.engine.sampling.vocabulary import check_logit_width

BACKENDS = ("shared prefix", "repeated cache", "generate", "full forward")
"""From the fastest to the one that serves every model. All sample from the same distribution."""
FULL_FORWARD = BACKENDS[-1]


class BackendSelection:
    """Remembers for each model which backend works, why faster ones do not, and whether a warning was logged.

    Models are held weakly: a model that is deleted is forgotten.
    """

    def __init__(self) -> None:
        self._short_trials: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()
        self._verdicts: WeakKeyDictionary[nn.Module, LengthVerdicts] = WeakKeyDictionary()
        self._independence: WeakKeyDictionary[nn.Module, LengthVerdicts] = WeakKeyDictionary()
        self._warned: WeakSet[nn.Module] = WeakSet()

    def verdict(self, model: nn.Module, shortest: int, longest: int) -> LengthVerdict:
        """What works for ``model`` in forward passes over ``shortest`` to ``longest`` tokens.

        Args:
            model: Causal language model, in evaluation mode.
            shortest: The smallest number of tokens in a forward pass, those on the cache included.
            longest: The largest.

        Returns:
            The verdict of a trial at these lengths, or of an earlier one that covers them.

        Raises:
            ValueError: If the model's logits are not as wide as its vocabulary.
        """
        shortest, longest = max(1, min(shortest, longest)), max(1, longest)
        verdicts = self._verdicts.setdefault(model, LengthVerdicts())
        if (known := verdicts.covering(shortest, longest)) is not None:
            return known
        if (ruling := verdicts.ruling_out(shortest, longest)) is not None:
            return LengthVerdict(shortest, longest, False, FULL_FORWARD, False, ruling.failures)
        with preserving_rotary_state(model), torch.inference_mode(False):
            if model not in self._short_trials:
                check_logit_width(model)
                self._short_trials[model] = _first_working(_short_trials(model))
            if all(verdict.independent for verdict in verdicts.found):
                # Most models pass this trial, which then covers all shorter sequences.
                verdicts.found.append(self._try_lengths(model, 1, _longest_allowed(model, rounded_up(longest))))
            if (known := verdicts.covering(shortest, longest)) is None:
                known = self._try_lengths(model, shortest, longest)
                verdicts.found.append(known)
        return known

    def is_independent(self, model: nn.Module, shortest: int, longest: int) -> bool:
        """Whether logits depend only on the tokens before them, between these lengths of a forward pass.

        No backend is tried for it: most teachers, and the student of an update, only run whole sequences.

        Args:
            model: Causal language model, in evaluation mode.
            shortest: The smallest number of tokens in a forward pass.
            longest: The largest.

        Raises:
            ValueError: If the model's logits are not as wide as its vocabulary.
        """
        shortest, longest = max(1, min(shortest, longest)), max(1, longest)
        own = self._independence.setdefault(model, LengthVerdicts())
        for verdicts in (self._verdicts.get(model, LengthVerdicts()), own):
            if (known := verdicts.covering(shortest, longest)) is not None:
                return known.independent
            if verdicts.ruling_out(shortest, longest) is not None:
                return False
        with preserving_rotary_state(model), torch.inference_mode(False):
            check_logit_width(model)
            if all(verdict.independent for verdict in own.found):
                own.found.append(_try_independence(model, 1, _longest_allowed(model, rounded_up(longest))))
            if (known := own.covering(shortest, longest)) is None:
                known = _try_independence(model, shortest, longest)
                own.found.append(known)
        return known.independent

    def _try_lengths(self, model: nn.Module, shortest: int, longest: int) -> LengthVerdict:
        """Try ``model`` at these lengths."""
        backend, failures = self._short_trials[model]
        with exact_arithmetic(model):
            try:
                check_independence(model, shortest, longest)
            except ArithmeticError as error:
                reason = f"at {longest} tokens its logits depend on the length of the sequence: {error}"
                return LengthVerdict(shortest, longest, False, FULL_FORWARD, False, reason)
            if longest < SHORTEST_TRIAL:
                return LengthVerdict(shortest, longest, True, backend, backend in BACKENDS[:2], failures)
            trial = CachedTrial(model, longest)
            candidates = BACKENDS[BACKENDS.index(backend) : -1]
            backend, long_failures = _first_working(
                {candidate: partial(trial.try_backend, candidate) for candidate in candidates}
            )
            segments = backend in BACKENDS[:2] and not _failure(trial.try_segments)
        return LengthVerdict(shortest, longest, True, backend, segments, long_failures or failures)

    def warn_of(self, model: nn.Module, verdict: LengthVerdict) -> None:
        """Log a warning once for each model that needs a slower backend."""
        if verdict.backend != BACKENDS[0] and model not in self._warned:
            self._warned.add(model)
            warnings.warn(
                f"continuations of {type(model).__name__} are sampled by the backend {verdict.backend!r}, which is "
                "slower and has the same distribution. Faster backends do not work for this model "
                f"({verdict.failures}).",
                stacklevel=3,  # points at the caller of the function that calls this method
            )

    def clear(self) -> None:
        """Forget all models."""
        self._short_trials.clear()
        self._verdicts.clear()
        self._independence.clear()
        self._warned.clear()


SELECTION = BackendSelection()
"""What is known of the models of this process."""


def backend_of(model: nn.Module, shortest: int = 1, longest: int = SHORTEST_TRIAL) -> str:
    """Return the first of :data:`BACKENDS` that gives this model's own logits.

    Each backend is tried once for each model, and compared with the model's full forward pass: on a few tokens, and at
    the lengths that will be used.

    Args:
        model: Causal language model, in evaluation mode.
        shortest: The smallest number of tokens in a forward pass, those on the cache included.
        longest: The largest.
    """
    return SELECTION.verdict(model, shortest, longest).backend


def depends_on_length(model: nn.Module, shortest: int, longest: int) -> bool:
    """Whether the logits at a position depend on how many tokens follow, between these lengths of a forward pass.

    Args:
        model: Causal language model, in evaluation mode.
        shortest: The smallest number of tokens in a forward pass.
        longest: The largest. No model is known to change at so few tokens as the shortest trial has.
    """
    return longest > SHORTEST_TRIAL and not SELECTION.is_independent(model, shortest, longest)


def independent_groups(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Group the ends of prefixes of one sequence so that one forward pass gives the logits at all ends of a group.

    For most models that is one group. If logits depend on the total length, a forward pass over the longest prefix of
    a group still gives those of the others.

    Args:
        model: Causal language model, in evaluation mode.
        lengths: Lengths of the prefixes, in any order.

    Returns:
        Indices into ``lengths``, each once, by increasing length.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    if not order or not depends_on_length(model, lengths[order[0]], lengths[order[-1]]):
        return [order] if order else []
    groups: list[list[int]] = []
    for index in order:
        if groups and not depends_on_length(model, lengths[groups[-1][0]], lengths[index]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _try_independence(model: nn.Module, shortest: int, longest: int) -> LengthVerdict:
    """Try whether the logits of a model depend on the length, and no backend."""
    with exact_arithmetic(model):
        try:
            check_independence(model, shortest, longest)
        except ArithmeticError as error:
            return LengthVerdict(shortest, longest, False, FULL_FORWARD, False, str(error))
    return LengthVerdict(shortest, longest, True, FULL_FORWARD, False)


def _short_trials(model: nn.Module) -> dict[str, Callable[[], None]]:
    """The trials on a few tokens, for each backend but the last: exactly, and in the model's own precision."""

    def both(trial: Callable[[nn.Module], None]) -> None:
        if not computes_exactly(model):
            trial(model)
        with exact_arithmetic(model):
            trial(model)

    trials = (try_shared_prefix, try_repeated_cache, try_generate)
    return {backend: partial(both, trial) for backend, trial in zip(BACKENDS, trials, strict=False)}


def _first_working(trials: dict[str, Callable[[], None]]) -> tuple[str, str]:
    """Try backends in turn; return the first that works, and why those before it do not."""
    failures: list[str] = []
    for backend, trial in trials.items():
        if not (failure := _failure(trial)):
            return backend, "; ".join(failures)
        failures.append(f"{backend}: {failure}")
    return FULL_FORWARD, "; ".join(failures)


def _failure(trial: Callable[[], None]) -> str:
    """Why a trial fails; empty if it does not."""
    try:
        trial()
    except torch.OutOfMemoryError:
        raise  # This says nothing about the model.
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def _longest_allowed(model: nn.Module, length: int) -> int:
    """The length, or the model's limit if that is shorter."""
    limit = context_limit(model)
    return length if limit is None else min(length, limit)
