"""Which optimizer takes a step right now, how many were taken, and which parameter a tensor of its state is for."""

from __future__ import annotations

import inspect
import sys
import weakref
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """An optimizer's step that runs: below how many modules, with a closure or not, and the frame it runs in."""

    optimizer: torch.optim.Optimizer
    depth: int
    closure: bool
    frame: FrameType

    def covers(self, depth: int) -> bool:
        """Whether code below `depth` modules is the optimizer's own, not the model's that its closure runs."""
        return depth <= self.depth and not (self.closure and torch.is_grad_enabled())


class Optimizers:
    """Optimizers seen stepping, kept weakly."""

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        self._taken: dict[int, int] = {}
        self._state_of: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}
        self._states: dict[int, int] = {}  # how many parameters had state at the last look

    @property
    def taken(self) -> int:
        """Steps taken by the optimizer that took most."""
        return max(self._taken.values(), default=0)

    @property
    def alive(self) -> tuple[torch.optim.Optimizer, ...]:
        """In the order of their first steps."""
        return tuple(optimizer for ref in self._seen.values() if (optimizer := ref()) is not None)

    def begin(self, running: list[Step], optimizer: Any, args: Any, kwargs: Any, depth: int) -> None:
        """A step begins on a thread whose steps under way are `running`; called from a hook's wrapper."""
        self._seen[id(optimizer)] = weakref.ref(optimizer)
        frames, frame = set(), inspect.currentframe()
        while frame is not None:
            frames.add(frame)
            frame = frame.f_back
        # Steps that raised have not ended, as far as hooks can tell.
        running[:] = [step for step in running if step.frame in frames]
        closure = any(callable(value) for value in (*args[1:], *kwargs.values()))
        running.append(Step(optimizer, depth, closure, sys._getframe(3)))

    def end(self, running: list[Step], optimizer: Any) -> None:
        """A step has ended; inside of another optimizer's step it counts as part of that one."""
        while running and running.pop().optimizer is not optimizer:
            pass
        if not running:
            self._taken[id(optimizer)] = self._taken.get(id(optimizer), 0) + 1
        if self._states.get(id(optimizer)) != len(optimizer.state):
            self._states[id(optimizer)] = len(optimizer.state)
            for parameter, state in optimizer.state.items():
                for value in state.values() if isinstance(state, dict) else ():
                    if isinstance(value, Tensor) and isinstance(parameter, Tensor):
                        self._state_of[id(value)] = (weakref.ref(value), weakref.ref(parameter))

    def parameter_of(self, tensor: Tensor) -> Tensor:
        """The parameter that a tensor of an optimizer's state is for; any other tensor itself."""
        known = self._state_of.get(id(tensor))
        parameter = known[1]() if known is not None and known[0]() is tensor else None
        return tensor if parameter is None else parameter

    def position(self, tensor: Tensor) -> str | None:
        """``group0[3]``: where an optimizer keeps a parameter; None where none does."""
        for optimizer in self.alive:
            for number, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter is tensor:
                        return f"group{number}[{index}]"
        return None
