"""Steps that are interrupted: a loop under a policy, the same loop uninterrupted, and what may be left between them."""

from __future__ import annotations

import copy
import inspect
import random
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfstep

SOURCES = (str(Path(halfstep.__file__).parent), str(Path(torch.optim.__file__).parent))
GENERATORS = ("parameters", "_held", "_parameters", "nodes")
CANNOT_BE_REPEATED = "the step cannot be repeated"


class Interruption(KeyboardInterrupt):
    """Raised where a Ctrl-C might come."""


class InterruptAt:
    """Raises at the n-th event in the files of halfstep and of PyTorch's optimizers, as a signal would.

    Events are calls of Python functions, calls of built-in ones (torch's operations among them), and their returns: the
    interpreter looks for signals there.

    Args:
        at: from 1 on; 0: only count.
    """

    def __init__(self, at: int) -> None:
        self.at, self.seen, self.where = at, 0, ""

    def __enter__(self) -> InterruptAt:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.setprofile(None)

    def _event(self, frame: types.FrameType, event: str, called: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCES) or event not in ("call", "c_call", "c_return"):
            return
        if code.co_flags & inspect.CO_GENERATOR and code.co_name in ("<genexpr>", *GENERATORS):
            return  # as it is collected, where nobody hears of an exception
        if getattr(called, "__name__", "") == "__exit__":
            return  # of a guard of PyTorch's: Python promises nothing for the moment before it, for any tensor subclass
        self.seen += 1
        if self.seen == self.at:
            what = getattr(called, "__name__", "") if event != "call" else ""
            self.where = f"{event} {what} in {Path(code.co_filename).name}:{frame.f_lineno} {code.co_qualname}"
            raise Interruption(self.where)


class Net(nn.Module):
    """A matrix, a vector that stays FP32 under master policies, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x)))
        return result


class Loop:
    """A model under a policy, stepped on data that depend on the step's number alone.

    Args:
        policy: its name.
        make: the optimizer, of parameters.
        limit: of the gradients' norm.
    """

    def __init__(self, policy: str, make: Callable[[Any], torch.optim.Optimizer], limit: float | None = None) -> None:
        torch.manual_seed(0)
        self.model, self.limit = Net(), limit
        self.optimizer = make(self.model.parameters())
        scaler = halfstep.GradScaler("cpu", 2.0**10, growth_interval=3) if "fp16" in policy else None
        self.mp = halfstep.MixedPrecision(self.model, self.optimizer, policy, scaler=scaler)

    def backward(self, step: int) -> None:
        torch.manual_seed(100 + step)
        with self.mp.autocast():
            loss = self.model(torch.randn(8, 4)).float().square().mean()
        self.mp.backward(loss)

    def step(self) -> halfstep.StepResult:
        return self.mp.step(max_grad_norm=self.limit)

    def has_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self.model.parameters())

    def state(self) -> dict[str, Any]:
        """Weights, buffers, optimizer and loss scale, copied."""
        optimizer = self.mp.masters or self.optimizer
        entries = {
            f"{index}.{key}": value
            for index, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if not isinstance(value, Tensor) or bool(value.any())  # made and still zero is as not made
        }
        scaler = self.mp.scaler.state_dict()
        return copy.deepcopy({"model": dict(self.model.state_dict()), "optimizer": entries, "scaler": scaler})


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def without_buffers(state: dict[str, Any]) -> dict[str, Any]:
    """A step that was not made may have left what its forward pass wrote."""
    model = {name: value for name, value in state["model"].items() if not name.startswith("norm.") or "weight" in name}
    return {**state, "model": model}


def interruptions(name: str, policy: str, *, seed: int, count: int) -> dict[str, int]:
    """Interrupt steps by real alarms at random moments, and compare what is left; raises if it is neither state.

    Args:
        name: "adamw" or "sgd", of `halfstep.optim`; in plain torch, which takes longest.
        count: of interruptions that came within a step.

    Returns:
        How many were of steps that were made, of steps that were not, and how many came too late.
    """
    makes: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adamw": lambda p: halfstep.optim.AdamW(p, lr=0.01, backend="eager"),
        "sgd": lambda p: halfstep.optim.SGD(p, lr=0.1, momentum=0.9, backend="eager"),
    }
    random_moments = random.Random(seed)
    counts = {"made": 0, "not made": 0, "too late": 0}
    inside = False

    def ring(number: int, frame: types.FrameType | None) -> None:
        if not inside or frame is None:
            return
        code = frame.f_code
        heard = code.co_filename.startswith(SOURCES) and not code.co_flags & inspect.CO_GENERATOR
        if heard:
            raise Interruption("alarm")
        signal.setitimer(signal.ITIMER_REAL, 2e-5)  # where it is lost: in a finalizer, in a generator's end

    before = signal.signal(signal.SIGALRM, ring)
    try:
        started = time.perf_counter()
        ended = Loop(policy, makes[name])
        ended.backward(0)
        started = time.perf_counter()
        ended.step()
        longest = (time.perf_counter() - started) * 1.2
        made = ended.state()
        while counts["made"] + counts["not made"] < count:
            loop = Loop(policy, makes[name])
            untouched = loop.state()
            loop.backward(0)
            try:
                inside = True
                signal.setitimer(signal.ITIMER_REAL, random_moments.uniform(1e-5, longest))
                loop.step()
                inside = False
                counts["too late"] += 1
                longest *= 0.98
                continue
            except Interruption:
                inside = False
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            now = without_buffers(loop.state())
            kind = "made" if same(now, without_buffers(made)) else "not made"
            if kind == "not made" and not same(now, without_buffers(untouched)):
                raise AssertionError(f"{name} under {policy}: an interrupted step is neither made nor not")
            if kind == "not made":
                loop.step()
                if not same(loop.state(), made):
                    raise AssertionError(f"{name} under {policy}: the step, repeated, is another one")
            counts[kind] += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts
