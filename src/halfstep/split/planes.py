"""An FP32 number as two 16-bit ones: the bfloat16 nearest to it, and what is missing to its bits.

    hi = (bits + 0x8000) >> 16       the upper half, rounded half away from zero: a bfloat16
    lo = bits - (hi << 16)           in [-2^15, 2^15): an int16, the lower half of the bits

Each `hi` owns 2^16 values of `lo`, so the pair says the same as the 32 bits, for every number that is not NaN. A NaN
becomes the quiet one of its sign: others would look like inf or zero in the upper half.

Rounding is to nearest, but ties go away from zero instead of to even: an even `hi` would own 65,537 FP32 numbers, one
more than `lo` can tell apart. So `hi` differs from PyTorch's cast for one number in 65,536, by the last place of
bfloat16.

The same encoding is the ``exact`` master of `halfstep.optim.masters`, and of its kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = float("nan")


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The planes of a float32 tensor of any shape: bfloat16 and int16, with its strides where it is dense."""
    x = x.detach()
    nan = x.isnan()
    if nan.any() if x.device.type == "cpu" else True:  # elsewhere asking would wait for the device
        x = torch.where(nan, torch.full_like(x, _NAN).copysign(x), x)
    bits = x.view(torch.int32)
    lo = bits.to(torch.int16)  # the lower half: what does not fit is cut off
    hi = bits.add(0x8000).bitwise_right_shift_(16).to(torch.int16)
    return hi.view(torch.bfloat16), lo


def join(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 tensor that two planes stand for; exact."""
    return lo.to(torch.int32).add_(hi.view(torch.int16), alpha=1 << 16).view(torch.float32)
