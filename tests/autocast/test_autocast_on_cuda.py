"""Autocast on the device itself: the casts of a policy beside PyTorch's own, and CUDA's rules beside CUDA."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.autocast import autocast
from halfstep.autocast.rules import unlisted

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

LOW = torch.bfloat16
Enter = Callable[[], AbstractContextManager[Any]]


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """One call for each way that autocast treats an op; products on FP32 inputs, the rest on 16-bit ones."""
    generator = torch.Generator().manual_seed(0)

    def wide(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.1).to(device)

    def low(*shape: int) -> Tensor:
        return wide(*shape).to(LOW)

    m, v, b, signal, image = wide(8, 8), wide(8), wide(2, 8, 8), wide(2, 4, 8), wide(2, 4, 8, 8)
    q, kernel1, kernel2, kernel3 = wide(1, 2, 8, 16), wide(4, 4, 3), wide(4, 4, 3, 3), wide(3, 8, 8)
    lm, lv, limage = low(8, 8), low(8), low(2, 4, 8, 8)
    index, grid = torch.tensor([1, 2, 0, 3, 1, 0, 2, 5], device=device), torch.zeros(2, 3, 3, 2, device=device)
    f = functional
    products = {
        "mm": lambda: m @ m,
        "bmm": lambda: torch.bmm(b, b),
        "mv": lambda: m.mv(v),
        "addmm": lambda: torch.addmm(m, m, m),
        "baddbmm": lambda: torch.baddbmm(b, b, b),
        "linear": lambda: f.linear(m, m, v),
        "einsum": lambda: torch.einsum("ij,jk->ik", m, m),
        "conv1d": lambda: f.conv1d(signal, kernel1),
        "conv2d": lambda: f.conv2d(image, kernel2),
        "conv_transpose2d": lambda: f.conv_transpose2d(image, kernel2),
        "attention": lambda: f.scaled_dot_product_attention(q, q, q),
        "prelu": lambda: f.prelu(m, v),
    }
    names = "exp log rsqrt reciprocal expm1 log1p tan sinh cosh acos sum prod"
    pointwise = {name: functools.partial(getattr(torch, name), lm) for name in names.split()}
    in_fp32 = {
        "pow": lambda: lm.pow(2),
        "softmax": lambda: lm.softmax(-1),
        "log_softmax": lambda: lm.log_softmax(-1),
        "cumsum": lambda: lm.cumsum(0),
        "norm": lambda: lm.norm(),
        "vector_norm": lambda: torch.linalg.vector_norm(lm),
        "logsumexp": lambda: lm.logsumexp(0),
        "layer_norm": lambda: f.layer_norm(lm, (8,)),
        "rms_norm": lambda: f.rms_norm(lm, (8,)),
        "group_norm": lambda: f.group_norm(limage, 2),
        "cross_entropy": lambda: f.cross_entropy(lm, index),
        "nll_loss": lambda: f.nll_loss(lm, index),
        "mse_loss": lambda: f.mse_loss(lm, lm),
        "l1_loss": lambda: f.l1_loss(lm, lm),
        "smooth_l1_loss": lambda: f.smooth_l1_loss(lm, lm),
        "kl_div": lambda: f.kl_div(lm, lm, reduction="sum"),
        "bce_with_logits": lambda: f.binary_cross_entropy_with_logits(lm, lm),
        "cosine_similarity": lambda: f.cosine_similarity(lm, lm),
        "softplus": lambda: f.softplus(lm),
        "cdist": lambda: torch.cdist(m, m),
        "interpolate": lambda: f.interpolate(limage, scale_factor=2.0),
        "interpolate bilinear": lambda: f.interpolate(limage, scale_factor=2.0, mode="bilinear"),
    }
    as_they_come = {
        "batch_norm": lambda: f.batch_norm(limage, None, None, training=True),
        "gelu": lambda: f.gelu(lm),
        "silu": lambda: f.silu(lm),
        "relu": lambda: f.relu(lm),
        "avg_pool2d": lambda: f.avg_pool2d(limage, 2),
        "max_pool2d": lambda: f.max_pool2d(limage, 2),
        "times a number": lambda: lm * 2.0,
    }
    promoted = {
        "add": lambda: lm + m,
        "cat": lambda: torch.cat([lm, m]),
        "stack": lambda: torch.stack([lm, m]),
        "dot": lambda: torch.dot(lv, v),
        "addcmul": lambda: torch.addcmul(lm, m, lm),
        "addcdiv": lambda: torch.addcdiv(lm, m, lm),
        "atan2": lambda: torch.atan2(lm, m),
        "bilinear": lambda: f.bilinear(lm, m, kernel3),
        "index_put": lambda: lm.index_put((index,), m),
        "scatter_add": lambda: torch.scatter_add(lv, 0, index, v),
        "grid_sample": lambda: f.grid_sample(limage, grid, align_corners=False),
    }
    return {**products, **pointwise, **in_fp32, **as_they_come, **promoted}


def formats(device: str, enter: Enter) -> dict[str, str]:
    """The format of each call's result, or that it is refused."""
    found = {}
    for name, call in calls(device).items():
        with enter(), torch.no_grad():
            try:
                found[name] = str(call().dtype)
            except RuntimeError:
                found[name] = "refused"
    return found


@on_devices
def test_a_policy_casts_as_pytorchs_autocast_of_the_device(device: str) -> None:
    ours = formats(device, lambda: autocast("bf16-mixed", device))
    assert ours == formats(device, lambda: torch.autocast(device, LOW))
    assert ours["mm"] == str(LOW) and len(ours) > 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cudas_rules_on_the_cpu_are_those_of_cuda() -> None:
    own = formats("cuda", lambda: torch.autocast("cuda", LOW))
    imitated = formats("cpu", lambda: autocast("bf16-mixed:rules=cuda", "cpu"))
    assert {name: (own[name], imitated[name]) for name in own if own[name] != imitated[name]} == {}
    assert unlisted() == set()


@on_devices
def test_lists_of_ops_hold_and_end_with_their_region(device: str) -> None:
    m = torch.rand(8, 8, device=device, requires_grad=True)
    with autocast("bf16-mixed:fp32_ops=mm+matmul:low_ops=softmax.int", device):
        product, probabilities = m @ m, m.softmax(-1)
    with torch.autocast(device, LOW):
        after = m @ m
    assert (product.dtype, probabilities.dtype, after.dtype) == (torch.float32, LOW, LOW)
    (product.sum() + probabilities.float().sum()).backward()
    assert m.grad is not None and bool(m.grad.isfinite().all())


@on_devices
def test_regions_nest_and_those_of_two_threads_do_not_meet(device: str) -> None:
    x = torch.rand(8, 8, device=device)
    found: list[torch.dtype] = []
    problems: list[BaseException] = []

    def other() -> None:
        try:
            with autocast("bf16-mixed:low_ops=softmax.int", device):
                found.append(x.softmax(-1).dtype)
        except BaseException as error:
            problems.append(error)

    with autocast("bf16-mixed:fp32_ops=softmax.int", device):
        other()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found.append(x.to(LOW).softmax(-1).dtype)
    assert problems == [] and found == [LOW, LOW, torch.float32]


@on_devices
def test_an_emulated_product_is_the_exact_one_rounded(device: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 256, device=device), torch.randn(256, 256, device=device)
    exact = x.to(LOW).double() @ w.to(LOW).double()
    with autocast("bf16-mixed:emulate", device):
        product = x @ w
    assert product.dtype is LOW
    assert ((product.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()
    with autocast("fp16-mixed:emulate", device):
        beyond = (x * 300) @ (w * 300)
    assert beyond.dtype is torch.float16 and bool(beyond.isinf().any())
    with autocast("fp8-mixed:emulate", device):
        coarse = x @ w
    assert coarse.dtype is LOW and (coarse.double() - exact).norm() < 0.1 * exact.norm()


@on_devices
def test_checkpointing_recomputes_under_the_policys_rules(device: str) -> None:
    """The recomputation runs in autograd's thread, which on a GPU is another one than the forward pass had."""

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 32), nn.Softmax(-1), nn.Linear(32, 32)).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        mp = halfstep.MixedPrecision(net, optimizer, "bf16-mixed:low_ops=softmax.int:fp32_ops=linear")
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        with mp.autocast():
            out = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
            loss = out.float().square().mean()
        mp.backward(loss)
        return [p.grad for p in net.parameters() if p.grad is not None]

    plain, recomputed = gradients(checkpointed=False), gradients(checkpointed=True)
    assert len(plain) == 4 and all(map(torch.equal, plain, recomputed))


@on_devices
def test_explain_names_the_devices_formats(device: str) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).to(device)
    mp = halfstep.MixedPrecision(net, torch.optim.SGD(net.parameters(), lr=0.1), "bf16-mixed")
    text = str(mp.explain(torch.randn(4, 16, device=device)))
    assert "bf16" in text and "addmm" in text
