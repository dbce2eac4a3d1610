"""Dither for stochastic rounding: 32 bits for each element and step, the same on every backend, rank and resumed run.

Stochastic rounding moves a value to one of its two neighbours with the chance that makes the mean right. Drawn anew
each step, its errors add up like a random walk: sqrt(T) roundings after T steps. Here an element's draws are not
independent but an additive sequence with the golden ratio as its step, which fills [0, 1) as evenly as any sequence
can, so that a value that drifts by a constant fraction of its spacing is moved just as often as it should be, and the
error after T steps grows like log T. (The variance of a second moment kept in bf16 halves.) ::

    dither(i, step) = hash(i, key) + step * floor(2^32 / golden ratio)   mod 2^32

Only the hash tells elements apart; the top bits are the ones to use. The key holds the optimizer's seed, the
parameter's place among all parameters, and what is rounded (`stream`). Nothing is stored, and replicas that hold the
same parameter round it alike.

All arithmetic is on 32-bit integers that wrap. Sources: Knuth, TAOCP vol. 3, section 6.4, on multiples of the golden
ratio. The hash of an element is one round, enough for its top bits: a product with a prime near 2^32 / golden ratio
(xxHash's first), and the first shift and multiplication of MurmurHash3's finaliser.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
FIRST = 0x9E3779B1
SECOND = 0x85EBCA6B
_MASK = 0xFFFFFFFF

#: What is rounded: each its own stream, or the errors of two would go together.
WEIGHT = 0
STATE = (1, 2, 3)


def key(seed: int, ordinal: int, stream: int, first: int = 0) -> int:
    """The 32-bit key of one parameter's stream.

    Args:
        ordinal: the parameter's place among all parameters of its optimizer.
        first: of a part of a parameter, the index of its first element in the whole: element i of the part then gets
            the bits of element ``first + i``, and rounding does not depend on how a parameter is sharded.
    """
    mixed = (seed * GOLDEN + ordinal * FIRST + stream * SECOND) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
    return ((mixed ^ (mixed >> 16)) + first * FIRST) & _MASK


def dither(numel: int, key: int | Tensor, step: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """32 bits for each of ``numel`` elements at this step.

    Args:
        key: of `key`; or an int32 tensor with those bits, 0-d.
        step: how many steps were applied; on a device, 0-d, so that nothing waits for it.

    Returns:
        int32 (numel,), to be read as unsigned.
    """
    x = torch.arange(numel, dtype=torch.int64, device=device).to(torch.int32)
    x.mul_(signed(FIRST)).add_(signed(key) if isinstance(key, int) else key)
    x.bitwise_xor_(shift_right(x, 16)).mul_(signed(SECOND))
    offset = step.to(torch.int32) * signed(GOLDEN) if isinstance(step, Tensor) else signed(step * GOLDEN)
    return x.add_(offset)


def shift_right(bits: Tensor, places: int) -> Tensor:
    """int32 shifted right as if unsigned: zeros come in at the top."""
    return (bits >> places) & ((1 << (32 - places)) - 1)


def uniform(bits: Tensor) -> Tensor:
    """The top 24 bits as a number in [0, 1): float32, exact."""
    return shift_right(bits, 8).float().mul_(2.0**-24)


def signed(value: int) -> int:
    """The int32 with these 32 bits, which is how torch takes a constant."""
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value
