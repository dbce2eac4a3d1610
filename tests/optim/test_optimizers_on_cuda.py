"""Optimizers on the device itself: masters are FP32's, steps repeat, and the fast backend agrees with the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.optim import SGD, AdamW, Lion, MasterOptimizer

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = ((60, 257), (64,), (3, 5000), (1,))
STEPS = 8
Make = Callable[..., MasterOptimizer]
RULES: dict[str, Make] = {
    "adamw": lambda p, **how: AdamW(p, lr=1e-3, weight_decay=0.1, **how),
    "sgd": lambda p, **how: SGD(p, lr=0.05, momentum=0.9, **how),
    "lion": lambda p, **how: Lion(p, lr=1e-4, **how),
}


def parameters(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Values of bf16, in whatever format."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).mul(0.05).to(BF16) for shape in SHAPES]
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def trained(make: Make, device: str, dtype: torch.dtype, **how: Any) -> tuple[list[nn.Parameter], MasterOptimizer]:
    """Parameters after some steps on the same gradients of bf16, of very different sizes."""
    made = parameters(device, dtype)
    optimizer = make(made, **how)
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        for parameter in made:
            gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(step % 5)
            parameter.grad = gradient.to(BF16).to(device, dtype)
        optimizer.step()
    return made, optimizer


def masters(made: list[nn.Parameter], optimizer: MasterOptimizer) -> list[Tensor]:
    return [optimizer.master(parameter).detach() for parameter in made]


@on_devices
@pytest.mark.parametrize("rule", RULES)
def test_exact_masters_have_the_bits_of_fp32_parameters(rule: str, device: str) -> None:
    low = masters(*trained(RULES[rule], device, BF16, master="exact"))
    full, _ = trained(RULES[rule], device, FP32)
    assert all(map(torch.equal, low, full))


@on_devices
@pytest.mark.parametrize("storage", [("exact", "fp32"), ("24bit", "8bit"), ("none", "bf16")], ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_steps_repeat_bit_for_bit_and_agree_with_plain_torch(rule: str, storage: tuple[str, str], device: str) -> None:
    how = {"master": storage[0], "state": storage[1]}
    first, second = (masters(*trained(RULES[rule], device, BF16, **how)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    plain = masters(*trained(RULES[rule], device, BF16, **how, backend="eager"))
    # Lion's update is a sign, which flips where two rounded moments differ: by then the step is 1e-4 either way.
    tolerance = 1e-6 if storage == ("exact", "fp32") and rule != "lion" else 2e-2
    for ours, theirs in zip(first, plain, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@on_devices
def test_released_gradients_give_the_bits_of_kept_ones(device: str) -> None:
    def run(released: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 192), nn.GELU(), nn.Linear(192, 96)).to(device, BF16)
        optimizer = AdamW(model.parameters(), lr=1e-3, release_gradients=released)
        x = torch.randn(32, 96, generator=torch.Generator().manual_seed(5)).to(device, BF16)
        for _ in range(3):
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(released=True), run(released=False)))


@on_devices
def test_a_state_goes_on_with_the_same_bits(device: str) -> None:
    how = {"master": "24bit", "state": "8bit"}
    made, optimizer = trained(RULES["adamw"], device, BF16, **how)
    copies = [nn.Parameter(p.detach().clone()) for p in made]
    other = RULES["adamw"](copies, **how)
    other.load_state_dict(optimizer.state_dict())
    for p, copy in zip(made, copies, strict=True):
        p.grad, copy.grad = torch.ones_like(p), torch.ones_like(copy)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, masters(made, optimizer), masters(copies, other)))
