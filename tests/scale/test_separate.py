"""Several losses, a scale each: gradients against FP32's sum, scales against one slow twin per loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_problems import Twin
from torch import Tensor, nn

from halfstep.scale import Cause, GradScaler, HalfGradientError, LossScaleError

START, GROWTH, BACKOFF, INTERVAL, LOW, HIGH = RULE = (2.0**10, 4.0, 0.5, 2, 1.0, 2.0**14)


def scaler_of(**options: Any) -> GradScaler:
    return GradScaler("cpu", START, GROWTH, BACKOFF, INTERVAL, min_scale=LOW, max_scale=HIGH, max_skipped=0, **options)


#: An iteration: for each backward pass the loss's name (None: the common scale), its size, whether it overflows.
passes = st.lists(
    st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from([2.0**-20, 1.0, 2.0**20]), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(passes, max_size=8), st.integers(0, 8), st.sampled_from(["sgd", "fused"]), st.sampled_from([1, 2]))
def test_gradients_are_fp32s_and_each_scale_moves_by_its_own_overflows(
    iterations: list[list[tuple[str | None, float, bool]]], restart_at: int, name: str, hysteresis: int
) -> None:
    scaler = scaler_of(hysteresis=hysteresis)
    twins: dict[str | None, Twin] = {None: Twin(*RULE, hysteresis)}
    weight, expected = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=2.0**-30, fused=name == "fused")
    reference = torch.optim.SGD([expected], lr=2.0**-30)
    slope = torch.tensor([1.0, -3.0, 0.25])
    for index, iteration in enumerate(iterations):
        if index == restart_at:
            state, scaler = scaler.state_dict(), GradScaler("cpu")
            scaler.load_state_dict(state)
            assert scaler.state_dict() == state
        overflowed: dict[str | None, bool] = {}
        for loss_name, size, overflow in iteration:
            loss = (weight * slope).sum() * (math.inf if overflow else size)
            if loss_name is None:
                scaler.scale(loss).backward()
            else:
                twins.setdefault(loss_name, Twin(twins[None].scale, *RULE[1:], hysteresis))
                with scaler.scaled_loss(loss, optimizer, loss_name) as scaled:
                    assert torch.equal(scaled, loss * twins[loss_name].scale) or overflow
                    scaled.backward()
            ((expected * slope).sum() * size).backward()
            overflowed[loss_name] = overflowed.get(loss_name, False) or overflow
        skipped = any(overflowed.values())
        scaler.unscale_(optimizer)
        if not skipped:
            assert weight.grad is not None and expected.grad is not None
            assert torch.equal(weight.grad, expected.grad)
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        for each in (optimizer, reference):
            each.zero_grad()
        assert torch.equal(weight, expected)
        assert scaler.step_was_applied == (not skipped)
        # With the overflow of a loss of its own, the common scale cannot know whether its gradients were good.
        others = any(over for loss_name, over in overflowed.items() if loss_name is not None)
        for loss_name, over in overflowed.items():
            if loss_name is not None or not others:
                twins[loss_name].step(over)
        for loss_name, twin in twins.items():
            assert scaler.get_scale(loss_name) == twin.scale
            assert LOW <= twin.scale <= HIGH


class ThroughHalf(torch.autograd.Function):
    """The identity, whose gradient passes through FP16."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.half().float()


def test_two_losses_far_apart_both_fit_where_one_scale_loses_the_smaller() -> None:
    """Gradients of 2^10 and of 2^-30: 40 octaves apart, which FP16's normal range of 30 cannot hold at one scale."""
    large, small = 2.0**10, 2.0**-30

    def run(scaler: Any, separately: bool) -> Tensor:
        weight = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        for _ in range(100):
            optimizer.zero_grad()
            first, second = (ThroughHalf.apply(weight[i]) * 1.0 for i in range(2))
            for name, loss, size in (("large", first, large), ("small", second, small)):
                if separately:
                    with scaler.scaled_loss(loss * size, optimizer, name) as scaled:
                        scaled.backward()
                else:
                    scaler.scale(loss * size).backward()
            scaler.unscale_(optimizer)
            assert weight.grad is not None
            gradient = weight.grad.clone()
            scaler.step(optimizer)
            scaler.update()
        return gradient

    options = {"growth_interval": 4, "max_scale": 2.0**40, "max_skipped": 0}
    assert run(GradScaler("cpu", **options), separately=True).tolist() == [large, small]
    assert run(GradScaler("cpu", **options), separately=False).tolist() != [large, small]


def test_a_clipped_step_of_two_optimizers_equals_fp32s() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), nn.Linear(2, 1)]
    plain = copy.deepcopy(models)
    results = []
    for (body, head), scaler in ((models, scaler_of()), (plain, None)):
        optimizers = [torch.optim.AdamW(body.parameters(), fused=True), torch.optim.SGD(head.parameters(), lr=0.5)]
        for step in range(4):
            torch.manual_seed(step)
            y = body(torch.randn(6, 4))
            losses = {"fit": head(y).square().mean(), "norm": y.square().mean() * 2**-6}
            for name, loss in losses.items():
                if scaler is None:
                    loss.backward(retain_graph=True)
                else:
                    with scaler.scaled_loss(loss, optimizers, name) as scaled:
                        scaled.backward(retain_graph=True)
            for optimizer in optimizers:
                if scaler is not None:
                    scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([*body.parameters(), *head.parameters()], 0.1)
            for optimizer in optimizers:
                scaler.step(optimizer) if scaler is not None else optimizer.step()
                optimizer.zero_grad()
            if scaler is not None:
                scaler.update()
        results.append([p.detach() for model in (body, head) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sparse_gradients_are_added_too() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    scaler = scaler_of()
    for name, indices in (("a", [1, 3, 3]), ("b", [3, 4])):
        with scaler.scaled_loss(table(torch.tensor(indices)).sum(), optimizer, name) as scaled:
            scaled.backward()
    scaler.unscale_(optimizer)
    gradient = table.weight.grad
    assert gradient is not None and gradient.is_sparse
    assert gradient.to_dense()[:, 0].tolist() == [0.0, 1.0, 0.0, 3.0, 1.0]


def test_an_error_in_the_backward_pass_leaves_the_gradients_of_before() -> None:
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight, other], lr=1.0)
    scaler = scaler_of()
    scaler.scale(weight.sum()).backward()
    before = weight.grad
    assert before is not None
    kept = before.clone()
    with pytest.raises(ZeroDivisionError), scaler.scaled_loss((weight + other).sum(), optimizer, "a") as scaled:
        scaled.backward()
        raise ZeroDivisionError
    assert weight.grad is before and torch.equal(before, kept) and other.grad is None
    scaler.step(optimizer)
    scaler.update()  # the aborted pass does not count
    assert scaler.state_dict()["_losses"] == {"a": (START, 0, 0)}


def test_what_cannot_be_right_is_refused() -> None:
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler = scaler_of()
    optimizer = torch.optim.SGD([half], lr=1.0)
    with pytest.raises(HalfGradientError), scaler.scaled_loss(half.sum(), optimizer, "a") as scaled:
        scaled.backward()
    with pytest.raises(LookupError, match="no loss named 'c' was scaled; there are"):
        scaler.get_scale("c")
    weight = nn.Parameter(torch.ones(2))
    bucket = torch.ones(2)
    weight.grad = bucket
    with (
        pytest.raises(RuntimeError, match="gradient_as_bucket_view=False"),
        scaler.scaled_loss(weight.sum(), torch.optim.SGD([weight], lr=1.0), "a"),
    ):
        weight.grad = bucket.view(2)  # as DistributedDataParallel's buckets do
    assert GradScaler("cpu", enabled=False).get_scale("a") == 1.0


def test_the_error_speaks_of_the_loss_that_overflows() -> None:
    scaler = GradScaler("cpu", 4.0, max_skipped=3)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(LossScaleError, match=r"3 steps .* the loss scale is 1\. .* at its floor"):
        for _ in range(3):
            with scaler.scaled_loss(weight.sum(), optimizer, "bad") as scaled:
                scaled.backward()
                assert weight.grad is not None
                weight.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 4.0 and scaler.get_scale("bad") == 1.0
    assert Cause.GRADIENTS == "gradients"


def test_a_disabled_scaler_hands_the_loss_on() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = weight.sum()
    with GradScaler("cpu", enabled=False).scaled_loss(loss, torch.optim.SGD([weight], lr=1.0), "a") as scaled:
        assert scaled is loss
