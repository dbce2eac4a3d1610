"""Where the FP32 master of a 16-bit parameter is kept: five ways, each an encoding of the FP32 value.

============ ===================== ======= =======================================================
master       beside the parameter  bytes   holds
============ ===================== ======= =======================================================
``fp32``     float32 ``master``    4       the FP32 value
``exact``    int16 ``remainder``   2       the FP32 value, bit for bit; fp16: from 2^-16 up
``24bit``    int8 ``remainder``    1       bf16: within 2^(E-16); fp16: within 2^(E-18), E >= -14
``none``     nothing               0       what the 16 bits hold; rounded stochastically
``none``     16-bit                2       with ``rounding="kahan"``: the parameter's rounding error,
             ``compensation``              itself rounded to 16 bits
============ ===================== ======= =======================================================

(E: the value's exponent. A remainder beside fp16 is called ``fp16_remainder``: the two are not read alike, and a
parameter that changes its format takes none along.) An FP32 parameter is its own master, whatever is asked for.

**exact** is the encoding of `halfstep.split.planes`: the parameter is the upper plane, the remainder the lower one. It
is exact in bf16, and in fp16 from 2^-16 up, within 2^-40 below.

**24 bit** drops the lower eight bits of the remainder, to nearest or stochastically, and decoding and encoding again
changes nothing, so a step that does not move the master does not let it drift either. In fp16 the int8 counts units of
2^(field - 33), with the field at least 1, and is limited to 127.

Because a remainder is relative, a parameter that is written from outside (a checkpoint loaded, weights clamped or
averaged) takes its master along, within half a spacing of its new value (in fp16 within one, where the old value was
below 2^-14: there, half a spacing is twice as many units). For the same effect the separate FP32 master
is compared with the parameter, and where its rounding is not the parameter, the parameter wins; and a compensation
that is larger than a parameter's rounding error can be counts as 0. (In bf16 a remainder below 0 would carry a
parameter of 0, from a mask, say, across the sign bit, into the NaNs. `encode` makes no such pair, and `decode` takes
its remainder for 0.)

All tensors are flat (1-D). A NaN becomes the canonical one of its sign: others would not look like NaN in the upper
half. Sources: the integer split is NVIDIA Apex's and Transformer Engine's idea (``store_param_remainders``), with the
rounding and the remainder made one encoding; fixed-point remainders for fp16 and everything at 24 bits derived here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from halfstep.optim.dither import shift_right, uniform
from halfstep.split import join, split

Master = Literal["fp32", "exact", "24bit", "none"]
Rounding = Literal["nearest", "stochastic", "kahan"]

_INF = 0x7F800000
_QUIET_NAN = 0x7FC00000
_MANTISSA = 0x7FFFFF
_MAGNITUDE = 0x7FFFFFFF
#: At a power of two, in proportion: no rounding error is larger than this part of the rounded value.
_HALF_SPACING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


#: Names of what may be kept beside a parameter.
NAMES = ("master", "remainder", "fp16_remainder", "compensation")


def extra(master: Master, rounding: Rounding, dtype: torch.dtype) -> tuple[str, torch.dtype] | None:
    """Name and dtype of what is kept beside a parameter of ``dtype``; None: nothing."""
    if dtype is torch.float32:
        return None
    if master == "fp32":
        return "master", torch.float32
    if master in ("exact", "24bit"):
        name = "remainder" if dtype is torch.bfloat16 else "fp16_remainder"
        return name, torch.int16 if master == "exact" else torch.int8
    return ("compensation", dtype) if rounding == "kahan" else None


def decode(parameter: Tensor, kept: Tensor | None) -> Tensor:
    """The FP32 master of a flat parameter, as a new tensor.

    Args:
        parameter: float32, bfloat16 or float16.
        kept: what is kept beside it; its dtype tells which encoding it is.
    """
    if kept is None or parameter.dtype is torch.float32:
        return parameter.to(torch.float32, copy=True)
    if kept.dtype is torch.float32:
        return torch.where(kept.to(parameter.dtype) == parameter, kept, parameter.float())
    if kept.dtype is parameter.dtype:
        x, error = parameter.float(), kept.float()
        return torch.where(error.abs() <= x.abs() * _HALF_SPACING[parameter.dtype], x + error, x)
    if parameter.dtype is torch.bfloat16:
        upper = parameter.view(torch.int16).to(torch.int32) << 16
        exact = kept.dtype is torch.int16
        bits = join(parameter, kept).view(torch.int32) if exact else upper + (kept.to(torch.int32) << 8)
        return torch.where((bits ^ upper) < 0, upper, bits).view(torch.float32)
    if kept.dtype is torch.int16:
        return join(parameter, kept)
    return parameter.float() + kept.float() * _unit(parameter)


def encode(x: Tensor, parameter: Tensor, kept: Tensor | None, noise: Tensor | None = None) -> None:
    """Write the master ``x`` into a flat parameter and what is kept beside it.

    Args:
        x: float32; may be changed.
        noise: int32 dither bits where the dropped bits are rounded stochastically; None: to nearest.
    """
    if parameter.dtype is torch.float32:
        parameter.copy_(x)
    elif kept is None:
        parameter.copy_(x if noise is None else _stochastic(x, parameter.dtype, noise))
    elif kept.dtype in (torch.float32, parameter.dtype):
        parameter.copy_(x)
        difference = x if kept.dtype is torch.float32 else x - parameter.float()
        kept.copy_(difference if kept.dtype is torch.float32 else difference.nan_to_num_(0, 0, 0))
    elif kept.dtype is torch.int16:
        for into, plane in zip((parameter, kept), split(x, parameter.dtype), strict=True):
            into.copy_(plane)
    elif parameter.dtype is torch.bfloat16:
        _to_24_bits_bf16(x, parameter, kept, noise)
    else:
        _to_24_bits_fp16(x, parameter, kept, noise)


def _canonical(x: Tensor) -> Tensor:
    """The bits of x, int32, with every NaN the canonical one of its sign."""
    bits = x.view(torch.int32)
    return torch.where(x.isnan(), (bits & ~_MAGNITUDE) | _QUIET_NAN, bits)


def _to_24_bits_bf16(x: Tensor, parameter: Tensor, remainder: Tensor, noise: Tensor | None) -> None:
    # inf and the canonical NaN have these bits 0, and stay.
    bits = (_canonical(x) + (0x80 if noise is None else shift_right(noise, 24))) & ~0xFF
    upper = (bits + 0x8000) >> 16
    parameter.view(torch.int16).copy_(upper)
    remainder.copy_((bits - (upper << 16)) >> 8)


def _to_24_bits_fp16(x: Tensor, parameter: Tensor, remainder: Tensor, noise: Tensor | None) -> None:
    parameter.copy_(x)
    units = (x - parameter.float()).nan_to_num_(0, 0, 0) / _unit(parameter)
    units = units.round_() if noise is None else _floor_or_above(units, noise)
    remainder.copy_(units.clamp_(-127, 127))


def _unit(parameter: Tensor) -> Tensor:
    """What one count of the int8 remainder of an fp16 parameter stands for: a power of two, float32."""
    field = (parameter.view(torch.int16).to(torch.int32) >> 10) & 0x1F
    return ((field.clamp(min=1) - 33 + 127) << 23).view(torch.float32)


def _stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """x rounded to 16 bits, away from zero with the chance that makes the mean x.

    What is finite stays finite in fp16 up to 65520, where a cast begins to give inf; bf16 reaches inf from beyond its
    largest number, with the chance that is due.
    """
    bits = _canonical(x)
    finite = (bits & _MAGNITUDE) < _INF
    if dtype is torch.bfloat16:
        rounded = torch.where(finite, bits + shift_right(noise, 16), bits) & ~0xFFFF
        return rounded.view(torch.float32)
    # fp16: 13 bits more in a float32's mantissa; below 2^-14 the spacing stays 2^-24.
    normal = ((bits + shift_right(noise, 19)) & ~0x1FFF).view(torch.float32).clamp(-65504, 65504)
    small = _floor_or_above(x.abs() * 2.0**24, noise).mul_(2.0**-24).copysign_(x)
    magnitude = x.abs()
    return torch.where(magnitude < 2.0**-14, small, torch.where(magnitude < 65520, normal, x))


def _floor_or_above(x: Tensor, noise: Tensor) -> Tensor:
    """Whole numbers: one up from the floor with the chance that makes the mean x.

    Compared, and not added to x before the floor: that sum is rounded, and would now and then lift a whole number.
    """
    below = x.floor()
    return below + (uniform(noise) < x - below)
