"""What is wrong with PyTorch's own mixed precision, and right here: each fault beside its repair.

A test of this file fails where PyTorch's class is put in for ours; it also fails when PyTorch has repaired the fault,
and can go then.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scaling_problems import iterate, problem
from torch import Tensor, nn

from halfstep import MixedPrecision, autocast
from halfstep.optim import MasterWeights
from halfstep.policy import parse
from halfstep.scale import GradScaler

BOTH = (torch.amp.GradScaler, GradScaler)


def is_ours(scaler: Any) -> bool:
    return isinstance(scaler, GradScaler)


@pytest.mark.parametrize("name", ["sgd", "fused", "foreach"])
def test_1_the_scale_collapses_to_zero_and_a_finite_loss_then_writes_nan_into_every_weight(name: str) -> None:
    for scaler in (torch.amp.GradScaler("cpu"), GradScaler("cpu", max_skipped=0)):
        weight, optimizer = problem(name)
        for _ in range(166):
            iterate(scaler, weight, optimizer, overflow=True)
        assert scaler.get_scale() == (1.0 if is_ours(scaler) else 0.0)
        iterate(scaler, weight, optimizer, overflow=False)
        assert weight.isnan().all() == (not is_ours(scaler))


@pytest.mark.parametrize("name", ["sgd", "fused", "foreach"])
@pytest.mark.parametrize("gradient", [1e10, -1e10])
def test_2_finite_before_unscaling_but_not_after(name: str, gradient: float) -> None:
    """A scaled gradient of 1e10, times 1 / scale = 5e37, is inf, and PyTorch steps on it."""
    for make in BOTH:
        scaler = make("cpu", 2e-38)
        weight, optimizer = problem(name)
        scaler.scale(torch.ones(()))
        weight.grad = torch.full((3,), gradient)
        scaler.step(optimizer)
        scaler.update()
        if is_ours(scaler):
            assert torch.equal(weight, torch.ones(3)) and not scaler.step_was_applied
        else:
            assert not weight.isfinite().any()


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 2)])
def test_3_a_16_bit_loss_that_is_not_0_dim_overflows_when_scaled(shape: tuple[int, ...]) -> None:
    for make in BOTH:
        scaled = make("cpu").scale(torch.full(shape, 2.0, dtype=torch.float16))
        assert scaled.isinf().all() == (make is not GradScaler)


@pytest.mark.parametrize("new", [2, torch.tensor([4.0]), torch.tensor([[4.0]])])
def test_4_update_takes_neither_an_int_nor_the_1_element_tensor_that_it_asks_for(new: Any) -> None:
    for make in BOTH:
        scaler = make("cpu")
        scaler.scale(torch.ones(()))
        if is_ours(scaler):
            scaler.update(new)
            assert scaler.get_scale() == float(new)
        else:
            with pytest.raises((AttributeError, RuntimeError)):
                scaler.update(new)


def test_5_a_weight_that_changes_inside_one_autocast_region_goes_unseen() -> None:
    layer, x = nn.Linear(4, 2, bias=False), torch.randn(3, 4)

    def before_and_after() -> tuple[Tensor, Tensor]:
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(0)
        return before, layer(x)

    with torch.autocast("cpu", torch.bfloat16):
        before, after = before_and_after()
    assert torch.equal(before, after) and before.any()
    nn.init.ones_(layer.weight)
    with autocast(parse("bf16-mixed:rules=cuda"), "cpu"):
        before, after = before_and_after()
    assert before.any() and not after.any()


def test_6_a_skipped_step_leaves_nan_in_running_statistics() -> None:
    for ours in (False, True):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.full((3, 4), 1e30)
        if ours:
            mp = MixedPrecision(model, optimizer, "fp16-mixed")
            with mp.autocast():
                loss = model(x).sum()
            mp.backward(loss)
            assert not mp.step().applied
        else:
            scaler = torch.amp.GradScaler("cpu")
            with torch.autocast("cpu", torch.float16):
                loss = model(x).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert model.eval()(torch.ones(3, 4)).isfinite().all() == ours


OPTIMIZERS = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.Adamax,
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("gradient", [0.0, 1e-4])
def test_7_adam_on_fp16_parameters_gives_nan_where_a_gradient_is_zero_or_small(make: Any, gradient: float) -> None:
    bare, mastered = (nn.Parameter(torch.ones(2, dtype=torch.float16)) for _ in range(2))
    options = {"eps": 1e-8} if make is not torch.optim.Adagrad else {"eps": 1e-10}
    optimizer = make([bare], lr=1e-3, foreach=False, **options)
    masters = MasterWeights(make([mastered], lr=1e-3, foreach=False, **options))
    for weight in (bare, mastered):
        weight.grad = torch.full((2,), gradient, dtype=torch.float16)
    optimizer.step()
    masters.step()
    assert not bare.isfinite().any() or make is torch.optim.Adamax
    assert mastered.isfinite().all()
    assert torch.equal(mastered, torch.ones(2).half() - (1e-3 if gradient else 0)) or make is torch.optim.RMSprop
    assert math.isfinite(masters.masters()[0].sum())
