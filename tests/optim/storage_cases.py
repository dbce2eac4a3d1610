"""FP32 patterns, storages, backends and parameters that the tests of the optimizers run over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from halfstep.optim import MasterOptimizer, backends, masters
from halfstep.optim.masters import Master, Rounding

LOW = [torch.bfloat16, torch.float16]
MASTERS: list[tuple[Master, Rounding | None]] = [
    ("fp32", None),
    ("exact", None),
    ("24bit", None),
    ("24bit", "stochastic"),
    ("none", None),
    ("none", "nearest"),
    ("none", "kahan"),
]
STATES = ["fp32", "bf16", "8bit"]


def usable_backends() -> list[str]:
    """Those for the host's memory that work here and keep the bits of the oracle; the first is the oracle."""
    try:
        backends.choose("native", torch.device("cpu"))
    except backends.BackendUnavailableError:
        return ["eager"]
    return ["eager", "native"]


BACKENDS = usable_backends()


def every_exponent() -> Iterator[Tensor]:
    """FP32 values, chunk by chunk: both signs, every exponent, every lower half.

    The upper seven bits of the mantissa vary with the exponent in positive values, and are at one of their ends in
    negative ones, where rounding carries.
    """
    low = torch.arange(1 << 16, dtype=torch.int64)
    for sign, first in itertools.product((0, 1), range(0, 256, 32)):
        exponents = torch.arange(first, first + 32)
        upper = exponents * 37 % 128 if sign == 0 else (exponents % 2) * 127
        bits = (sign << 31) + (exponents << 23)[:, None] + (upper << 16)[:, None] + low
        yield of_bits(bits.view(-1))


def every_upper_half() -> Tensor:
    """FP32 values with every upper half, and lower halves at which a rounding changes."""
    edges = [0, 0x8000, 0x4000, 0xC000, *(256 * k + 128 for k in (0, 1, 77, 127, 128, 129, 255))]
    lows = sorted({(edge + d) & 0xFFFF for edge in edges for d in (-1, 0, 1)})
    return of_bits((torch.arange(1 << 16)[:, None] * 65536 + torch.tensor(lows)).view(-1))


def of_bits(bits: Tensor) -> Tensor:
    """The float32 with these (unsigned, int64) bits."""
    return bits.to(torch.int32).view(torch.float32)


def all_codes(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit format."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


def kept_for(parameter: Tensor, master: Master, rounding: Rounding = "nearest") -> Tensor | None:
    """What is kept beside a parameter, empty."""
    extra = masters.extra(master, rounding, parameter.dtype)
    return None if extra is None else torch.zeros_like(parameter, dtype=extra[1])


def encoded(
    x: Tensor, dtype: torch.dtype, master: Master, rounding: Rounding = "nearest", noise: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A fresh parameter and what is kept beside it, which hold x."""
    parameter = torch.empty_like(x, dtype=dtype)
    kept = kept_for(parameter, master, rounding)
    masters.encode(x.clone(), parameter, kept, noise)
    return parameter, kept


def exponent(x: Tensor, smallest: int = -126) -> Tensor:
    """E of 2^E <= |x| < 2^(E + 1), at least ``smallest``, of float32 numbers; int32."""
    return ((x.view(torch.int32) >> 23 & 0xFF) - 127).clamp(min=smallest)


def power(exponents: Tensor) -> Tensor:
    """2^exponents, float64."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, the sign of zero and what NaN holds too."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def assert_as_torch(actual: Tensor, expected: Tensor, backend: str) -> None:
    """FP32 numbers of steps: torch's own bits from plain torch operations, and next to them from C.

    The vectorised square root that torch takes from Intel's library is not rounded correctly in every fifth number; a
    processor's own is.
    """
    if backend == "eager":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=2.0**-21, atol=2.0**-23)


def noise_of(generator: np.random.Generator, numel: int) -> Tensor:
    """Independent dither bits."""
    return torch.from_numpy(generator.integers(-(1 << 31), 1 << 31, numel, dtype=np.int32))


def made(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Matrix, vector, 0-d, empty, transposed, channels-last, every second element, frozen, and without gradients."""
    torch.manual_seed(seed)
    image = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    values = [torch.randn(9, 7), torch.randn(5), torch.randn(()), torch.randn(0, 2), torch.randn(3, 4).t(), image]
    parameters = [nn.Parameter(v.to(dtype)) for v in values]
    parameters.append(nn.Parameter(torch.randn(6, 8).to(dtype)[:, ::2]))
    parameters.append(nn.Parameter(torch.randn(2).to(dtype), requires_grad=False))
    parameters.append(nn.Parameter(torch.randn(2).to(dtype)))
    return parameters


def feed(parameters: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """The gradients of one step: values that every format holds."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters[:7]:
        gradient = torch.randn(parameter.shape, generator=generator).bfloat16().half().float()
        parameter.grad = torch.empty_like(parameter).copy_(gradient * scale)


def references(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float().clone(), requires_grad=p.requires_grad) for p in parameters]


def everything(optimizer: MasterOptimizer) -> list[Tensor]:
    """Copies of all parameters and of all state."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*tensors, *states)]


def all_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(same_bits, first, second))
