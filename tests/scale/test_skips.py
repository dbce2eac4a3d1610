"""Skips: counted without waiting for the device, told of, and kept from schedulers."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_problems import iterate, problem
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.optim import MasterWeights
from halfstep.scale import Cause, GradScaler, LossScaleError, Skip

READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.cpu,
    Tensor.numpy,
    torch.equal,
    torch.is_nonzero,
}


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for the device, called from Python."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts the op in which every read of one number ends, from C++ too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(scaler: Any, optimizer_name: str, overflows: list[bool]) -> list[int]:
    """Reads in ``step`` and ``update`` of each iteration."""
    weight, optimizer = problem(optimizer_name)
    counts = []
    for overflow in overflows:
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if overflow:
            assert weight.grad is not None
            weight.grad[1] = math.inf
        with Reads() as calls, Scalars() as scalars:
            scaler.step(optimizer)
            scaler.update()
        counts.append(max(calls.count, scalars.count))
    return counts


def test_the_host_never_waits_with_a_fused_optimizer_until_the_limit_could_have_been_reached() -> None:
    for scaler in (torch.amp.GradScaler("cpu"), GradScaler("cpu", max_skipped=0), GradScaler("cpu", hysteresis=3)):
        assert reads_of(scaler, "fused", [False, True, False] * 16) == [0] * 48
    # After 5 updates 5 skips are possible: one look. It finds the last 2, so 3 updates on the limit is possible again.
    counts = reads_of(GradScaler("cpu", max_skipped=5), "fused", [False, False, False, True, True, False, False, True])
    assert counts == [0, 0, 0, 0, 1, 0, 0, 1]


def test_a_scheduler_on_the_optimizer_makes_nobody_wait() -> None:
    """Schedulers replace ``step`` too, but only to know the order of calls."""
    weight, optimizer = problem("fused")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with Reads() as calls, Scalars() as scalars:
        scaler.step(optimizer)
        scaler.update()
    assert (calls.count, scalars.count) == (0, 0)


@pytest.mark.parametrize("name", ["sgd", "fused"])
def test_gradients_that_were_unscaled_but_not_stepped_on_count_too(name: str) -> None:
    weight, optimizer = problem(name)
    scaler = GradScaler("cpu", 16.0)
    iterate(scaler, weight, optimizer, overflow=False)
    scaler.scale(weight.sum() * math.inf).backward()
    scaler.unscale_(optimizer)
    scaler.update()  # the script found the inf itself, and left the step out
    assert scaler.get_scale() == 8.0 and scaler.skipped_steps == 1


def test_an_optimizer_that_is_not_fused_costs_the_one_read_that_it_costs_pytorch() -> None:
    for scaler in (torch.amp.GradScaler("cpu"), GradScaler("cpu"), GradScaler("cpu", max_skipped=1, hysteresis=2)):
        assert reads_of(scaler, "sgd", [False] * 4) == [1] * 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40),
    st.integers(0, 4),
    st.sampled_from(["sgd", "fused"]),
)
def test_the_count_is_right_whenever_it_is_asked_for_and_the_error_comes_at_the_exact_update(
    updates: list[tuple[bool, bool]], limit: int, optimizer_name: str
) -> None:
    scaler = GradScaler("cpu", max_skipped=limit)
    weight, optimizer = problem(optimizer_name)
    in_all = in_a_row = 0
    for overflow, ask in updates:
        in_all += overflow
        in_a_row = in_a_row + 1 if overflow else 0
        if limit and in_a_row >= limit:
            with pytest.raises(LossScaleError, match=f"^{in_a_row} steps in a row"):
                iterate(scaler, weight, optimizer, overflow)
        else:
            iterate(scaler, weight, optimizer, overflow)
        if ask:
            assert scaler.skipped_steps == in_all
            assert scaler.state_dict()["_skipped_in_a_row"] == in_a_row
            assert pickle.loads(pickle.dumps(scaler)).skipped_steps == in_all
    assert scaler.skipped_steps == in_all


def test_a_thousand_unread_answers_are_read() -> None:
    scaler = GradScaler("cpu", max_skipped=0)
    weight, optimizer = problem("fused")
    for index in range(1001):
        iterate(scaler, weight, optimizer, overflow=index < 7)
    assert len(scaler._skips._unread) == 1 and scaler.skipped_steps == 7


@pytest.mark.parametrize("name", ["sgd", "fused"])
def test_the_callback_is_told_of_each_skip(name: str) -> None:
    told: list[Skip] = []
    scaler = GradScaler("cpu", 16.0, hysteresis=2, on_skip=told.append)
    weight, optimizer = problem(name)
    for overflow in (False, True, False, True, True):
        iterate(scaler, weight, optimizer, overflow)
    assert told == [
        Skip(Cause.GRADIENTS, 16.0, 16.0, in_a_row=1, in_all=1),
        Skip(Cause.GRADIENTS, 16.0, 16.0, in_a_row=1, in_all=2),
        Skip(Cause.GRADIENTS, 16.0, 8.0, in_a_row=2, in_all=3),
    ]


@pytest.mark.parametrize("name", ["sgd", "fused", "foreach"])
@pytest.mark.parametrize("update_first", [False, True])
def test_a_scheduler_is_held_on_a_skip(name: str, update_first: bool) -> None:
    scaler = GradScaler("cpu")
    weight, optimizer = problem(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rates, stepped = [], []
    for overflow in (True, False, True, False):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if overflow:
            assert weight.grad is not None
            weight.grad[0] = math.nan
        scaler.step(optimizer)
        if update_first:
            scaler.update()
        stepped.append(scaler.step_scheduler(scheduler))  # no warning either: the suite turns them into errors
        if not update_first:
            scaler.update()
        rates.append(scheduler.get_last_lr()[0] / 0.125)
    assert stepped == [False, True, False, True]
    assert rates == [1.0, 1 / 2, 1 / 2, 1 / 3]


def test_pytorch_warns_of_a_scheduler_that_runs_ahead_of_a_skipped_first_step() -> None:
    weight, optimizer = problem()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    iterate(torch.amp.GradScaler("cpu"), weight, optimizer, overflow=True)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_schedulers_of_several_optimizers_are_held_apart() -> None:
    scaler = GradScaler("cpu")
    problems = [problem(), problem("fused")]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for _, optimizer in problems]
    scaler.scale(problems[0][0].sum() + problems[1][0].sum() * math.inf).backward()
    for _, optimizer in problems:
        scaler.step(optimizer)
    scaler.update()
    assert [scaler.step_scheduler(scheduler) for scheduler in schedulers] == [True, False]
    assert [scaler.was_applied(optimizer) for _, optimizer in problems] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the second never stepped
        assert [scheduler.get_last_lr()[0] for scheduler in schedulers] == [0.0625, 0.125]


def listening(optimizer: torch.optim.Optimizer, heard: list[str]) -> None:
    """Replace ``step`` by one that tells of being called: how Accelerate finds out whether a step was skipped."""
    own = optimizer.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        heard.append("step")
        return own(*args, **kwargs)

    optimizer.step = patched  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["sgd", "fused", "foreach"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_who_listens_for_the_call_of_step_hears_none_when_it_is_skipped(name: str, scheduled: bool) -> None:
    weight, optimizer = problem(name)
    plain, plain_optimizer = problem(name)
    if scheduled:  # schedulers replace ``step`` too, and do not mind being called
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    heard: list[str] = []
    listening(optimizer, heard)
    scaler = GradScaler("cpu")
    for overflow in (False, True, False):
        heard.clear()
        iterate(scaler, weight, optimizer, overflow)
        assert (heard == []) == overflow
        if not overflow:
            plain.grad = torch.ones(3)
            plain_optimizer.step()
        assert torch.equal(weight, plain)
    assert scaler.get_scale() == 2.0**15 and scaler.skipped_steps == 1


def test_pytorchs_scaler_calls_a_fused_optimizers_step_also_when_it_skips() -> None:
    weight, optimizer = problem("fused")
    heard: list[str] = []
    listening(optimizer, heard)
    iterate(torch.amp.GradScaler("cpu"), weight, optimizer, overflow=True)
    assert heard == ["step"] and torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("fused", [False, True])
def test_accelerate_holds_its_scheduler(fused: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(3))
    own = torch.optim.AdamW([weight], lr=0.125, fused=fused)
    own_scheduler = torch.optim.lr_scheduler.StepLR(own, 1, 0.5)
    optimizer, scheduler = accelerator.prepare_optimizer(own), accelerator.prepare_scheduler(own_scheduler)
    seen = []
    for factor in (1.0, math.inf, 1.0):
        accelerator.backward((weight * factor).sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()[0]))
    assert seen == [(False, 0.0625), (True, 0.0625), (False, 0.03125)]


@pytest.mark.parametrize("kind", ["masters", "fused"])
def test_accelerate_holds_its_scheduler_with_fp16_gradients(kind: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = GradScaler("cpu", init_scale=2.0**12)
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    plain = torch.nn.Parameter(torch.ones(3))
    own: Any = torch.optim.AdamW([weight], lr=0.125, fused=kind == "fused")
    own = MasterWeights(own) if kind == "masters" else own
    own_scheduler = torch.optim.lr_scheduler.StepLR(own, 1, 0.5)
    optimizer, scheduler = accelerator.prepare_optimizer(own), accelerator.prepare_scheduler(own_scheduler)
    expected = torch.optim.AdamW([plain], lr=0.125)
    seen, lr = [], 0.125
    for factor in (1.0, math.inf, 0.5):
        accelerator.backward((weight * factor).sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if factor < math.inf:
            plain.grad = torch.full((3,), factor)
            expected.param_groups[0]["lr"] = lr
            expected.step()
            lr /= 2
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()[0]))
        torch.testing.assert_close(weight.float(), plain, rtol=2e-3, atol=0)
    assert seen == [(False, 0.0625), (True, 0.0625), (False, 0.03125)]
