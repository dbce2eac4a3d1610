"""A step is a transaction: interrupted anywhere, it was made or it was not, and training goes on from there."""

from __future__ import annotations

import contextlib
import copy
import functools
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interruptions import CANNOT_BE_REPEATED, InterruptAt, Interruption, Loop, interruptions, same, without_buffers
from torch import nn

import halfstep
from halfstep import optim
from halfstep.optim.backends import native
from halfstep.transaction import ATTEMPTS, to_the_end

Make = Callable[[Any], torch.optim.Optimizer]
OURS: dict[str, Make] = {
    "adamw": lambda p: optim.AdamW(p, lr=0.01, backend="eager"),
    "adamw-native": lambda p: optim.AdamW(p, lr=0.01, backend="native"),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, backend="eager"),
    "groups": lambda p: optim.Lion([{"params": [q]} for q in p], lr=0.01, backend="eager"),
}
TORCHS: dict[str, Make] = {
    "torch-adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "torch-sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "torch-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
}
POLICIES = ("fp16-mixed:emulate", "bf16-mixed", "bf16-master", "fp16-master:emulate")
AT = 2  # the step that is interrupted


def run(loop: Loop, steps: range) -> Loop:
    for step in steps:
        loop.backward(step)
        loop.step()
    return loop


@functools.cache
def twins(policy: str, name: str, limit: float | None) -> tuple[list[Any], list[Any]]:
    """States after the step at `AT` and after two more: where it was made, and where it was not."""

    def states(made: bool) -> list[Any]:
        loop = run(Loop(policy, (OURS | TORCHS)[name], limit), range(AT))
        loop.backward(AT)
        if made:
            loop.step()
        loop.optimizer.zero_grad()
        after = loop.state()
        return [after, run(loop, range(AT + 1, AT + 3)).state()]

    return states(made=True), states(made=False)


def check_interrupted(policy: str, name: str, limit: float | None, at: int) -> InterruptAt:
    """Interrupt a step at an event, and compare what is left, and what follows, with both twins."""
    made, skipped = twins(policy, name, limit)
    said = ""
    for goes_on in (True, False):  # or repeats the step
        loop = run(Loop(policy, (OURS | TORCHS)[name], limit), range(AT))
        loop.backward(AT)
        interrupted = InterruptAt(at)
        try:
            with interrupted:
                loop.step()
        except Interruption as error:
            said = " ".join(getattr(error, "__notes__", []))
        where = f"{policy}, {name}, event {at}: {interrupted.where} ({said})"
        if CANNOT_BE_REPEATED in said:  # torch's own optimizer has begun to write
            assert name in TORCHS, where
            assert loop.optimizer.state_dict() is not None and not loop.has_gradients(), where
            if goes_on:
                run(loop, range(AT + 1, AT + 3))
            continue
        if not goes_on and loop.has_gradients():
            loop.step()
            assert same(loop.state(), made[0]), f"repeated: {where}"
        loop.optimizer.zero_grad()
        now = without_buffers(loop.state())
        expected = next((twin for twin in (made, skipped) if same(now, without_buffers(twin[0]))), None)
        assert expected is not None, where
        run(loop, range(AT + 1, AT + 3))
        end = loop.state()
        assert same(without_buffers(end), without_buffers(expected[1])), f"after it: {where}"
        assert all(bool(value.isfinite().all()) for value in end["model"].values())
    return interrupted


def events(policy: str, name: str, limit: float | None) -> int:
    for _ in range(2):  # the first time more is called: what is asked once is remembered
        loop = run(Loop(policy, (OURS | TORCHS)[name], limit), range(AT))
        loop.backward(AT)
        with InterruptAt(0) as counted:
            loop.step()
    return counted.seen


CASES = [(policy, name, limit) for policy in POLICIES for name in (*OURS, *TORCHS) for limit in (None, 0.1)]


@pytest.mark.parametrize(("policy", "name", "limit"), CASES)
def test_an_interrupted_step_was_made_or_was_not(policy: str, name: str, limit: float | None) -> None:
    """Each case at some of its events, all of them together at all kinds of places."""
    if name == "adamw-native" and native.missing():
        pytest.skip(native.missing())
    last = events(policy, name, limit)
    tried = 24 if "fp16" in policy and limit is None else 8
    for at in range(1 + CASES.index((policy, name, limit)) % 7, last + 1, -(-last // tried)):
        assert check_interrupted(policy, name, limit, at).where


def interrupted_at_each(act: Callable[[Any], Any], make: Callable[[], Any], tried: int) -> Any:
    """What `make` made, after `act` on it was interrupted at one event after the other, spread over all of them."""
    with InterruptAt(0) as counted:
        act(make())
    for at in range(1, counted.seen + 1, -(-counted.seen // tried)):
        subject = make()
        interrupted = InterruptAt(at)
        with contextlib.suppress(Interruption), interrupted:
            act(subject)
        yield subject, interrupted.where


@pytest.mark.parametrize("kind", ["adamw", "sgd", "groups", "clipped", "masters-adamw"])
def test_an_optimizer_alone_steps_whole_or_not_at_all(kind: str) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).bfloat16()
        if kind == "masters-adamw":  # state and lists change places; the fused kernel is one call
            optimizer = optim.MasterWeights(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        else:
            optimizer = OURS[kind if kind in OURS else "adamw"](model.parameters())
        for step in range(2):
            torch.manual_seed(step)
            model(torch.randn(5, 4).bfloat16()).float().square().mean().backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
        return model, optimizer

    def act(made: tuple[nn.Module, Any]) -> None:
        made[1].clipped_step(0.01) if kind == "clipped" else made[1].step()

    def state(made: tuple[nn.Module, Any]) -> dict[str, Any]:
        return {"model": dict(made[0].state_dict()), "optimizer": made[1].state_dict()["state"]}

    before, after = make(), make()
    act(after)
    for interrupted, where in interrupted_at_each(act, make, 60):
        now = state(interrupted)
        was_made = same(now, state(after))
        assert was_made or same(now, state(before)), where
        parameters = list(interrupted[0].parameters())
        assert all(a is b for a, b in zip(parameters, _stepped(interrupted[1]), strict=True)), where
        if not was_made:
            act(interrupted)
            assert same(state(interrupted), state(after)), where


def _stepped(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("limit", [None, 0.01])
def test_released_gradients_step_each_parameter_whole_or_not_at_all(scaled: bool, limit: float | None) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = optim.AdamW(model.parameters(), lr=0.1, release_gradients=True, backend="eager")
        assert optimizer.release is not None
        optimizer.release.max_grad_norm = limit
        return halfstep.MixedPrecision(model, optimizer, "fp16-mixed:emulate" if scaled else "fp32")

    def backward(mp: Any, seed: int = 1) -> None:
        torch.manual_seed(seed)
        with mp.autocast():
            loss = mp.model(torch.randn(5, 4)).float().square().mean()
        mp.backward(loss)

    def both(mp: Any) -> None:
        backward(mp)
        mp.step(max_grad_norm=limit)

    def state(mp: Any) -> list[Any]:
        return [(p.detach(), dict(mp.optimizer.state.get(p, {}))) for p in mp.model.parameters()]

    def alike(one: Any, other: Any) -> bool:
        return torch.equal(one[0], other[0]) and same(_nonzero(one[1]), _nonzero(other[1]))

    before, after = state(make()), make()
    both(after)
    for mp, where in interrupted_at_each(both, make, 60):
        now = state(mp)
        assert all(alike(n, b) or alike(n, a) for n, b, a in zip(now, before, state(after), strict=True)), where
        mp.optimizer.zero_grad()
        made = [not alike(n, b) for n, b in zip(now, before, strict=True)]
        backward(mp, 2)  # it goes on, and each parameter is stepped once
        assert mp.step(max_grad_norm=limit).applied, where
        counts = [int(mp.optimizer.state[p]["step"].item()) for p in mp.model.parameters()]
        assert counts == [1 + one for one in made], where


def _nonzero(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if bool(value.any())}


def raise_once(optimizer: torch.optim.Optimizer, error: BaseException) -> None:
    def hook(*_: Any) -> None:
        handle.remove()
        raise error

    handle = optimizer.register_step_pre_hook(hook)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("name", ["sgd", "torch-sgd", "torch-fused"])
def test_a_scaler_alone_divides_once_whatever_follows(
    name: str, repeats: bool, resets: bool, set_to_none: bool
) -> None:
    """A hook that raises, out of memory; then the step again, or the loop again, on top of the gradients or not."""
    makes = {**OURS, **TORCHS, "torch-fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True)}
    weight, twin = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    optimizer, plain = makes[name]([weight]), torch.optim.SGD([twin], lr=0.1, momentum=0.9 if name == "sgd" else 0.0)
    scaler = halfstep.GradScaler("cpu", 2.0**10)
    for step in range(4):
        scaler.scale((weight * (step + 1.5)).square().sum()).backward()
        (twin * (step + 1.5)).square().sum().backward()
        if step == 1:
            raise_once(optimizer, MemoryError("once"))
            with pytest.raises(MemoryError, match="once"):
                scaler.step(optimizer)
            assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
            if repeats and name != "torch-fused":
                scaler.step(optimizer)
                scaler.update()
                plain.step()
            elif name == "torch-fused" and not resets:
                return  # its gradients may have been used: it is not said what they are worth
            if resets or (repeats and name != "torch-fused"):
                optimizer.zero_grad(set_to_none)
                plain.zero_grad()
            continue
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        assert torch.equal(weight, twin)
        assert scaler.step_was_applied
        optimizer.zero_grad(set_to_none)
        plain.zero_grad()
    assert scaler.get_scale() == 2.0**10


def test_a_loop_that_was_interrupted_while_it_clipped_goes_on() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = halfstep.GradScaler("cpu", 2.0**10)
    for step in range(3):
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
        assert weight.grad is not None and torch.equal(weight.grad, torch.ones(3))
        if step == 1:  # Ctrl-C here: nothing of the scaler hears of it
            optimizer.zero_grad()
            continue
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert torch.equal(weight.detach(), torch.ones(3) - 0.1 - 0.1)


def test_a_second_call_is_refused_with_the_way_out() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = halfstep.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called.*zero_grad\(set_to_none=True\)"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called.*call update\(\)"):
        scaler.step(optimizer)


def test_an_interrupted_update_moves_everything_or_nothing() -> None:
    for options in ({}, {"hysteresis": 2}, {"on_skip": lambda skip: None}):
        for overflow in (False, True):

            def make(options: Any = options, overflow: bool = overflow) -> Any:
                model = nn.Sequential(nn.BatchNorm1d(2))
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                scaler = halfstep.GradScaler("cpu", 2.0**10, growth_interval=1, **options)
                scaler.watch(model)
                for bad in (False, overflow):
                    if scaler.is_under_way():
                        scaler.update()
                    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]]) * (float("inf") if bad else 1.0)
                    scaler.scale(model(x).sum()).backward()
                    scaler.step(optimizer)
                    optimizer.zero_grad()
                return scaler, model

            def state(made: Any) -> Any:
                scaler, model = made
                return {"model": dict(model.state_dict()), **scaler.state_dict(), "open": scaler.is_under_way()}

            def act(made: Any) -> None:
                made[0].update()

            before, after = make(), make()
            act(after)
            expected = copy.deepcopy([state(before), state(after)])
            for made, where in interrupted_at_each(act, make, 40):
                assert any(same(_filled(state(made)), _filled(one)) for one in expected), where
                if made[0].is_under_way():
                    act(made)
                assert same(_filled(state(made)), _filled(expected[1])), where


def _filled(state: dict[str, Any]) -> dict[str, Any]:
    """NaN, which equals nothing, as a number."""
    return {**state, "model": {name: value.nan_to_num(-7.0) for name, value in state["model"].items()}}


def test_a_scaler_that_was_interrupted_at_its_first_loss_starts_at_the_next() -> None:
    def act(scaler: halfstep.GradScaler) -> None:
        scaler.scale(torch.ones((), requires_grad=True))

    for scaler, where in interrupted_at_each(act, lambda: halfstep.GradScaler("cpu", 2.0**10), 60):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight.detach(), torch.full((3,), 0.5)), where


def test_a_half_written_step_of_another_optimizer_says_so() -> None:
    class Halfway(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise MemoryError("no room")

    for policy in ("fp16-mixed:emulate", "bf16-mixed"):
        model = nn.Sequential(nn.Linear(2, 2))
        optimizer = Halfway(model.parameters(), lr=0.1)
        mp = halfstep.MixedPrecision(model, optimizer, policy)
        for _ in range(2):  # and the next step is one of its own
            with mp.autocast():
                loss = model(torch.ones(2, 2)).float().square().mean() * 1e-3
            mp.backward(loss)
            with pytest.raises(MemoryError, match="no room") as raised:
                mp.step()
            assert any(
                CANNOT_BE_REPEATED in note and "load the last checkpoint" in note for note in raised.value.__notes__
            )
            assert all(p.grad is None for p in model.parameters())


def test_signals_at_random_moments_leave_whole_steps() -> None:
    """Real ones; many of them: benchmarks/interrupts.py."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers here")
    for name in ("adamw", "sgd"):
        counts = interruptions(name, "fp16-mixed:emulate", seed=0, count=15)
        assert counts["made"] + counts["not made"] == 15


def test_what_is_written_is_written_to_its_end() -> None:
    calls: list[int] = []

    def write() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt("now")

    with pytest.raises(KeyboardInterrupt, match="now") as raised:
        to_the_end(write, "the book")
    assert len(calls) == 2 and raised.value.__notes__ == [
        "halfstep: the book was under way, and was finished before this was raised"
    ]

    def fail() -> None:
        calls.append(1)
        raise ValueError("never")

    with pytest.raises(ValueError, match="never") as failed:
        to_the_end(fail, "the book")
    assert len(calls) == 2 + ATTEMPTS
    assert "the book failed 4 times" in failed.value.__notes__[0]
