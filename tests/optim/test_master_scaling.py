"""Loss scaling with master weights: PyTorch's scaler and ours, against the loop one would write by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep import GradScaler
from halfstep.optim import MasterWeights

SCALERS: dict[str, Callable[..., Any]] = {"torch": torch.amp.GradScaler, "halfstep": GradScaler}
INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
STEPS, BAD = 8, (0, 3)  # the first step as well: a fused SGD has no momentum then


class Net(nn.Module):
    """16-bit layers around an FP32 one; a factor makes single steps overflow."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5).to(dtype)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 2).to(dtype)

    def forward(self, inputs: Tensor, factor: float) -> Tensor:
        hidden = self.first(inputs.to(self.first.weight.dtype))
        return (self.last(self.norm(hidden.float()).to(hidden.dtype)).float().square().mean()) * factor


def batches() -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator), math.inf if i in BAD else 1.0) for i in range(STEPS)]


def by_hand(dtype: torch.dtype, name: str, max_norm: float | None) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """FP32 masters kept in a list, unscaled, checked, clipped and cast back in the open."""
    net = Net(dtype)
    parameters = list(net.parameters())
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = INNER[name](masters)
    scale, good, scales = 2.0**10, 0, []
    for inputs, factor in batches():
        net.zero_grad()
        (net(inputs, factor) * scale).backward()
        for master, parameter in zip(masters, parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float() / scale
        if all(bool(m.grad.isfinite().all()) for m in masters if m.grad is not None):
            if max_norm is not None:
                nn.utils.clip_grad_norm_(masters, max_norm)
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, parameters, strict=True):
                    parameter.copy_(master)
            good += 1
        else:
            scale, good = scale / 2, 0
        if good == 3:
            scale, good = scale * 2, 0
        scales.append(scale)
    return masters, parameters, scales


def assert_by_hand(
    net: Net, optimizer: MasterWeights, scales: list[float], dtype: torch.dtype, name: str, max_norm: float | None
) -> None:
    masters, parameters, expected = by_hand(dtype, name, max_norm)
    assert scales == expected and len(set(scales)) > 1
    # Scales are powers of 2 and lose nothing; the norm of the clipping is summed in another order.
    exact = {"rtol": 0.0, "atol": 0.0} if max_norm is None else {"rtol": 1e-6, "atol": 1e-7}
    for parameter, master, low in zip(net.parameters(), masters, parameters, strict=True):
        assert torch.allclose(optimizer.of(parameter), master, **exact)
        assert torch.equal(parameter, optimizer.of(parameter).to(parameter.dtype)) and parameter.dtype is low.dtype


@pytest.mark.parametrize("clip", [None, "unscaling-in-the-step", "unscaled-masters"])
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaler_name", SCALERS)
def test_scalers_drive_masters_as_the_loop_by_hand(
    scaler_name: str, dtype: torch.dtype, name: str, clip: str | None
) -> None:
    net = Net(dtype)
    within = INNER[name](net.parameters())
    optimizer = MasterWeights(within)
    scaler = SCALERS[scaler_name]("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for inputs, factor in batches():
        optimizer.zero_grad()
        scaler.scale(net(inputs, factor)).backward()
        if clip == "unscaled-masters":
            with optimizer.exchanged():
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(0.5)
                scaler.step(optimizer)
        else:
            if clip is not None and dtype is torch.float16:
                optimizer.clip_grad_norm_(0.5, loss_scale=scaler.get_scale())
            elif clip is not None:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(0.5)
            scaler.step(optimizer)
        scaler.update()
        assert not hasattr(within, "grad_scale") and not hasattr(within, "found_inf")
        scales.append(scaler.get_scale())
    assert_by_hand(net, optimizer, scales, dtype, name, None if clip is None else 0.5)


@pytest.mark.parametrize("scaler_name", SCALERS)
def test_a_skipped_step_leaves_masters_moments_and_parameters_as_they_were(scaler_name: str) -> None:
    net = Net(torch.float16)
    optimizer = MasterWeights(INNER["adamw"](net.parameters()))
    scaler = SCALERS[scaler_name]("cpu", init_scale=2.0**10)
    ticks: list[int] = []
    optimizer.optimizer.register_step_pre_hook(lambda *_: ticks.append(1))
    for factor in (1.0, math.inf, math.nan):
        before = [t.clone() for s in optimizer.state.values() for t in s.values()]
        weights = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 6), factor)).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            assert not before and any(not torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
        else:
            after = [t for s in optimizer.state.values() for t in s.values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and len(before) > 6
            assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert ticks == [1] and scaler.get_scale() == 2.0**8


def test_what_fp16_would_lose_in_unscaling_reaches_the_master() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale((weight.float() * torch.tensor([2.0**-10, 2.0**-30])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.of(weight).tolist() == [-(2.0**-10), -(2.0**-30)]
    assert (torch.tensor(2.0**-30).half() == 0).all()


def test_a_scale_that_is_no_power_of_two_is_divided_by_once_and_in_fp32() -> None:
    for fused in (False, True):
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
        scaler.scale(torch.ones(()))
        weight.grad = torch.tensor([3.0, 1.0, 300.0]).half()
        scaler.step(optimizer)
        assert torch.allclose(optimizer.of(weight), -torch.tensor([1.0, 1 / 3, 100.0]), rtol=2e-7, atol=0)


def test_only_fp16_gradients_are_left_to_the_optimizer_to_unscale() -> None:
    """Elsewhere scalers unscale and hold `step` back, and whoever watches for the call sees the skip."""
    half, brain = (nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float16, torch.bfloat16))
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False)
    optimizer = MasterWeights(torch.optim.AdamW([half, brain, frozen], fused=True))
    assert optimizer.optimizer._step_supports_amp_scaling and not optimizer._step_supports_amp_scaling
    brain.grad = torch.ones_like(brain)
    assert not optimizer._step_supports_amp_scaling
    half.grad = torch.ones_like(half)
    assert optimizer._step_supports_amp_scaling
    with optimizer.exchanged():
        assert not optimizer._step_supports_amp_scaling
    with pytest.raises(ValueError, match="FP16"):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
