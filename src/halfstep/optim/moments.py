"""Formats of optimizer state: FP32, bf16, and 8 bits with a scale per 64 elements.

A *signed* state is a mean of gradients (momentum, Adam's m); a *square* one a mean of squares (Adam's v).

=========== ================================ =======================================
state       signed                           square
=========== ================================ =======================================
``fp32``    float32                          float32
``bf16``    bfloat16, to nearest             bfloat16, stochastically
``8bit``    int8  q: m = scale (q/127)|q/127|  uint8 q: v = (scale q/255)^2
=========== ================================ =======================================

**Why squares are rounded stochastically.** With beta2 = 0.999 a step changes v by a thousandth of itself, less than
half the spacing of bf16 or of an 8-bit code: to nearest, v could not move, or only upwards. Rounded stochastically its
mean is right.

**Why scales are FP32.** Adam's update does not change when all gradients are multiplied by a constant; it must not
when they are stored either. A scale in fp16 loses that below gradients of 1e-5 and overflows above 1e4. The scale is
the largest |m|, or sqrt(v), of 64 consecutive elements (8 bytes in 64: an eighth of a byte per parameter for both
states), and 2^-126 where all are zero or subnormal.

**Why roots.** The square root of v is what Adam divides by, and its codes are evenly spaced in it; a code is never 0
where v is not, for the update would explode there. The root of |m| keeps small elements beside large ones, whose error
in proportion would otherwise be the largest.

Groups of 64 follow memory and do not cross the parameter's first dimension, so a parameter that is sharded along it
takes its scales along. Where fewer than 64 elements lie behind an index of it (LoRA's B, depthwise convolutions),
groups cross it, and follow memory through the whole tensor; such a parameter's state stays FP32 where it is sharded.
Small parameters (below 4096 elements) stay FP32: they cost nothing.

**Codes have names of their own**, ``exp_avg_codes`` beside ``exp_avg_scale``: who looks for values, PyTorch's
optimizers for one, finds none, and does not take codes for them.

All tensors are flat. Sources: 8-bit states with block scales are Dettmers et al. 2022 (arXiv 2110.02861); a root as
code for v is FlashOptim's (arXiv 2602.23349); scales, dither and the code for m derived here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from halfstep.optim.dither import shift_right, uniform
from halfstep.optim.layout import flat, like

State = Literal["fp32", "bf16", "8bit"]
GROUP = 64
SMALLEST = 4096
_TINY = 2.0**-126

SIGNED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.int8}
SQUARE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}


def has_rows(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether groups keep to one index of the first dimension, behind which there is at least one of them."""
    return len(shape) > 1 and math.prod(shape[1:]) >= GROUP


def row_length(shape: torch.Size | tuple[int, ...]) -> int:
    """Elements of which no group leaves the bounds: behind one index of the first dimension, else all."""
    return math.prod(shape[1:]) if has_rows(shape) else math.prod(shape)


def format_for(state: State, shape: torch.Size | tuple[int, ...]) -> State:
    """The format that a parameter's state gets: FP32 in place of 8 bits where that saves nothing."""
    return "fp32" if state == "8bit" and math.prod(shape) < SMALLEST else state


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Rows and groups in a row."""
    return (shape[0] if has_rows(shape) else 1), -(-row_length(shape) // GROUP)


def entry(state: Mapping[str, Any], name: str) -> str:
    """Under which name a parameter's state holds the moment ``name``: its own, or that of its codes."""
    codes = f"{name}_codes"
    return codes if codes in state else name


def entries(name: str) -> tuple[str, str, str]:
    """All names under which something of the moment ``name`` may be held."""
    return name, f"{name}_codes", f"{name}_scale"


def decode(codes: Tensor, scale: Tensor | None, row: int) -> Tensor:
    """The FP32 state; a new tensor unless it is FP32, which is returned as it is.

    Args:
        codes: flat float32, bfloat16, int8 (signed) or uint8 (square).
        scale: flat float32, one of each group, for the 8-bit formats.
        row: elements in a row.
    """
    if scale is None:
        return codes.float()
    grouped = _groups(codes.float(), row)
    if codes.dtype is torch.int8:
        root = grouped / 127
        return _flat(root * root.abs() * scale[:, None], codes.numel(), row)
    root = grouped * (scale[:, None] / 255)
    return _flat(root * root, codes.numel(), row)


def encode(x: Tensor, codes: Tensor, scale: Tensor | None, row: int, noise: Tensor | None) -> None:
    """Write the FP32 state ``x`` into ``codes`` and ``scale``.

    Args:
        x: flat float32; may be ``codes`` itself.
        noise: int32 dither bits, for a square state below FP32; None: signed.
    """
    if scale is not None:
        _encode_8bit(x, codes, scale, row, noise)
    elif codes.dtype is torch.float32:
        if codes is not x:
            codes.copy_(x)
    elif noise is None:
        codes.copy_(x)
    else:
        bits = x.view(torch.int32)
        moved = torch.where(x.isfinite(), bits + shift_right(noise, 16), bits) & ~0xFFFF
        codes.copy_(torch.where(x.isnan(), x, moved.view(torch.float32)))


def _encode_8bit(x: Tensor, codes: Tensor, scale: Tensor, row: int, noise: Tensor | None) -> None:
    signed = noise is None
    root = x.abs() if signed else x.sqrt()
    largest = _groups(root, row).amax(1).clamp_(min=_TINY)  # NaN stays NaN, and makes its group NaN
    scale.copy_(largest)
    relative = _flat(_groups(root, row) * (1 / largest)[:, None], x.numel(), row)
    if noise is None:
        codes.copy_(relative.sqrt_().mul_(127).round_().nan_to_num_(0).copysign_(x))
        return
    code = (relative * 255 + uniform(noise)).floor_().nan_to_num_(0).clamp_(max=255)
    codes.copy_(torch.where(x > 0, code.clamp(min=1), code))


def relaid(codes: Tensor, scale: Tensor | None, pattern: Tensor) -> Tensor:
    """A state in the memory order of ``pattern``; scales are set anew, for groups of 64 follow memory.

    Args:
        codes: dense, of the pattern's shape.
        scale: changed in place.
    """
    if scale is None:
        return like(codes, pattern)
    row = row_length(pattern.shape)
    x = like(decode(flat(codes), flat(scale), row).as_strided(codes.shape, codes.stride()), pattern)
    codes = torch.empty_strided(pattern.shape, pattern.stride(), dtype=codes.dtype, device=codes.device)
    half = torch.full((x.numel(),), -(1 << 31), dtype=torch.int32, device=x.device)  # to nearest
    encode(flat(x), flat(codes), flat(scale), row, half if codes.dtype is torch.uint8 else None)
    return codes


def _groups(x: Tensor, row: int) -> Tensor:
    """(number of groups, 64), the last of each row filled with zeros."""
    if row % GROUP == 0:
        return x.view(-1, GROUP)
    return functional.pad(x.view(-1, row), (0, -row % GROUP)).view(-1, GROUP)


def _flat(groups: Tensor, numel: int, row: int) -> Tensor:
    if row % GROUP == 0:
        return groups.reshape(numel)
    return groups.view(numel // row, -1)[:, :row].reshape(numel)
