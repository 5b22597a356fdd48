"""Random numbers that depend on what they are for, and not on what else was drawn.

A probe draws nodes, branches and tokens for many questions. If all came from one stream, a question's numbers would
depend on the questions before it, and on who shares its batch. Here each draw has a name, of which its numbers are a
function: so a probe of four questions is two probes of two, wherever they run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = (v - 2**64 for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Constants of SplitMix64, as int64."""


@dataclass(frozen=True)
class Randomness:
    """The random numbers of one probe.

    Attributes:
        seed: Of all of them.

    Examples:
        >>> Randomness(0).key("question 3", "rollout", 1) == Randomness(0).key("question 3", "rollout", 1)
        True
    """

    seed: int

    def key(self, *name: object) -> int:
        """A number in [0, 2^63) for whatever is called so; ``name`` is told by its ``repr``."""
        digest = blake2b(repr((self.seed, *name)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self, *name: object) -> torch.Generator:
        """A stream on the CPU for whatever is called so."""
        return torch.Generator().manual_seed(self.key(*name))


def fresh_keys(count: int) -> list[int]:
    """Keys drawn from torch's global stream, for those who want another outcome each time."""
    return torch.randint(2**62, (count,)).tolist()


def uniforms(keys: Tensor, counters: Tensor, columns: int) -> Tensor:
    """Numbers in [0, 1), each a function of its key, its counter and its column alone.

    SplitMix64 as a hash: output number ``counter * columns + column`` of the generator that starts at ``key``. Source:
    Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).

    Args:
        keys: ``(B,)`` int64.
        counters: ``(B,)`` int64, what was drawn before from the same key.
        columns: How many numbers to draw.

    Returns:
        ``(B, columns)`` float64, on the device of ``keys``.

    Examples:
        >>> keys = torch.tensor([7, 7, 8])
        >>> u = uniforms(keys, torch.tensor([0, 1, 0]), 2)
        >>> bool((u[0] == uniforms(keys[:1], torch.tensor([0]), 2)[0]).all()), len(u.unique())
        (True, 6)
    """
    place = counters[:, None] * columns + torch.arange(1, columns + 1, device=keys.device)
    z = keys[:, None] + place * _STEP  # int64 wraps around, as it should
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    z = z ^ _shift(z, 31)
    found: Tensor = _shift(z, 11).double() * 2.0**-53
    return found


def _shift(z: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros."""
    found: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
    return found


def as_keys(keys: Sequence[int], device: torch.device) -> Tensor:
    """``(B,)`` int64."""
    return torch.tensor(list(keys), dtype=torch.long, device=device)
