"""Linear layers in float8 at three sizes: from where on are they faster than in bf16?

Not a format that halfstep trains in (`fp8-mixed` exists only emulated): the numbers say whether it should. Tensors are
scaled by their own largest magnitude at each product, E4M3 forward and E5M2 for gradients; the FP8 matrix product of
PyTorch (`torch._scaled_mm`) takes its second operand column after column, so each of a layer's three products needs its
operands in another order, and the copies are part of the price. torchao's layers stand beside ours where it is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpu import timing
from gpu.section import Section

WIDTHS = (8192, 4096, 2048)
TOKENS = 16384
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def float8(s: Section) -> None:
    tokens = 64 if s.tiny else TOKENS
    for width in (64,) if s.tiny else WIDTHS:
        took: dict[str, float] = {}
        x = torch.randn(tokens, width, device=s.device, dtype=torch.bfloat16, requires_grad=True)
        for kind, make in {"bf16": nn.Linear, "float8": Float8Linear, "torchao float8": _torchao}.items():
            name = f"MLP of {width}, {kind}"
            if not s.has_time(name, 6):
                continue
            with s.part(name):
                layer = _mlp(width, make, s.device)
                if layer is None:
                    s.note(name, status="torchao is not here")
                    continue
                called = torch.compile(layer) if s.cuda else layer

                def step(called: Any = called, x: Tensor = x) -> None:
                    called(x).sum().backward()

                found = timing.times(s.device, step, warm=3, steps=10, most_seconds=2)
                took[kind] = found.median
                baseline = took.get("bf16")
                speed_up = None if baseline is None else round(baseline / found.median, 3)
                s.measure(name, **found.values(), speed_up=speed_up, tokens=tokens, error=_error(width, make, s.device))


def _mlp(width: int, make: Any, device: str) -> nn.Module | None:
    """Two layers without bias, four times as wide between them, in bf16; None where their package is not here."""
    torch.manual_seed(0)
    with torch.device(device):
        if make is _torchao:
            try:
                from torchao.float8 import convert_to_float8_training
            except Exception:  # it may be there and not fit this PyTorch
                return None
            layers = nn.Sequential(_linear(width, 4 * width), nn.GELU(), _linear(4 * width, width)).bfloat16()
            converted: nn.Module = convert_to_float8_training(layers)
            return converted
        wide, narrow = make(width, 4 * width, bias=False), make(4 * width, width, bias=False)
        return nn.Sequential(wide, nn.GELU(), narrow).bfloat16()


def _linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


def _torchao(width: int, out: int, bias: bool) -> nn.Module:
    raise AssertionError("torchao converts a model; it makes no layers")


def _error(width: int, make: Any, device: str) -> float | None:
    """How far a layer's output is from the same layer in FP32, relative to it: float8 is near 0.04, bf16 near 0.003."""
    if make is _torchao:
        return None
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        layer, x = make(width, width, bias=False), torch.randn(64, width)
        exact = functional.linear(x.double(), layer.weight.bfloat16().double())
        got = layer.bfloat16()(x.bfloat16()).double()
        return round(float((got - exact).norm() / exact.norm()), 5)


class Float8Linear(nn.Linear):
    """A linear layer whose three products run in float8."""

    def forward(self, x: Tensor) -> Tensor:
        products: Any = _Products.apply
        out: Tensor = products(x.reshape(-1, x.shape[-1]), self.weight)
        return out.reshape(*x.shape[:-1], -1)


class _Products(torch.autograd.Function):
    """x (T, K), weight (N, K) -> x weightᵀ (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, E4M3, E4M3, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        to_x = _product(gradient, weight.t(), E5M2, E4M3, fast=False)
        to_weight = _product(gradient.t(), x.t(), E5M2, E4M3, fast=False)
        return to_x, to_weight


def _product(a: Tensor, b: Tensor, a_format: torch.dtype, b_format: torch.dtype, fast: bool) -> Tensor:
    """a (M, K), b (N, K) -> a bᵀ (M, N), each operand rounded to its format under a scale of its own."""
    low_a, inverse_a = _rounded(a, a_format)
    low_b, inverse_b = _rounded(b, b_format)
    return torch._scaled_mm(low_a, low_b.t(), inverse_a, inverse_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _rounded(x: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous tensor in a format, and the 0-d factor that takes it back."""
    most = torch.finfo(form).max
    inverse = x.abs().amax().float().clamp(min=1e-12) / most
    return (x.float() / inverse).clamp(-most, most).to(form).contiguous(), inverse
