"""Random numbers that are functions of a name, so that they do not depend on what else is drawn.

A probe draws nodes, branches and tokens for many questions. With one common stream, the numbers of a question would
depend on the questions before it and on the other rows of its batch. Here every draw has a name, and its numbers are
a function of the seed and this name. A probe of four questions therefore gives the same results as two probes of two
questions each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

_INCREMENT, _FIRST_MULTIPLIER, _SECOND_MULTIPLIER = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Constants of SplitMix64, as int64."""


@dataclass(frozen=True)
class Randomness:
    """The random numbers of one probe.

    Attributes:
        seed: The seed of all its numbers.

    Examples:
        >>> Randomness(0).key("question 3", "rollout", 1) == Randomness(0).key("question 3", "rollout", 1)
        True
    """

    seed: int

    def key(self, *name: object) -> int:
        """Return the key of a draw, in [0, 2^63).

        Args:
            name: Parts of the draw's name; parts with different ``repr`` give different keys.
        """
        digest = blake2b(repr((self.seed, *name)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self, *name: object) -> torch.Generator:
        """Return a generator on the CPU that is seeded with the key of ``name``."""
        return torch.Generator().manual_seed(self.key(*name))


def fresh_keys(count: int) -> list[int]:
    """Draw keys from torch's global stream, for callers that want new numbers at each call."""
    return torch.randint(2**62, (count,)).tolist()


def as_key_tensor(keys: Sequence[int], device: torch.device) -> Tensor:
    """Return the keys as a tensor, ``(B,)`` int64."""
    return torch.tensor(list(keys), dtype=torch.long, device=device)


def uniforms(keys: Tensor, counters: Tensor, columns: int) -> Tensor:
    """Compute uniform numbers in [0, 1), each a function of its key, its counter and its column only.

    This is SplitMix64 used as a hash: output number ``counter * columns + column`` of the generator that starts at
    ``key``. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).

    Args:
        keys: ``(B,)`` int64.
        counters: ``(B,)`` int64, how many draws were made before with the same key.
        columns: How many numbers to compute for each key.

    Returns:
        ``(B, columns)`` float64, on the device of ``keys``.

    Examples:
        >>> keys = torch.tensor([7, 7, 8])
        >>> numbers = uniforms(keys, torch.tensor([0, 1, 0]), 2)
        >>> bool((numbers[0] == uniforms(keys[:1], torch.tensor([0]), 2)[0]).all()), len(numbers.unique())
        (True, 6)
    """
    output_numbers = counters[:, None] * columns + torch.arange(1, columns + 1, device=keys.device)
    state = keys[:, None] + output_numbers * _INCREMENT  # int64 wraps around, as the generator needs
    numbers: Tensor = _logical_right_shift(_mixed(state), 11).double() * 2.0**-53
    return numbers


def random_bits(numbers: Tensor) -> Tensor:
    """Compute 64 bits for each number, each a function of it alone: output ``number + 1`` of SplitMix64 from 0.

    Args:
        numbers: int64 of any shape.

    Returns:
        int64 of the same shape, on the same device.

    Examples:
        >>> bits = random_bits(torch.arange(4096))
        >>> len(bits.unique()), 1800 < int((bits & 1).sum()) < 2300
        (4096, True)
    """
    return _mixed((numbers + 1) * _INCREMENT)


def _mixed(state: Tensor) -> Tensor:
    """The function that SplitMix64 applies to its state."""
    state = (state ^ _logical_right_shift(state, 30)) * _FIRST_MULTIPLIER
    state = (state ^ _logical_right_shift(state, 27)) * _SECOND_MULTIPLIER
    return state ^ _logical_right_shift(state, 31)


def _logical_right_shift(values: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's own shift fills with the sign bit."""
    shifted: Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted
