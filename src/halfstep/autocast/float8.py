"""Matrix products as in float8: rounded operands around FP32 arithmetic, for the policy ``fp8-mixed:emulate``.

::

    forward    A, B (bf16) -> each to float8_e4m3fn by its own scale -> product in FP32 -> (+ addend) -> to bf16
    backward   dC -> once to float8_e5m2 by its own scale            -> dA = dC·Bᵀ, dB = Aᵀ·dC in FP32 -> to bf16

with the *rounded* A and B in backward. E4M3 has a bit more precision for values, E5M2 more range for gradients. An
addend (a bias) is no operand: neither it nor its gradient is rounded to 8 bits.

A tensor's scale is the largest power of two that leaves its largest finite magnitude within the format's range, so
that nothing overflows and the scale can be undone exactly: the rounded tensor is kept in its own dtype, with at most
4 significant bits. (One limit: from 1.875 * 2**127 on, rounding up may leave FP32's own range, and gives inf.)
Infinities and NaN pass, and take no part in the scale.

Rounding is straight-through for autograd: its gradient is the one that arrives, in second derivatives as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from halfstep import formats
from halfstep.autocast import emulate

OPERANDS = formats.FORMATS["float8_e4m3fn"]
GRADIENTS = formats.FORMATS["float8_e5m2"]


def scale_exponent(x: Tensor, format: formats.Format) -> Tensor:
    """The k, an int32 tensor without dimensions, for which ``x * 2**k`` has its largest finite magnitude just in range.

    That is in (max/2, max] of the format; where nothing in ``x`` is finite and not zero, k is of no consequence.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int32, device=x.device)
    amax = x.detach().float().abs()
    significand, exponent = torch.frexp(torch.where(amax.isfinite(), amax, 0.0).amax())
    top, top_exponent = math.frexp(format.max)
    return top_exponent - exponent - (significand > top).to(torch.int32)


def scaled_round(x: Tensor, format: formats.Format) -> Tensor:
    """``x``, of dtype float32 or bfloat16, rounded to ``format`` under its own scale, in its own dtype; no gradient."""
    exponent = scale_exponent(x, format)
    wide = x.detach().float()
    rounded = _times_power(formats.round_to(_times_power(wide, exponent), format), -exponent)
    return torch.where(wide.isfinite(), rounded, wide).to(x.dtype)


def product(name: str, args: Any, kwargs: Any, low: torch.dtype) -> Any:
    """The aten op ``name``, one of `PRODUCTS`, on arguments of dtype ``low``; the result is of dtype ``low``."""
    with emulate.unlisted():
        return PRODUCTS[name](*args, **kwargs).to(low)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent`` in two steps: the exponent of a subnormal amax's scale is beyond FP32's."""
    half = exponent // 2
    return x * _power(half) * _power(exponent - half)


def _power(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


# ------------------------------------------------------------------ differentiable parts


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: formats.Format) -> Tensor:
        return scaled_round(x, format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _Matmul(torch.autograd.Function):
    """FP32 product of two matrices, or of two batches of them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with emulate.listed_as(OPERANDS.dtype):
            return a.float() @ b.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, b = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):  # who calls backward inside autocast still gets FP32
            g = _rounded(gradients[0], GRADIENTS)
            of_a = (g @ b.float().mT).to(a.dtype) if ctx.needs_input_grad[0] else None
            of_b = (a.float().mT @ g).to(b.dtype) if ctx.needs_input_grad[1] else None
        return of_a, of_b


class _Convolution(torch.autograd.Function):
    """FP32 convolution without bias; ``options`` are the six that follow the bias in aten's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        with emulate.listed_as(OPERANDS.dtype):
            return torch.convolution(x.float(), weight.float(), None, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], False]
        with torch.autocast(x.device.type, enabled=False):
            g = _rounded(gradients[0], GRADIENTS)
            found = torch.ops.aten.convolution_backward(g, x.float(), weight.float(), None, *ctx.options, wanted)
            of_x, of_weight = (None if grad is None else grad.to(x.dtype) for grad in found[:2])
        return of_x, of_weight, None


def _rounded(x: Tensor, format: formats.Format) -> Tensor:
    result: Tensor = _Rounded.apply(x, format)  # type: ignore[no-untyped-call]  # torch's own class lacks annotations
    return result


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = _Matmul.apply(_rounded(a, OPERANDS), _rounded(b, OPERANDS))  # type: ignore[no-untyped-call]  # as above
    return result


# ------------------------------------------------------------------ aten's ops, by these


def _added(addend: Tensor, value: Tensor, beta: float, alpha: float) -> Tensor:
    value = value if alpha == 1 else value * alpha
    if beta == 0:  # aten's promise: then not even a NaN of the addend counts
        return value
    return value + (addend.float() if beta == 1 else addend.float() * beta)


def _addmm(addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(addend, _matmul(a, b), beta, alpha)


def _addmm_activation(
    addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> Tensor:
    value = _addmm(addend, a, b, beta=beta, alpha=alpha)
    return torch.nn.functional.gelu(value, approximate="tanh") if use_gelu else torch.relu(value)


def _addbmm(addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(addend, _matmul(a, b).sum(0), beta, alpha)


def _mv(a: Tensor, vector: Tensor) -> Tensor:
    return _matmul(a, vector[:, None])[:, 0]


def _addmv(addend: Tensor, a: Tensor, vector: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(addend, _mv(a, vector), beta, alpha)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _matmul(a[None], b[:, None])[0, 0]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: bool,  # of aten::_convolution: benchmark, deterministic, cudnn_enabled, allow_tf32
) -> Tensor:
    options = (stride, padding, dilation, transposed, output_padding, groups)
    value: Tensor = _Convolution.apply(_rounded(x, OPERANDS), _rounded(weight, OPERANDS), options)  # type: ignore[no-untyped-call]  # as above
    return value if bias is None else value + bias.float().reshape(-1, *[1] * (weight.dim() - 2))


def _conv_tbc(x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Time, batch, channels: a convolution of one dimension in another order."""
    value = _convolution(x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, [1], [pad], [1], False, [0], 1)
    return value.permute(2, 0, 1)


#: What is computed here: matrix products and convolutions, by their aten names. Not attention or recurrent layers,
#: whose kernels are fused.
PRODUCTS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "mm": _matmul,
        "bmm": _matmul,
        "addmm": _addmm,
        "baddbmm": _addmm,
        "addbmm": _addbmm,
        "_addmm_activation": _addmm_activation,
        "mv": _mv,
        "addmv": _addmv,
        "dot": _dot,
        "convolution": _convolution,
        "_convolution": _convolution,
        "_convolution.deprecated": _convolution,
        "conv_tbc": _conv_tbc,
    }
)

#: Composite ops that are made of them.
MADE_OF_PRODUCTS = frozenset(
    (
        *("conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "conv_transpose1d"),
        *("conv_transpose2d.input", "conv_transpose3d.input", "linear", "matmul", "einsum", "chain_matmul"),
        *("linalg_multi_dot", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "gru.input", "gru.data"),
        *("lstm.input", "lstm.data", "rnn_tanh.input", "rnn_tanh.data", "rnn_relu.input", "rnn_relu.data"),
    )
)
