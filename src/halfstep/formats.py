"""Number formats: what each can hold, and rounding to it.

A format is one row: a name, torch's dtype, and how many bits go to the exponent and to the mantissa. All else follows
from the bits, as IEEE 754 lays them out: with e exponent and m mantissa bits, a number's magnitude is

    normal      (1 + f / 2**m) * 2**E     emin <= E <= emax, 0 <= f < 2**m
    subnormal   (    f / 2**m) * 2**emin  so below 2**emin the spacing stays at 2**(emin - m), and ends at zero

=============== ==== == == ========== ========= ========= ==================
format          bits  e  m        max      tiny       eps beyond max
=============== ==== == == ========== ========= ========= ==================
fp32              32  8 23    3.4e38   1.2e-38    1.2e-7  inf
tf32              19  8 10    3.4e38   1.2e-38    9.8e-4  inf
bf16              16  8  7    3.4e38   1.2e-38    7.8e-3  inf
fp16              16  5 10     65504    6.1e-5    9.8e-4  inf
float8_e5m2        8  5  2     57344    6.1e-5      0.25  inf
float8_e4m3fn      8  4  3       448    1.6e-2     0.125  448, even from inf
=============== ==== == == ========== ========= ========= ==================

(``fn``: finite, with NaN. The format has no inf, so its top exponent holds numbers and only its last code is NaN.)

`round_to` rounds a float32 or float64 tensor to what a format can hold and gives it back in its own dtype, so the
arithmetic around it stays wide. To nearest it goes through torch's own casts, which are exact and 30 to 60 times
faster than arithmetic with exponents. Two things are left to do by hand: torch has no dtype for TF32, and torch casts
float64 by way of float32, which rounds twice (1 + 2**-11 + 2**-40 becomes 1 in fp16 instead of 1 + 2**-10).

What a cast does beyond the largest number cannot always be seen afterwards (a saturated 448 looks like any other), so
`Format.overflows` and `Format.underflows` are asked *before* it.

Sources: IEEE 754-2019 §3; the OCP 8-bit floating point specification 1.0 for the float8 formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

Overflow = Literal["inf", "nan", "saturate"]
Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class Format:
    """One number format: the bits, and what follows from them."""

    name: str
    dtype: torch.dtype | None  #: torch's dtype of this format; None: torch computes in it, but cannot store it
    exponent_bits: int
    mantissa_bits: int  #: without the leading one, which is not stored
    has_infinities: bool = True  #: False: the top exponent holds numbers too, and only the all-ones code is NaN
    overflow: Overflow = "inf"  #: what torch's cast makes of a magnitude beyond `max`, inf included

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa together."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return int(2 ** (self.exponent_bits - 1) - 1)

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """The exponent of the largest number."""
        return self.bias if self.has_infinities else self.bias + 1

    @property
    def max(self) -> float:
        """The largest number."""
        significand = 2 - self.eps if self.has_infinities else 2 - 2 * self.eps
        return math.ldexp(significand, self.emax)

    @property
    def tiny(self) -> float:
        """The smallest positive normal number; below it, every octave costs one bit of precision."""
        return math.ldexp(1.0, self.emin)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1.0, self.emin - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """The distance from 1 to the next larger number."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def overflow_threshold(self) -> float:
        """Halfway from `max` to the number that would follow it, had the exponent no end."""
        return self.max + self.ulp(self.max) / 2

    @overload
    def ulp(self, x: float) -> float: ...
    @overload
    def ulp(self, x: Tensor) -> Tensor: ...
    def ulp(self, x: float | Tensor) -> float | Tensor:
        """The spacing of this format's numbers at x, exact: a power of two.

        This is 2**(E - m) for 2**E <= abs(x) < 2**(E + 1); x need not be a number of the format. Hence at a power of
        two it is the distance to the next *larger* magnitude (below, numbers lie twice as dense), from 0 up to `tiny`
        it is `smallest_subnormal`, and from `max` on it stays what it is at `max`. As with `math.ulp`, inf gives inf
        and NaN gives NaN.

        **Arguments:** a float, or a float32 or float64 tensor. **Returns:** the like, in x's dtype and shape.

        Raises:
            TypeError: a tensor of another dtype.
        """
        if isinstance(x, Tensor):
            x = _checked(x)
            octave = _octave(x).clamp(math.ldexp(1.0, self.emin), math.ldexp(1.0, self.emax))
            return torch.where(x.isfinite(), octave * self.eps, x.abs())
        if x == 0 or not math.isfinite(x):
            return abs(x) or self.smallest_subnormal
        exponent = math.frexp(x)[1] - 1
        return math.ldexp(1.0, min(max(exponent, self.emin), self.emax) - self.mantissa_bits)

    def overflows(self, x: Tensor) -> Tensor:
        """Where rounding x to nearest would leave this format's range; a bool mask of x's shape. Sum it for a count.

        A magnitude a little beyond `max` still rounds back to it; the limit is `overflow_threshold`, and the tie there
        goes to the even neighbour: 65520 overflows in fp16 (65504 ends in an odd bit), 464 in float8_e4m3fn rounds to
        448 (even). Only finite values count: an inf in x did not arise here. Ask ``x.isinf()`` for those, and note
        that a format that saturates turns them into `max` without a trace.

        Raises:
            TypeError: x is neither float32 nor float64.
        """
        magnitude = _checked(x).abs()
        # A float32 tensor compares with the threshold rounded to float32. That is exact, but for fp32's own threshold:
        # it becomes inf, which nothing finite reaches, as it must be.
        max_is_odd = self.max / self.ulp(self.max) % 2 == 1
        beyond = magnitude >= self.overflow_threshold if max_is_odd else magnitude > self.overflow_threshold
        return beyond & magnitude.isfinite()

    def underflows(self, x: Tensor) -> Tensor:
        """Where x is not zero but rounds to zero; a bool mask of x's shape. Sum it for a count.

        That is up to and including half of `smallest_subnormal`: the tie goes to zero, which is even.

        Raises:
            TypeError: x is neither float32 nor float64.
        """
        x = _checked(x)
        return (x != 0) & (x.abs() <= self.smallest_subnormal / 2)


def of(which: Format | str | torch.dtype) -> Format:
    """The format of this name or torch dtype; a `Format` is returned as it is.

    Raises:
        ValueError: unknown; the message lists what is known.
    """
    if isinstance(which, Format):
        return which
    for format in FORMATS.values():
        if which == format.name or (isinstance(which, torch.dtype) and which == format.dtype):
            return format
    known = ", ".join(f"{f.name} ({f.dtype})" if f.dtype else f.name for f in FORMATS.values())
    raise ValueError(f"unknown number format {which!r}. Known: {known}.")


def round_to(
    x: Tensor,
    format: Format | str | torch.dtype,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """x rounded to the numbers of a format, as a new tensor of x's own dtype, shape and device.

        round_to(torch.tensor([0.1, 70000.0]), "fp16")  # tensor([0.1000, inf]): 0.0999755859375 exactly

    ``"nearest"``: ties go to the even neighbour. float32 and float64 are both rounded once. (For TF32 this is what
    IEEE arithmetic would do; GPUs also convert with ties away from zero, or by cutting bits off.)

    ``"stochastic"``: of the two neighbours, the upper with a chance of x's distance from the lower in units of their
    distance, so that the expected value is x: a sum of many small updates is not lost, as it is to nearest. Numbers of
    the format stay as they are. The chance is exact, but for being cut to a multiple of 2**-62. Between `max` and the
    number that would follow it, x becomes `max` or overflows; farther out it overflows.

    In both, overflow does what ``format.overflow`` says, the sign of zero is kept, and NaN stays NaN (of unspecified
    sign and payload: torch's casts differ). The result has no gradient: rounding is flat almost everywhere, and what
    to do instead is for the caller to say.

    **Arguments:**

    - `x`: float32 or float64: wide enough to hold the numbers of every format (fp32's in either).
    - `format`: a `Format`, its name, or its torch dtype.
    - `generator`: for stochastic rounding, on x's device; without it, torch's default one.

    Raises:
        TypeError: x has another dtype.
        ValueError: unknown format or rounding.
    """
    target, x = of(format), _checked(x)
    if rounding == "nearest":
        return _nearest(x, target)
    if rounding == "stochastic":
        return _stochastic(x, target, generator)
    raise ValueError(f"unknown rounding {rounding!r}. Known: nearest, stochastic.")


def _checked(x: Tensor) -> Tensor:
    """x, outside of any graph.

    16-bit tensors are refused too: an fp16 tensor could not hold what rounding to bf16 gives (65504 becomes 65536).
    """
    if x.dtype not in (torch.float32, torch.float64):
        remedy = " Widen it first: x.float()." if x.is_floating_point() else ""
        raise TypeError(f"formats work on float32 and float64 tensors, not on {x.dtype}.{remedy}")
    return x.detach()


def _octave(x: Tensor) -> Tensor:
    """The largest power of two up to abs(x), by masking the exponent's bits.

    For zero and the subnormal numbers of x's own dtype it is 0, and for inf and NaN inf.
    """
    if x.dtype == torch.float32:
        return (x.view(torch.int32) & 0x7F80_0000).view(torch.float32)
    return (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)


def _nearest(x: Tensor, format: Format) -> Tensor:
    if format.dtype == torch.float32:
        return x.to(torch.float32, copy=True).to(x.dtype)
    single = x if x.dtype == torch.float32 else _to_odd_float32(x)
    low = _nearest_of_upper_bits(single, format.mantissa_bits) if format.dtype is None else single.to(format.dtype)
    return low.to(x.dtype)


def _to_odd_float32(x: Tensor) -> Tensor:
    """float64 to float32 such that rounding once more, to a narrower format, gives what rounding once would give.

    Rounding to odd: cut the bits off that do not fit, and if any was set, set the last bit that does. A result that
    was not exact so never looks like a tie. It takes an intermediate format with two bits more than the last one.
    (Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    odd", IEEE Transactions on Computers 57.)
    """
    single = x.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32)
    # Undo where the cast rounded away from zero; an inf that overflowed becomes float32's largest number, which is odd.
    cut = torch.where(back.abs() > x.abs(), bits - 1, bits)
    return torch.where(back != x, cut | 1, cut).view(torch.float32)


def _nearest_of_upper_bits(x: Tensor, mantissa_bits: int) -> Tensor:
    """float32 rounded to fewer mantissa bits, ties to even, in integer arithmetic.

    The bits of a magnitude, read as an integer, count the representable numbers upward from zero: through the
    subnormal ones, across octaves, and after the largest follows inf. So rounding the integer rounds the number.
    """
    drop = FORMATS["fp32"].mantissa_bits - mantissa_bits
    bits = x.view(torch.int32)
    just_under_half = (1 << (drop - 1)) - 1
    last_kept = (bits >> drop) & 1  # 1: a tie is to go up
    rounded = (bits + just_under_half + last_kept) & -(1 << drop)
    return torch.where(x.isnan(), x, rounded.view(torch.float32))  # a NaN's payload could be carried or cut away


def _stochastic(x: Tensor, format: Format, generator: torch.Generator | None) -> Tensor:
    # Exact throughout: divisions and products by powers of two, and integers of few bits. Beyond max, the spacing there
    # goes on, which is as good as any: all that matters is that what lies beyond stays beyond.
    spacing = format.ulp(x)
    steps = x.abs() / spacing
    below = steps.floor()
    draw = torch.randint(2**62, x.shape, dtype=torch.int64, device=x.device, generator=generator)
    up = draw < ((steps - below) * 2.0**62).to(torch.int64)
    rounded = ((below + up) * spacing).copysign(x)
    # A number of the format, or one beyond its range, or inf or NaN: the cast changes only the latter two.
    return _nearest(torch.where(x.isfinite(), rounded, x), format)


def _overflow_of(dtype: torch.dtype) -> Overflow:
    """What torch's cast to this dtype does beyond its range. Asked, because float8_e4m3fn once gave NaN there."""
    cast = torch.tensor(math.inf, dtype=torch.float32, device="cpu").to(dtype).to(torch.float32)
    return "inf" if cast.isinf().item() else "nan" if cast.isnan().item() else "saturate"


#: Every format halfstep knows, by name, widest first.
FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        Format("fp32", torch.float32, 8, 23),
        Format("tf32", None, 8, 10),
        Format("bf16", torch.bfloat16, 8, 7),
        Format("fp16", torch.float16, 5, 10),
        Format("float8_e4m3fn", torch.float8_e4m3fn, 4, 3, False, _overflow_of(torch.float8_e4m3fn)),
        Format("float8_e5m2", torch.float8_e5m2, 5, 2),
    )
}
