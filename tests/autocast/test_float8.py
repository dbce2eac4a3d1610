"""Float8 products against a slow twin: every code of the format, exact fractions, one element at a time.

The FP32 product between the roundings is torch's own in both, so the comparison is bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.autocast import autocast
from halfstep.autocast.float8 import GRADIENTS, MADE_OF_PRODUCTS, OPERANDS, PRODUCTS, scale_exponent, scaled_round
from halfstep.autocast.rules import HEAVY, plan
from halfstep.formats import Format
from halfstep.launch import run_under_policy
from halfstep.policy import parse

FP8 = "fp8-mixed:emulate"
both_formats = pytest.mark.parametrize("format", [OPERANDS, GRADIENTS], ids=str)


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """bf16 values over many octaves, as FP32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for shape in shapes]
    return [(x * torch.exp2(3 * octave)).bfloat16().float() for x, octave in drawn]


def magnitudes(format: Format) -> list[Fraction]:
    """The format's magnitudes in the order of their codes, of which the even ones end in a zero bit."""
    assert format.dtype is not None
    values = torch.arange(128, dtype=torch.uint8).view(format.dtype).double().tolist()
    return [Fraction(value) for value in values if math.isfinite(value)]


def twin(x: Tensor, format: Format) -> Tensor:
    """`scaled_round` as one would say it."""
    table = magnitudes(format)
    amax = max((abs(Fraction(v)) for v in x.flatten().tolist() if math.isfinite(v)), default=Fraction(0))
    scale = Fraction(2) ** 400
    while amax * scale > table[-1]:
        scale /= 2

    def one(value: float) -> float:
        if not math.isfinite(value):
            return value
        exact = abs(Fraction(value)) * scale
        code = min(range(len(table)), key=lambda i: (abs(table[i] - exact), i % 2))
        return math.copysign(float(table[code] / scale), value)

    return torch.tensor([one(v) for v in x.flatten().tolist()], dtype=torch.float64).to(x.dtype).reshape(x.shape)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, NaN equal to NaN."""
    return (
        a.dtype is b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan()).all())
    )


# ------------------------------------------------------------------ rounding with a scale

bits = st.integers(-(2**31), 2**31 - 1)
below_the_top = 2.0**127 * 1.75  # from 1.875 on, rounding up leaves FP32


@both_formats
@settings(max_examples=150, deadline=None, derandomize=True)
@given(codes=st.lists(bits, min_size=1, max_size=12))
@example(codes=[1])  # the smallest subnormal number
@example(codes=[0x007FFFFF, 3, -(2**31)])
@example(codes=[0x7F000000, 1])  # 2**127
def test_any_bits_round_as_in_the_twin(format: Format, codes: list[int]) -> None:
    x = torch.tensor(codes, dtype=torch.int32).view(torch.float32)
    x = torch.where(x.isfinite(), x.clamp(-below_the_top, below_the_top), x)
    assert same(scaled_round(x, format), twin(x, format))


@both_formats
@settings(max_examples=150, deadline=None, derandomize=True)
@given(codes=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=12))
def test_what_was_bf16_stays_exact_in_bf16(format: Format, codes: list[int]) -> None:
    x = torch.tensor(codes, dtype=torch.int16).view(torch.bfloat16)
    x = torch.where(x.isfinite(), x.clamp(-below_the_top, below_the_top), x)
    result = scaled_round(x, format)
    assert result.dtype is torch.bfloat16 and same(result.float(), scaled_round(x.float(), format))


@both_formats
@settings(max_examples=300, deadline=None, derandomize=True)
@given(amax=st.floats(2.0**-149, below_the_top, width=32), rest=st.floats(0, 1))
@example(amax=448.0, rest=1.0)
@example(amax=448.00003, rest=1.0)
@example(amax=2.0**-149, rest=0.0)
def test_the_scale_is_the_largest_power_of_two_that_stays_in_range(format: Format, amax: float, rest: float) -> None:
    x = torch.tensor([-amax * rest, amax, math.inf, math.nan])
    exponent = scale_exponent(x, format)
    assert exponent.dtype is torch.int32 and exponent.shape == ()
    scaled = Fraction(amax) * Fraction(2) ** int(exponent)  # a power of two, whatever the exponent
    assert Fraction(format.max) / 2 < scaled <= Fraction(format.max)


@both_formats
def test_inf_and_nan_pass_and_leave_the_scale_alone(format: Format) -> None:
    x = torch.tensor([1.06, math.inf, -math.inf, math.nan, 0.3, 600.0])
    result = scaled_round(x, format)
    assert same(result[1:4], x[1:4])
    assert same(result[[0, 4, 5]], scaled_round(x[[0, 4, 5]], format))
    assert scaled_round(torch.tensor([math.inf, math.nan]), format).isinf().tolist() == [True, False]


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_keep_their_sign_and_nothing_stays_nothing(format: Format, dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert same(scaled_round(zeros, format), zeros)
    empty = torch.empty(0, 3, dtype=dtype)
    assert same(scaled_round(empty, format), empty)


# ------------------------------------------------------------------ products

OPS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "mm": (torch.mm, tensors((6, 10), (10, 5))),
    "bmm": (torch.bmm, tensors((2, 4, 6), (2, 6, 3))),
    "linear": (functional.linear, tensors((6, 10), (5, 10))),
    "conv2d": (lambda x, w: functional.conv2d(x, w, stride=2, padding=1), tensors((1, 2, 5, 5), (3, 2, 3, 3))),
    "conv2d same, grouped": (
        lambda x, w: functional.conv2d(x, w, padding="same", groups=2),
        tensors((1, 2, 4, 4), (4, 1, 3, 3)),
    ),
    "conv_transpose1d": (lambda x, w: functional.conv_transpose1d(x, w, stride=2), tensors((2, 2, 5), (2, 3, 3))),
    "conv3d": (functional.conv3d, tensors((1, 2, 3, 3, 3), (2, 2, 2, 2, 2))),
    "matmul by a vector": (torch.matmul, tensors((6, 8), (8,))),
    "dot": (torch.matmul, tensors((12,), (12,))),
    "matmul of many dimensions": (torch.matmul, tensors((2, 3, 4), (4, 5))),
    "einsum": (lambda a, b: torch.einsum("bid,bjd->bij", a, b), tensors((2, 3, 4), (2, 5, 4))),
    "conv_tbc": (lambda x, w: torch.conv_tbc(x, w, torch.zeros(3), 1), tensors((5, 2, 4), (3, 4, 3))),
}


def run(op: Callable[..., Tensor], inputs: list[Tensor], text: str = FP8) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, gradients, and the gradient that came in."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with autocast(text, "cpu"):
        out = op(*leaves)
    incoming = tensors(tuple(out.shape), seed=7)[0].to(out.dtype)
    return out.detach(), list(torch.autograd.grad(out, leaves, incoming)), incoming


@pytest.mark.parametrize("case", OPS)
def test_products_and_their_gradients_are_the_twins_bit_for_bit(case: str) -> None:
    op, inputs = OPS[case]
    out, gradients, incoming = run(op, inputs)
    leaves = [twin(x, OPERANDS).requires_grad_() for x in inputs]
    expected = op(*leaves)
    assert out.dtype is torch.bfloat16
    true = torch.autograd.grad(expected, leaves, twin(incoming.float(), GRADIENTS))
    pairs = zip([out.float(), *gradients], [expected.bfloat16().float(), *true], strict=True)
    for got, want in pairs:
        rounded = want.bfloat16().float()
        if case in ("mm", "bmm", "linear", "conv2d", "conv2d same, grouped", "conv3d"):
            assert same(got, rounded)
        else:  # torch sums these in another order when it is asked in another shape
            apart = (got - want).abs() <= 2.0**-8 * want.abs() + 2.0**-18 * want.abs().amax()
            assert apart.all() and (got == rounded).double().mean() > 0.8
    plain, plain_gradients, _ = run(op, inputs, "bf16-mixed")
    assert not torch.equal(out, plain)
    assert not any(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))


@pytest.mark.parametrize(
    ("op", "shapes", "beta", "alpha"),
    [
        ("addmm", ((5,), (6, 10), (10, 5)), 1.0, 1.0),
        ("addmm", ((6, 5), (6, 10), (10, 5)), 0.5, 2.0),
        ("baddbmm", ((2, 4, 3), (2, 4, 6), (2, 6, 3)), 1.0, 0.25),
        ("addbmm", ((4, 3), (2, 4, 6), (2, 6, 3)), 2.0, 1.0),
    ],
)
def test_addends_and_their_gradients_are_not_rounded_to_8_bits(
    op: str, shapes: tuple[tuple[int, ...], ...], beta: float, alpha: float
) -> None:
    inputs = tensors(*shapes)
    out, gradients, incoming = run(lambda *args: getattr(torch, op)(*args, beta=beta, alpha=alpha), inputs)
    addend, a, b = inputs[0], *(twin(x, OPERANDS) for x in inputs[1:])
    product = a @ b
    product = product.sum(0) if op == "addbmm" else product
    assert same(out, (product * alpha + addend * beta).bfloat16())
    wide = incoming.float() * beta
    expected = wide.sum(0) if addend.dim() == 1 else wide
    assert same(gradients[0], expected.bfloat16().float())
    g = twin(incoming.float() * alpha, GRADIENTS).expand(*a.shape[:-1], -1)
    assert same(gradients[1], (g @ b.mT).bfloat16().float())
    assert same(gradients[2], (a.mT @ g).bfloat16().float())


def test_layers_add_their_bias_and_a_beta_of_zero_ignores_the_addend() -> None:
    x, w, b, image, kernel = tensors((6, 10), (5, 10), (5,), (1, 2, 5, 5), (5, 2, 3, 3))
    rx, rw, ri, rk = (twin(t, OPERANDS) for t in (x, w, image, kernel))
    with autocast(FP8, "cpu"):
        outs = [
            functional.linear(x, w, b),
            functional.conv2d(image, kernel, b),
            torch.addmm(torch.full((5,), math.nan), x, w.t(), beta=0),
            torch.addmv(b.bfloat16(), w.bfloat16(), x[0].bfloat16()),  # no rule of the CPU lowers it
            torch._addmm_activation(b, x, w.t()),
        ]
    product = rx @ rw.t()
    expected = [
        product + b,
        functional.conv2d(ri, rk) + b.reshape(-1, 1, 1),
        product,
        (rw @ twin(x[0], OPERANDS)[:, None])[:, 0] + b,
        torch.relu(product + b),
    ]
    assert all(same(out, want.bfloat16()) for out, want in zip(outs, expected, strict=True))


def test_inf_and_nan_go_through_products_and_gradients() -> None:
    x = torch.tensor([[1.0, math.inf], [2.0, 3.0], [math.nan, 1.0]], requires_grad=True)
    w = torch.ones(2, 1, requires_grad=True)
    with autocast(FP8, "cpu"):
        out = x @ w
    assert out[0].item() == math.inf and out[1].item() == 5.0 and out[2].isnan()
    out.backward(torch.tensor([[1.0], [math.inf], [1.0]], dtype=out.dtype))
    assert x.grad is not None and x.grad.isinf().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_backward_is_fp32_also_when_it_is_called_inside_the_region() -> None:
    results = []
    for inside in (False, True):
        x, w = (t.requires_grad_() for t in tensors((6, 10), (10, 5)))
        image, kernel = (t.requires_grad_() for t in tensors((1, 2, 5, 5), (3, 2, 3, 3)))
        with autocast(FP8, "cpu"):
            parts = [(x @ w).float(), functional.conv2d(image, kernel).float()]
            # Gradients of E5M2's whole range: to round them once more, to E4M3, would lose the small ones.
            out = sum((part * torch.logspace(0, -8, part[0].numel()).view_as(part[0])).sum() for part in parts)
            assert isinstance(out, Tensor)
            if inside:
                out.backward()
        if not inside:
            out.backward()
        results.append([t.grad for t in (x, w, image, kernel)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_second_derivatives_pass_through() -> None:
    x, w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)[:2]
    results = []
    for text in ("bf16-mixed", FP8):
        leaf = x.clone().requires_grad_()
        with autocast(text, "cpu"):
            out = functional.linear(leaf, w).float().pow(3).sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        results.append(second)
    assert results[0].abs().max() > 1 and torch.allclose(*results, rtol=0.3, atol=0.3)


def test_every_heavy_op_is_a_product_or_a_fused_one() -> None:
    fused = {"scaled_dot_product_attention", "_native_multi_head_attention", "mkldnn_rnn_layer"}
    assert HEAVY - PRODUCTS.keys() == fused | {"addr", "vdot"}  # an outer product sums nothing; vdot is for complex
    for rules in ("torch", "cuda"):
        changed = plan(parse(f"fp8-mixed:rules={rules}:emulate"), "cpu")
        assert changed is not None
        assert PRODUCTS.keys() <= changed.rules.keys()
        if rules == "torch":
            assert changed.rules.keys() - changed.kept <= PRODUCTS.keys() | MADE_OF_PRODUCTS


# ------------------------------------------------------------------ in models


class NoProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))[:, None]
        return torch.softmax(functional.gelu(functional.scaled_dot_product_attention(h, h, h)), -1)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])  # one kernel, or of products inside
@pytest.mark.parametrize("rules", ["torch", "cuda"])
def test_what_is_no_matrix_product_is_as_under_bf16_mixed(rules: str, backend: SDPBackend) -> None:
    seen = []
    for text in (f"bf16-mixed:rules={rules}", f"fp8-mixed:rules={rules}:emulate"):
        torch.manual_seed(0)
        model = NoProducts()
        with autocast(text, "cpu"), sdpa_kernel(backend):
            out = model(torch.arange(12).reshape(2, 6) % 11)
        out.float()[..., 0].sum().backward()
        seen.append([out, *(p.grad for p in model.parameters())])
    assert all(same(a, b) for a, b in zip(*seen, strict=True))


def test_a_recurrent_layer_is_as_under_bf16_mixed() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(8, 6), torch.randn(5, 2, 8)
    outs = []
    for text in ("bf16-mixed", FP8):
        with autocast(text, "cpu"), torch.no_grad():
            outs.append(lstm(x)[0])
    assert same(*outs)


def test_regions_nest_and_leave_nothing_behind() -> None:
    x, w = tensors((6, 10), (10, 5))
    rounded, plain = (twin(x, OPERANDS) @ twin(w, OPERANDS)).bfloat16(), x.bfloat16() @ w.bfloat16()
    assert not torch.equal(rounded, plain)
    with autocast(FP8, "cpu"):
        assert same(x @ w, rounded)
        with autocast("bf16-mixed", "cpu"):
            assert same(x @ w, plain)
        with torch.autocast("cpu", enabled=False):
            assert same(x @ w, x.mm(w)) and (x @ w).dtype is torch.float32
        with pytest.raises(ZeroDivisionError), autocast("fp16-mixed:emulate", "cpu"):
            assert (x @ w).dtype is torch.float16
            raise ZeroDivisionError
        assert same(x @ w, rounded)
        assert (x.double() @ w.double()).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert same(x @ w, plain)
    assert same(x @ w, x.mm(w)) and (x @ w).dtype is torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(reentrant: bool) -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(48, 8))
        mp = halfstep.MixedPrecision(model, torch.optim.SGD(model.parameters(), 0.1), FP8)
        x = torch.randn(3, 4, 8, requires_grad=True)
        with mp.autocast():
            out: Any = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
            loss = out.float().pow(2).mean()
        mp.backward(loss)
        gradients.append([p.grad for p in model.parameters()])
    assert all(same(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_an_explanation_names_the_products_and_not_the_steps_of_rounding() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    mp = halfstep.MixedPrecision(model, torch.optim.SGD(model.parameters(), 0.1), FP8)
    explanation = mp.explain(torch.randn(5, 2, 8))
    assert {use.op for use in explanation.uses} == {"cast", "convolution", "relu", "mm"}
    assert explanation.formats("mm") == explanation.formats("convolution") == {"fp8 emulated": 1}
    assert explanation.formats("relu") == {"bf16": 1}


def test_a_small_model_trains() -> None:
    losses = {}
    for text in ("fp32", FP8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
        mp = halfstep.MixedPrecision(model, torch.optim.Adam(model.parameters(), 1e-2), text)
        x = torch.randn(64, 8)
        y = x[:, :3].argmax(1)
        run = losses.setdefault(text, [])
        for _ in range(40):
            with mp.autocast():
                loss = functional.cross_entropy(model(x), y)
            mp.backward(loss)
            assert mp.step().applied
            run.append(loss.item())
        assert all(p.dtype is torch.float32 for p in model.parameters())
    assert losses[FP8][-1] < losses[FP8][0] / 2
    assert abs(losses[FP8][-1] - losses["fp32"][-1]) < 0.1 and losses[FP8] != losses["fp32"]


SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
x = torch.randn(64, 8)
y = x[:, :3].argmax(1)
for _ in range(40):
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(repr(loss.item()))
"""


def test_a_script_trains_under_it_and_afterwards_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    losses = {}
    for text in (FP8, "bf16-mixed"):
        done = run_under_policy(path, [], text)
        assert (done.outcome, done.steps, str(done.policy)) == ("finished", 40, text)
        losses[text] = [float(line) for line in capsys.readouterr().out.split()]
    assert losses[FP8][-1] < losses[FP8][0] / 2
    assert losses[FP8] != losses["bf16-mixed"]
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(x @ x, x.bfloat16() @ x.bfloat16())
