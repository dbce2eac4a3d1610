"""An FP32 number as two 16-bit ones: the 16-bit number nearest to it, and what is missing.

**bfloat16.** The planes are the halves of the bits, the upper one rounded::

    hi = (bits + 0x8000) >> 16       rounded half away from zero: a bfloat16
    lo = bits - (hi << 16)           in [-2^15, 2^15): an int16, the lower half of the bits

Each `hi` owns 2^16 values of `lo`, so the pair says the same as the 32 bits, for every number that is not NaN. A NaN
becomes the quiet one of its sign: others would look like inf or zero in the upper half.

Rounding is to nearest, but ties go away from zero instead of to even: an even `hi` would own 65,537 FP32 numbers, one
more than `lo` can tell apart. So `hi` differs from PyTorch's cast for one number in 65,536, by the last place of
bfloat16.

**float16.** The exponents differ, so `lo` counts units that are a fixed part of the spacing of `hi`::

    hi = x rounded to nearest even   PyTorch's cast
    lo = (x - hi) / unit             unit = 2^(exponent field of hi - 39)

A normal `hi` has |x - hi| <= 2^13 units, and each FP32 number there is a whole number of them: exact from 2^-16 up, and
within 2^-40 below, where no two 16-bit numbers could hold an FP32 one (of those, half are smaller than any float16).
Beyond 65504 it is inf, as in a cast, and a zero loses its sign.

The same encodings are the ``exact`` master of `halfstep.optim.masters`, and of its kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = float("nan")

#: What an upper plane may be.
FORMATS = (torch.bfloat16, torch.float16)


def split(x: Tensor, upper: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """The planes of a float32 tensor of any shape, with its strides where it is dense.

    Args:
        upper: bfloat16 or float16.

    Returns:
        The upper plane, and an int16 one.
    """
    x = x.detach()
    if upper is torch.float16:
        hi = x.to(torch.float16)
        return hi, ((x - hi.float()).nan_to_num_(0, 0, 0) / _unit(hi)).round_().to(torch.int16)
    nan = x.isnan()
    # Asking saves a pass; not where the host would wait for a device, or a compiled graph would end.
    if x.device.type != "cpu" or torch.compiler.is_compiling() or nan.any():
        x = torch.where(nan, torch.full_like(x, _NAN).copysign(x), x)
    bits = x.view(torch.int32)
    lo = bits.to(torch.int16)  # the lower half: what does not fit is cut off
    hi = bits.add(0x8000).bitwise_right_shift_(16).to(torch.int16)
    return hi.view(torch.bfloat16), lo


def join(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 tensor that two planes stand for."""
    if hi.dtype is torch.float16:
        return hi.float().addcmul_(lo.float(), _unit(hi))
    return lo.to(torch.int32).add_(hi.view(torch.int16), alpha=1 << 16).view(torch.float32)


def _unit(hi: Tensor) -> Tensor:
    """What one count beside a float16 stands for: a power of two, float32."""
    exponent = ((hi.view(torch.int16).to(torch.int32) >> 10) & 0x1F) - 39
    return ((exponent + 127) << 23).view(torch.float32)
