"""The loss scale: its trajectory against a slow twin, its floor and cap, its state, its diagnosis."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_problems import Twin, iterate, problem

from halfstep.scale import GradScaler, LossScaleError

settings_of_scale = st.tuples(
    st.sampled_from([1.0, 8.0, 2.0**10, 2.0**16]),
    st.sampled_from([2.0, 4.0]),
    st.sampled_from([0.5, 0.125]),
    st.integers(1, 4),
    st.sampled_from([2.0**-3, 1.0]),
    st.sampled_from([2.0**16, 2.0**18, 2.0**24]),
    st.integers(1, 4),
    st.sampled_from([True, True, False]),
)


@settings(max_examples=100, deadline=None)
@given(settings_of_scale, st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_the_scale_follows_its_rule_between_floor_and_cap_also_across_a_restart(
    values: tuple[float, float, float, int, float, float, int, bool], overflows: list[bool], restart_at: int
) -> None:
    *four, low, high, hysteresis, dynamic = values
    twin = Twin(*values)
    limits = {"min_scale": low, "max_scale": high, "hysteresis": hysteresis, "dynamic": dynamic}
    scaler = GradScaler("cpu", *four, **limits, max_skipped=0)  # type: ignore[arg-type]
    weight, optimizer = problem()
    for index, overflow in enumerate(overflows):
        if index == restart_at:
            state, scaler = scaler.state_dict(), GradScaler("cpu", max_skipped=3)
            scaler.load_state_dict(state)
            assert scaler.state_dict() == state
        before = weight.detach().clone()
        iterate(scaler, weight, optimizer, overflow)
        twin.step(overflow)
        assert scaler.get_scale() == twin.scale
        assert low <= scaler.get_scale() <= high
        assert scaler._get_growth_tracker() == twin.good
        assert scaler.skipped_steps == twin.skipped
        assert scaler.step_was_applied == scaler.was_applied(optimizer) == (not overflow)
        assert torch.equal(weight, before if overflow else before - 0.125)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=30))
def test_without_floor_and_cap_in_reach_it_is_pytorchs_scaler(overflows: list[bool]) -> None:
    ours = GradScaler("cpu", 2.0**10, 2.0, 0.5, 2, min_scale=1e-30, max_scale=1e30, max_skipped=0)
    theirs = torch.amp.GradScaler("cpu", 2.0**10, 2.0, 0.5, 2)
    for overflow in overflows:
        for scaler in (ours, theirs):
            iterate(scaler, *problem(), overflow)
        assert ours.get_scale() == theirs.get_scale()
        assert theirs.state_dict().items() <= ours.state_dict().items()


class MegatronScale:
    """Megatron-LM's `DynamicGradScaler`, in plain numbers."""

    def __init__(self, scale: float, low: float, interval: int, hysteresis: int) -> None:
        self.scale, self.low, self.interval = scale, low, interval
        self.hysteresis = self.left = hysteresis
        self.good = 0

    def step(self, overflow: bool) -> None:
        if overflow:
            self.good = 0
            self.left -= 1
            if self.left <= 0:
                self.scale = max(self.scale * 0.5, self.low)
        else:
            self.good += 1
            if self.good == self.interval:
                self.good, self.left = 0, self.hysteresis
                self.scale *= 2.0


class DeepSpeedScale:
    """DeepSpeed's `DynamicLossScaler`, in plain numbers; it grows so many steps after the last overflow."""

    def __init__(self, scale: float, low: float, window: int, hysteresis: int, consecutive: bool) -> None:
        self.scale, self.low, self.window, self.consecutive = scale, low, window, consecutive
        self.hysteresis = self.left = hysteresis
        self.now, self.last = 0, -1

    def step(self, overflow: bool) -> None:
        if overflow:
            if self.hysteresis == 1 or self.left == 1:
                self.scale = max(self.scale / 2.0, self.low)
            else:
                self.left -= 1
            self.last = self.now
        else:
            if self.consecutive:
                self.left = self.hysteresis
            if (self.now - self.last) % self.window == 0:
                self.left = self.hysteresis
                self.scale *= 2.0
        self.now += 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.booleans())
def test_hysteresis_is_megatrons_and_deepspeeds_by_choice(
    overflows: list[bool], interval: int, hysteresis: int, restart_at: int, consecutive: bool
) -> None:
    twins: list[MegatronScale | DeepSpeedScale] = [DeepSpeedScale(2.0**10, 1.0, interval, hysteresis, consecutive)]
    if not consecutive:
        twins.append(MegatronScale(2.0**10, 1.0, interval, hysteresis))
    options: dict[str, Any] = {"hysteresis": hysteresis, "consecutive_hysteresis": consecutive, "max_scale": 2.0**100}
    scaler = GradScaler("cpu", 2.0**10, growth_interval=interval, max_skipped=0, **options)
    for index, overflow in enumerate(overflows):
        if index == restart_at:
            state, scaler = scaler.state_dict(), GradScaler("cpu")
            scaler.load_state_dict(state)
        iterate(scaler, *problem(), overflow)
        for twin in twins:
            twin.step(overflow)
            assert scaler.get_scale() == twin.scale


def test_a_state_from_before_the_choice_keeps_consecutive_hysteresis() -> None:
    state = GradScaler("cpu", hysteresis=2).state_dict()
    del state["consecutive_hysteresis"]
    scaler = GradScaler("cpu")
    scaler.load_state_dict(state)
    assert scaler.state_dict()["consecutive_hysteresis"] is True


def test_pytorchs_scaler_collapses_to_zero_and_then_writes_nan_and_ours_does_not() -> None:
    theirs, ours = torch.amp.GradScaler("cpu"), GradScaler("cpu", max_skipped=0)
    results = []
    for scaler in (theirs, ours):
        weight, optimizer = problem()
        for _ in range(166):
            iterate(scaler, weight, optimizer, overflow=True)
        collapsed = scaler.get_scale()
        iterate(scaler, weight, optimizer, overflow=False)
        results.append((collapsed, weight.detach()))
    assert results[0][0] == 0.0 and results[0][1].isnan().all()
    assert results[1][0] == 1.0 and torch.equal(results[1][1], torch.full((3,), 0.875))


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_16_bit_loss_of_any_shape_is_scaled_where_it_fits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    loss = torch.full(shape, 2.0, dtype=dtype)
    scaled = GradScaler("cpu").scale(loss)
    assert scaled.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert scaled.shape == shape and (scaled == 2.0 * 65536).all()


def test_pytorchs_scaler_overflows_a_16_bit_loss_of_one_element() -> None:
    assert torch.amp.GradScaler("cpu").scale(torch.full((1,), 2.0, dtype=torch.float16)).isinf().all()


def test_several_losses_keep_their_container() -> None:
    scaler, one = GradScaler("cpu", 4.0), torch.ones(())
    assert scaler.scale([one, (one, one)]) == [4.0, (4.0, 4.0)]
    assert list(scaler.scale(one * k for k in range(3))) == [0.0, 4.0, 8.0]
    with pytest.raises(ValueError, match="takes a tensor or several, not int"):
        scaler.scale([1])


@pytest.mark.parametrize("new", [8, 8.0, torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8)])
def test_update_takes_any_number(new: Any) -> None:
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.update(new)
    assert scaler.get_scale() == 8.0 and scaler._scale is not None and scaler._scale.shape == ()
    scaler.update(0)
    assert scaler.get_scale() == 1.0  # the floor
    scaler.update(2.0**30)
    assert scaler.get_scale() == 2.0**24  # the cap
    with pytest.raises(AssertionError, match="1-element"):
        scaler.update(torch.ones(2))


@pytest.mark.parametrize("values", [(0.0, 1.0, 2.0), (2.0, 1.0, 4.0), (1.0, 8.0, 4.0), (-1.0, 1.0, 2.0)])
def test_bounds_are_checked(values: tuple[float, float, float]) -> None:
    low, init, high = values
    with pytest.raises(ValueError, match="min_scale <= init_scale <= max_scale, not"):
        GradScaler("cpu", init, min_scale=low, max_scale=high)


@pytest.mark.parametrize("init", [2.0**-4, 2.0**40])
def test_any_scale_that_pytorch_takes_to_start_with_is_taken(init: float) -> None:
    scaler = GradScaler("cpu", init)
    weight, optimizer = problem()
    iterate(scaler, weight, optimizer, overflow=False)
    assert scaler.get_scale() == init


def test_the_state_of_pytorchs_scaler_is_loaded_and_its_collapse_repaired() -> None:
    theirs = torch.amp.GradScaler("cpu", 512.0, 4.0, 0.25, 7)
    for overflow in (False, True, False, False):
        iterate(theirs, *problem(), overflow)
    ours = GradScaler("cpu", min_scale=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert theirs.state_dict().items() <= ours.state_dict().items()
    assert ours.state_dict()["min_scale"] == 0.5
    theirs.load_state_dict(ours.state_dict())  # and back: PyTorch ignores what it does not know
    ours.load_state_dict({**theirs.state_dict(), "scale": 0.0})
    assert ours.get_scale() == 0.5
    with pytest.raises(RuntimeError, match="empty"):
        ours.load_state_dict({})


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_copies_go_on_as_the_original_would(copied: Any, used: bool) -> None:
    scaler = GradScaler("cpu", 2.0**12, growth_interval=3, min_scale=2.0, max_scale=2.0**14, max_skipped=9)
    if used:
        for overflow in (True, False, False):
            iterate(scaler, *problem(), overflow)
    twin = copied(scaler)
    assert type(twin) is GradScaler and twin.state_dict() == scaler.state_dict()
    for overflow in (False, True, True, False):
        for each in (scaler, twin):
            iterate(each, *problem(), overflow)
        assert twin.state_dict() == scaler.state_dict()


def test_a_disabled_scaler_does_nothing() -> None:
    scaler = GradScaler("cpu", enabled=False)
    weight, optimizer = problem()
    loss = weight.sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.check_unscaled(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, torch.full((3,), 0.875))
    assert scaler.step_was_applied and scaler.get_scale() == 1.0 and scaler.skipped_steps == 0
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})


@pytest.mark.parametrize("bad_loss", [None, 0, 1])
def test_skipping_for_ever_ends_with_the_right_diagnosis(bad_loss: int | None) -> None:
    scaler = GradScaler("cpu", max_skipped=5)
    weight, optimizer = problem()
    for attempt in range(1, 6):
        optimizer.zero_grad()
        for microbatch in range(2):
            factor = math.inf if microbatch == bad_loss else 1.0
            scaler.scale(weight.sum() * factor).backward()
        assert weight.grad is not None
        weight.grad[0] = math.inf
        scaler.step(optimizer)
        if attempt < 5:
            scaler.update()
    with pytest.raises(LossScaleError) as error:
        scaler.update()
    said = str(error.value)
    assert said.startswith("5 steps in a row were skipped; the loss scale is 2048. ")
    assert ("The loss itself is not finite" in said) == (bad_loss is not None)
    assert ("The loss is finite, its gradients are not" in said) == (bad_loss is None)
    assert torch.equal(weight, torch.ones(3))
    iterate(scaler, weight, optimizer, overflow=False)  # the scaler is still good
    assert scaler.step_was_applied and scaler.skipped_steps == 5


def test_a_loss_that_was_not_finite_before_the_last_update_is_not_blamed() -> None:
    scaler = GradScaler("cpu", max_skipped=2)
    weight, optimizer = problem()
    scaler.scale(weight.sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(LossScaleError, match="The loss is finite, its gradients are not"):
        iterate(scaler, weight, optimizer, overflow=True)


def test_skips_that_are_not_in_a_row_are_no_error() -> None:
    scaler = GradScaler("cpu", max_skipped=2)
    weight, optimizer = problem()
    for overflow in (True, False) * 5:
        iterate(scaler, weight, optimizer, overflow)
    assert scaler.skipped_steps == 5


@pytest.mark.parametrize("name", ["sgd", "fused", "foreach"])
def test_the_skip_flag_is_right_for_optimizers_that_skip_inside_themselves(name: str) -> None:
    scaler = GradScaler("cpu")
    weight, optimizer = problem(name)
    for overflow in (False, True, False):
        before = weight.detach().clone()
        iterate(scaler, weight, optimizer, overflow)
        assert scaler.step_was_applied == (not overflow) == (not torch.equal(weight, before))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_gradients_that_arrived_unscaled_are_checked_and_not_divided_again(fused: bool, overflow: bool) -> None:
    weight, optimizer = problem("fused" if fused else "sgd")
    plain, plain_optimizer = problem("fused" if fused else "sgd")
    scaler = GradScaler("cpu")
    scaler.scale(weight.sum())
    weight.grad, plain.grad = torch.full((3,), 0.5), torch.full((3,), 0.5)
    if overflow:
        weight.grad[2] = math.nan
    else:
        plain_optimizer.step()
    scaler.check_unscaled(optimizer)
    scaler.step(optimizer)
    assert scaler.step_was_applied == (not overflow)
    assert torch.equal(weight, plain)
    scaler.update()
    assert scaler.get_scale() == (2.0**15 if overflow else 2.0**16)
