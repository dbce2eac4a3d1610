"""``init_scale="auto"``: the first scale against the definition, and what measuring must not change."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_problems import iterate, problem
from torch import Tensor, nn

from halfstep.scale import GradScaler

QUARTER = 65504 / 4


def largest_power_of_two(peak: float) -> float:
    """The definition: the largest power of two with ``peak * scale`` two octaves below FP16's end."""
    scale = 2.0**-126
    while peak * scale * 2 <= QUARTER:
        scale *= 2
    return scale


class ThroughHalf(torch.autograd.Function):
    """The identity, whose gradient passes through FP16, and then is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.half()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient.half() * ctx.factor).float(), None


@settings(max_examples=150, deadline=None)
@given(st.floats(2.0**-60, 2.0**60, allow_subnormal=False))
def test_the_scale_is_the_largest_with_two_octaves_of_headroom(slope: float) -> None:
    slope = float(torch.tensor(slope))
    scaler = GradScaler("cpu", "auto", min_scale=2.0**-100, max_scale=2.0**100)
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    # All gradients are FP32: the largest of any node counts, and that of the loss itself is 1.
    scaler.scale(weight[0] * slope + weight[1] * slope / 2).backward()
    assert scaler.get_scale() == largest_power_of_two(max(1.0, slope))


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-40, 2.0**30))
def test_only_gradients_in_fp16_count_where_there_are_any(size: float) -> None:
    size = 2.0 ** math.floor(math.log2(size))
    weight = nn.Parameter(torch.tensor([1.0]))
    scaler = GradScaler("cpu", "auto", min_scale=2.0**-60, max_scale=2.0**60)
    loss = ThroughHalf.apply(weight, 1.0).float().sum() * size
    assert isinstance(scaler.scale(loss), Tensor)
    assert scaler.get_scale() == largest_power_of_two(size)


def test_gradients_inside_the_network_count_and_not_only_those_of_its_weights() -> None:
    weight = nn.Parameter(torch.ones(1))
    scaler = GradScaler("cpu", "auto")
    inner = weight * 2.0**-10  # the gradient is 2^10 here, and 1 at the weight
    scaler.scale((inner * 2.0**10).sum())
    assert scaler.get_scale() == largest_power_of_two(2.0**10)


def test_the_first_step_is_neither_skipped_nor_changed() -> None:
    """FP16 for real: gradients that overflow at 2^16, where the default begins with skips."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    x = torch.randn(4, 8)
    runs: dict[Any, list[bool]] = {}
    for start in ("auto", 2.0**16):
        twin = copy.deepcopy(model)
        scaler = GradScaler("cpu", start)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-6)
        applied = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                y = twin(x)
            loss = y.float().sum() * 100
            before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
            scaled = scaler.scale(loss)
            assert all(p.grad is None for p in twin.parameters())
            assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())
            scaled.backward()
            scaler.step(optimizer)
            applied.append(scaler.step_was_applied)
            scaler.update()
        runs[start] = applied
    assert runs["auto"] == [True] * 4
    assert runs[2.0**16][0] is False


def test_measuring_happens_once_and_is_kept() -> None:
    scaler = GradScaler("cpu", "auto")
    assert scaler.get_scale() == 2.0**16  # until the first loss
    loaded = GradScaler("cpu")
    loaded.load_state_dict(scaler.state_dict())  # before the first loss: still to be measured
    weight, optimizer = problem()
    for each in (scaler, loaded):
        each.scale(weight.sum() * math.inf)  # nothing can be measured on this one
        assert each.get_scale() == 2.0**16
        each.scale(torch.ones(2, requires_grad=True) * 1.0)  # nor on several elements
        each.scale(weight.sum() * 2.0**6)
        assert each.get_scale() == 2.0**7
        each.scale(weight.sum())
        assert each.get_scale() == 2.0**7
        other = GradScaler("cpu", "auto")
        other.load_state_dict(each.state_dict())
        iterate(other, weight, optimizer, overflow=False)
        assert other.get_scale() == 2.0**7


@pytest.mark.parametrize(
    ("size", "expected"), [(0.0, 2.0**16), (2.0**-45, 2.0**24), (2.0**-120, 2.0**16), (2.0**100, 1.0)]
)
def test_gradients_out_of_reach_end_at_the_bounds_and_without_any_it_starts_as_always(
    size: float, expected: float
) -> None:
    weight = nn.Parameter(torch.ones(1))
    scaler = GradScaler("cpu", "auto")
    scaler.scale(ThroughHalf.apply(weight, 1.0).float().sum() * size)
    assert scaler.get_scale() == expected


def test_gradients_that_overflow_at_any_scale_start_at_the_floor() -> None:
    weight = nn.Parameter(torch.ones(1))
    scaler = GradScaler("cpu", "auto")
    scaler.scale(ThroughHalf.apply(weight.half(), math.inf).float().sum())
    assert scaler.get_scale() == 1.0


def test_a_graph_that_runs_only_once_is_refused() -> None:
    weight = nn.Parameter(torch.ones(1))
    squared = weight.square()
    squared.sum().backward()
    with pytest.raises(RuntimeError, match=r"init_scale='auto' runs the first backward pass twice"):
        GradScaler("cpu", "auto").scale(squared.sum())
