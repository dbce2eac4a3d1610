"""The scaler on the device itself: PyTorch's scales and weights, bit for bit, and no more waits for the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep import GradScaler, LossScaleError, optim

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

OVERFLOWS = (3, 4, 9)
STEPS = 14
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "halfstep-adamw": lambda p: optim.AdamW(p, lr=1e-2),
}


class Run:
    """A model that trains under a scaler, with overflows at known steps."""

    def __init__(self, scaler: Any, optimizer: str, device: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(device)
        self.x = torch.randn(8, 16).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = scaler(device, init_scale=2.0**15, growth_interval=3)
        self.scales: list[float] = []

    def step(self, overflow: bool = False) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(self.x).square().mean()).backward()
        if overflow:
            gradient = next(self.model.parameters()).grad
            assert gradient is not None
            gradient[0, 0] = math.inf
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def steps(self) -> Run:
        for index in range(STEPS):
            self.step(overflow=index in OVERFLOWS)
            self.scales.append(self.scaler.get_scale())
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]


@on_devices
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scales_and_weights_are_pytorchs(optimizer: str, device: str) -> None:
    ours, theirs = Run(GradScaler, optimizer, device).steps(), Run(torch.amp.GradScaler, optimizer, device).steps()
    assert ours.scales == theirs.scales
    assert ours.scales[2:5] == [2.0**16, 2.0**15, 2.0**14]
    assert all(map(torch.equal, ours.weights(), theirs.weights()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_waits_no_more_often_than_under_pytorchs_scaler(optimizer: str) -> None:
    def waits(scaler: Any) -> int:
        run = Run(scaler, optimizer, "cuda")
        for _ in range(3):
            run.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    assert waits(GradScaler) <= waits(torch.amp.GradScaler)


@on_devices
def test_the_scale_ends_at_its_floor(device: str) -> None:
    scaler = GradScaler(device, max_skipped=0)
    parameter = nn.Parameter(torch.ones(4, device=device))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for _ in range(30):
        parameter.grad = torch.full_like(parameter, math.inf)
        scaler.scale(torch.ones((), device=device))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0 and torch.equal(parameter, torch.ones_like(parameter))


@on_devices
@pytest.mark.parametrize("fused", [False, True])
def test_the_error_comes_at_the_step_that_was_said(fused: bool, device: str) -> None:
    scaler = GradScaler(device, max_skipped=7)
    parameter = nn.Parameter(torch.ones(4, device=device))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, fused=fused)
    taken = 0
    with pytest.raises(LossScaleError):
        for _ in range(20):
            taken += 1
            parameter.grad = torch.full_like(parameter, math.inf)
            scaler.scale(torch.ones((), device=device))
            scaler.step(optimizer)
            scaler.update()
    assert taken == 7
