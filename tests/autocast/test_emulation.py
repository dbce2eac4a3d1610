"""Emulated against native 16-bit kernels of the CPU, op class by op class, forward and backward.

Bounds (n products per element, sum taken in another order): two FP32 sums differ by at most ``n·2^-24·sum|a||b|`` each,
and the results by one rounding to 16 bits more where that moves them over a boundary. Never ulps of the result alone:
elements that nearly cancel may differ by many.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import halfstep
from halfstep.autocast import MissingKernelWarning, autocast, kernels
from halfstep.autocast.rules import CPU_LOWER, HEAVY, cuda_rules, plan, without_kernel
from halfstep.policy import parse

FORMATS = {"fp16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
formats = pytest.mark.parametrize("name", FORMATS)


def tensors(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def run(text: str, op: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients under a policy; the incoming gradient is fixed."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with autocast(text, "cpu"):
        out = op(*leaves)
    incoming = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return out.detach(), list(torch.autograd.grad(out, leaves, incoming))


def exactly(op: Callable[..., Tensor], inputs: list[Tensor], low: torch.dtype, absolute: bool = False) -> list[Tensor]:
    """Output and gradients in float64 on the rounded operands; or of the op on magnitudes, ``sum|a||b|``."""
    rounded = [x.to(low).double() for x in inputs]
    leaves = [(x.abs() if absolute else x).requires_grad_() for x in rounded]
    out = op(*leaves)
    incoming = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(low).double()
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming.abs() if absolute else incoming)]


OPS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "mm": (torch.mm, tensors((24, 100), (100, 30))),
    "matmul": (torch.matmul, tensors((3, 5, 64), (64, 7))),
    "bmm": (torch.bmm, tensors((3, 9, 64), (3, 64, 8))),
    "addmm": (torch.addmm, tensors((30,), (24, 100), (100, 30))),
    "addmm-scaled": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), tensors((8,), (9, 50), (50, 8))),
    "baddbmm": (torch.baddbmm, tensors((3, 9, 8), (3, 9, 64), (3, 64, 8))),
    "linear": (functional.linear, tensors((6, 4, 80), (16, 80), (16,))),
    "linear without bias": (functional.linear, tensors((6, 80), (16, 80))),
    "einsum": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), tensors((2, 2, 6, 32), (2, 2, 5, 32))),
    "conv1d": (lambda x, w, b: functional.conv1d(x, w, b, padding=1), tensors((2, 8, 16), (6, 8, 3), (6,))),
    "conv2d": (
        lambda x, w, b: functional.conv2d(x, w, b, stride=2, padding=1),
        tensors((2, 6, 9, 9), (8, 6, 3, 3), (8,)),
    ),
    "conv2d same": (lambda x, w: functional.conv2d(x, w, padding="same"), tensors((1, 4, 7, 7), (4, 4, 3, 3))),
    "conv2d grouped": (lambda x, w: functional.conv2d(x, w, groups=2), tensors((1, 4, 7, 7), (4, 2, 3, 3))),
    "conv_transpose2d": (functional.conv_transpose2d, tensors((1, 4, 5, 5), (4, 3, 3, 3))),
    "conv3d": (functional.conv3d, tensors((1, 3, 5, 5, 5), (4, 3, 3, 3, 3))),
}


def adds_up_positions_in(low: torch.dtype) -> bool:
    """Whether 1 and two halves of an eps, met at one place by a transposed convolution, stay 1."""
    eps = torch.finfo(low).eps
    x = torch.tensor([eps / 2, 1, eps / 2], dtype=low).reshape(1, 1, 1, 3)
    return functional.conv_transpose2d(x, torch.ones(1, 1, 1, 3, dtype=low))[0, 0, 0, 2].item() == 1


@formats
@pytest.mark.parametrize("case", OPS)
def test_products_are_true_to_one_rounding_and_native_within_two(name: str, case: str) -> None:
    low, (op, inputs) = FORMATS[name], OPS[case]
    out, gradients = run(f"{name}:emulate", op, inputs)
    native_out, native_gradients = run(name, op, inputs)
    assert out.dtype is low and all(g.dtype is torch.float32 for g in gradients)
    n = max(x.numel() for x in inputs)  # more terms than any of the sums has
    eps, subnormal = torch.finfo(low).eps, torch.finfo(low).smallest_normal * torch.finfo(low).eps
    # Without products of its own in a format, a CPU's convolutions add up the kernel's positions in it, for a gradient
    # or when transposed; the emulation is nearer to the truth.
    crude = case.startswith("conv") and adds_up_positions_in(low)
    quads = zip(
        [out, *gradients],
        [native_out, *native_gradients],
        exactly(op, inputs, low),
        exactly(op, inputs, low, absolute=True),
        strict=True,
    )
    for got, native, true, sums in quads:
        assert torch.equal(got, got.to(low).to(got.dtype))  # representable: a gradient was rounded on its way
        order = n * 2.0**-24 * sums  # what the order of an FP32 sum can change
        assert ((got - true).abs() <= order + eps / 2 * (true.abs() + order) + subnormal / 2).all()
        apart = 2 * order + eps * (true.abs() + order) + subnormal
        assert ((got - native).double().abs() <= apart + (eps * sums if crude else 0)).all()
        assert (got == native).double().mean() > (0.4 if crude else 0.95)


@formats
def test_a_product_is_one_rounding_of_the_fp32_result(name: str) -> None:
    low = FORMATS[name]
    bias, x, w = tensors((30,), (24, 100), (100, 30))
    with autocast(f"{name}:emulate", "cpu"):
        out = torch.addmm(bias, x, w)
    wide = [t.to(low).float() for t in (bias, x, w)]
    assert torch.equal(out, torch.addmm(*wide).to(low))  # the bias in the same rounding as the products


@formats
def test_backward_rounds_what_would_be_16_bits(name: str) -> None:
    low = FORMATS[name]
    x, w = (t.requires_grad_() for t in tensors((6, 40), (8, 40)))
    with autocast(f"{name}:emulate", "cpu"):
        out = functional.linear(x, w)
    (incoming,) = tensors((6, 8), seed=9)
    out.backward(incoming.to(low))
    g = incoming.to(low).float()
    assert x.grad is not None and w.grad is not None
    assert torch.equal(x.grad, (g @ w.detach().to(low).float()).to(low).float())
    weight_gradient = (g.t() @ x.detach().to(low).float()).to(low).float()
    assert torch.allclose(w.grad, weight_gradient, rtol=2 * torch.finfo(low).eps, atol=1e-6)
    assert torch.equal(w.grad, w.grad.to(low).float())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-32768, 32767), min_size=12, max_size=12),
    st.lists(st.integers(-32768, 32767), min_size=12, max_size=12),
    st.sampled_from(sorted(FORMATS)),
)
def test_any_codes_inf_nan_and_subnormals_included(left: list[int], right: list[int], name: str) -> None:
    """Products of two terms: exact in float64, so each result is one of at most two neighbours of the true one.

    Where a product is finite, but beyond FP32, it matters whether products are rounded before they are added:
    (-inf)(-inf) + (-3e38)(2) is inf in a fused sum and NaN in one that rounds. Libraries do either.
    """
    low = FORMATS[name]
    a, b = (torch.tensor(codes, dtype=torch.int16).view(low) for codes in (left, right))
    with autocast(f"{name}:emulate", "cpu"):
        out = torch.mm(a.reshape(6, 2), b.reshape(2, 6))
    terms = a.reshape(6, 2, 1).double() * b.reshape(1, 2, 6).double()
    exact = terms[:, 0] + terms[:, 1]
    either = (terms.float().isinf() & terms.isfinite()).any(1)
    nan = exact.isnan()
    assert torch.equal(out.isnan() | either, nan | either)
    near = (out.double() - exact).abs() <= torch.finfo(low).eps * exact.abs() + 2.0**-25
    beyond = (exact.abs() > torch.finfo(low).max) & (out.isinf() | (out.abs() == torch.finfo(low).max))
    assert (near | beyond | nan | (out == exact) | (either & ~out.isfinite())).all()


def test_overflow_becomes_inf_forward_and_backward() -> None:
    x, w = torch.full((1, 4), 200.0), torch.full((4, 1), 100.0)
    with autocast("fp16-mixed:emulate", "cpu"):
        assert torch.mm(x, w).item() == math.inf  # 80000
        assert torch.mm(x / 2, w).item() == 40000.0
        # Sums inside may exceed fp16's range, as they may in a tensor core: only the result is rounded.
        assert torch.mm(torch.full((1, 4), 200.0), torch.tensor([[200.0], [200.0], [-200.0], [-199.0]])).item() == 200.0
    w = nn.Parameter(torch.ones(4, 1))
    with autocast("fp16-mixed:emulate", "cpu"):
        out = torch.mm(torch.full((2, 4), 30000.0), w)
    out.backward(torch.full_like(out, 2.0))  # each weight: 2 * 2 * 30000
    assert w.grad is not None and w.grad.isinf().all() and w.grad.dtype is torch.float32


@pytest.mark.parametrize(("gradient", "expected"), [(2.0**-24, 2.0**-24), (2.0**-25, 0.0), (1.5 * 2.0**-25, 2.0**-24)])
def test_underflow_becomes_zero_in_backward(gradient: float, expected: float) -> None:
    """The smallest fp16 number is 2^-24; half of it ties to 0."""
    w = nn.Parameter(torch.ones(1, 1))
    with autocast("fp16-mixed:emulate", "cpu"):
        out = torch.mm(torch.tensor([[gradient * 2.0**10]]), w)
    out.backward(torch.full_like(out, 2.0**-10))
    assert w.grad is not None and w.grad.item() == expected


def test_scaling_the_loss_brings_back_what_underflowed_as_in_native_fp16() -> None:
    (x,) = tensors((16, 8), scale=1e-3)
    seen = {}
    for text in ("fp16-mixed", "fp16-mixed:emulate"):
        for scale in (1.0, 2.0**14):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
            with autocast(text, "cpu"):
                out = model(x)
            (out.float().mean() * 1e-4 * scale).backward()
            weight = model[0].weight.grad
            assert weight is not None
            seen[text, scale] = weight / scale
    for scale in (1.0, 2.0**14):
        native, emulated = seen["fp16-mixed", scale], seen["fp16-mixed:emulate", scale]
        assert ((native == 0) == (emulated == 0)).all() and torch.allclose(native, emulated, rtol=2e-3)
    assert (seen["fp16-mixed:emulate", 1.0] == 0).double().mean() > 0.9
    assert (seen["fp16-mixed:emulate", 2.0**14] == 0).double().mean() < 0.1


@formats
def test_attention_is_as_near_to_the_truth_as_the_native_kernel(name: str) -> None:
    low = FORMATS[name]
    q, k, v = tensors((2, 4, 32, 16), (2, 4, 32, 16), (2, 4, 32, 16))
    exact = functional.scaled_dot_product_attention(
        q.to(low).double(), k.to(low).double(), v.to(low).double(), is_causal=True
    )
    errors = []
    for text in (name, f"{name}:emulate"):
        with autocast(text, "cpu"):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert out.dtype is low
        errors.append((out.double() - exact).abs().max())
    assert errors[1] <= errors[0] * 1.01


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(4 * 36, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).flatten(1)
        h = self.norm(functional.gelu(self.first(h)))
        return torch.softmax(self.second(h), -1)


@pytest.mark.parametrize("rules", ["torch", "cuda"])
@formats
def test_a_model_has_the_dtypes_of_the_native_one_and_nearly_its_gradients(name: str, rules: str) -> None:
    x = tensors((6, 1, 8, 8))[0]
    seen = []
    for text in (f"{name}:rules={rules}", f"{name}:rules={rules}:emulate"):
        torch.manual_seed(0)
        model, dtypes = Small(), []
        for module in model.children():
            module.register_forward_hook(lambda _, __, out, d=dtypes: d.append(out.dtype))  # type: ignore[misc]
        with autocast(text, "cpu"):
            out = model(x)
        dtypes.append(out.dtype)
        (out.float()[:, 0].log().sum()).backward()
        seen.append((dtypes, torch.cat([p.grad.flatten() for p in model.parameters()])))  # type: ignore[union-attr]
    (native_dtypes, native), (dtypes, emulated) = seen
    assert dtypes == native_dtypes
    assert functional.cosine_similarity(native, emulated, dim=0) > 0.9999


@formats
@pytest.mark.parametrize("rules", ["torch", "cuda"])
def test_recurrent_layers_are_emulated(rules: str, name: str) -> None:
    torch.manual_seed(0)
    low = FORMATS[name]
    x, lstm = torch.randn(5, 2, 8), nn.LSTM(8, 6)
    reference = lstm(x)[0]
    with autocast(f"{name}:rules={rules}:emulate", "cpu"):
        out, _ = lstm(x)
    assert out.dtype is low and torch.allclose(out.float(), reference, atol=8 * torch.finfo(low).eps)
    out.float().sum().backward()
    for parameter in lstm.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, parameter.grad.to(low).float())


@formats
@pytest.mark.parametrize("rules", ["torch", "cuda"])
def test_recurrent_layers_without_a_kernel_on_this_cpu_stay_in_fp32_and_it_is_said(
    rules: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP16 has none to train with but on CPUs with AMX_FP16, BF16 none where there is neither AVX512_BF16 nor AMX."""
    low = FORMATS[name]
    told: list[str] = []
    monkeypatch.setattr(kernels, "listeners", [told.append])
    x, lstm = torch.randn(5, 2, 8), nn.LSTM(8, 6, num_layers=2)
    with autocast(f"{name}:rules={rules}", "cpu"):
        out, (h, c) = lstm(x)
    out.float().sum().backward()
    if without_kernel(low):
        expected, (expected_h, expected_c) = lstm(x)
        assert torch.equal(out, expected) and torch.equal(h, expected_h) and torch.equal(c, expected_c)
        assert "LSTM layers stay in FP32" in told[0] and str(low).removeprefix("torch.") in told[0]
    else:
        assert out.dtype is low and told == []


def test_asking_for_kernels_passes_by_whoever_watches_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """`halfstep run` replaces this function, and counts and records what goes through it."""
    known = [without_kernel(low) for low in FORMATS.values()]
    without_kernel.cache_clear()
    monkeypatch.setattr(torch.autograd, "backward", lambda *_, **__: pytest.fail("seen"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert [without_kernel(low) for low in FORMATS.values()] == known
    without_kernel.cache_clear()
    assert [without_kernel(low) for low in FORMATS.values()] == known


def test_a_missing_kernel_is_a_warning_once_at_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "listeners", [])
    kernels._warn_of_kept.cache_clear()
    x, lstm = torch.randn(5, 2, 8), nn.LSTM(8, 6)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in FORMATS:
            for _ in range(2):
                with autocast(name, "cpu"):
                    lstm(x)
    ours = [w for w in seen if w.category is MissingKernelWarning]
    assert len(ours) == sum(bool(without_kernel(low)) for low in FORMATS.values())
    assert all(w.filename == __file__ for w in ours)


def test_cells_round_between_their_parts_as_the_native_ones() -> None:
    torch.manual_seed(0)
    for cell in (nn.LSTMCell(8, 6), nn.GRUCell(8, 6), nn.RNNCell(8, 6)):
        x = torch.randn(4, 8)
        outs = []
        for text in ("fp16-mixed:rules=cuda", "fp16-mixed:rules=cuda:emulate"):
            with autocast(text, "cpu"):
                out: Any = cell(x)
            outs.append(out[0] if isinstance(out, tuple) else out)
        assert outs[0].dtype is outs[1].dtype is torch.float16
        assert torch.allclose(outs[0], outs[1], rtol=2e-3, atol=1e-4)


def test_second_derivatives_pass_through() -> None:
    x, w = tensors((3, 4), (2, 4))
    results = []
    for text in ("bf16-mixed", "bf16-mixed:emulate"):
        leaf = x.clone().requires_grad_()
        with autocast(text, "cpu"):
            out = functional.linear(leaf, w).float().pow(3).sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        results.append(second)
    assert torch.allclose(*results, rtol=0.05, atol=0.5)


def test_what_is_16_bit_already_is_emulated_without_a_rule_and_mixtures_are_pytorchs_business() -> None:
    a, b = (t.half() for t in tensors((8,), (8,)))
    with autocast("fp16-mixed:emulate", "cpu"):  # dot is not on the CPU's list
        assert torch.equal(torch.dot(a, b), torch.dot(a.float(), b.float()).half())
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.dot(a, b.float())
        assert torch.dot(a.double(), b.double()).dtype is torch.float64
        assert torch.mm(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)).dtype is torch.int64


def test_every_lowered_op_is_either_emulated_itself_or_made_of_such() -> None:
    """What neither list of this test explains would silently run in a native 16-bit kernel."""
    composite = {
        *("conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "conv_transpose1d"),
        *("conv_transpose2d.input", "conv_transpose3d.input", "matmul", "einsum", "linalg_vecdot", "linear"),
        *("chain_matmul", "linalg_multi_dot", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    }
    elementwise = {"prelu"}
    on_cuda = {op for op, rule in cuda_rules().items() if rule == "lower"}
    gpu = {op for op in on_cuda if op.startswith(("cudnn", "_thnn", "_scaled"))}
    lowered = on_cuda | set(CPU_LOWER)
    assert lowered - HEAVY == composite | elementwise | gpu
    for op in composite:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "CompositeImplicitAutograd"), op
    changed = plan(parse("fp16-mixed:emulate"), "cpu")
    assert changed is not None and set(changed.rules) == HEAVY | set(CPU_LOWER)


@pytest.mark.parametrize("rules", ["torch", "cuda"])
def test_training_under_loss_scaling_follows_native_fp16(rules: str) -> None:
    losses = {}
    for text in (f"fp16-mixed:rules={rules}", f"fp16-mixed:rules={rules}:emulate"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        mp = halfstep.MixedPrecision(model, torch.optim.Adam(model.parameters(), 1e-2), text)
        x, y = torch.randn(32, 8), torch.randint(0, 3, (32,))
        run = losses.setdefault(text, [])
        for _ in range(12):
            with mp.autocast():
                loss = functional.cross_entropy(model(x), y)
            mp.backward(loss)
            mp.step()
            run.append(loss.item())
    native, emulated = losses.values()
    assert native[-1] < native[0] * 0.9
    assert torch.allclose(torch.tensor(native), torch.tensor(emulated), rtol=5e-3)
