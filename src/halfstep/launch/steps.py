"""What is seen of a script's steps: losses, norms, times, and the memory of one of them, written as they happen.

Loss, norm, scale and the answer whether the gradients overflowed stay on their device until the step is over, and are
read in one wait there (`halfstep.launch.reading`), which the time of the step needs in any case.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from halfstep.launch.own import in_backward
from halfstep.launch.reading import OnDevice, read
from halfstep.observe import PeakMemory, gradient_norm_there, resident_bytes
from halfstep.optim import MasterWeights
from halfstep.record import Memory, Notice, Step

#: Memory is measured in the step after this one of the first optimizer: its state exists by then.
MEMORY_AFTER_STEP = 2


class StepLimitReached(BaseException):
    """Ends a script after the asked number of steps; not an `Exception`, so that scripts do not swallow it."""


class StepObserver:
    """Counts, times and records optimizer steps.

    Args:
        write: takes each step and the memory measurement.
        step_limit: raise `StepLimitReached` after so many steps of the first optimizer.
    """

    def __init__(self, write: Callable[[Step | Memory | Notice], None], step_limit: int | None) -> None:
        self.seen = 0
        self.measures_memory = True  #: one of the steps; its tracker does not nest with other dispatch modes
        self._write = write
        self._step_limit = step_limit
        self._index: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._number: dict[int, int] = {}
        self._last_end: dict[int, float] = {}
        self._losses: list[Tensor] = []
        self._clipped: list[tuple[set[int], Any]] = []
        self._memory: PeakMemory | None = None
        self._compiled_before = compiled_frames()

    def loss(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], scale: Tensor | float = 1.0) -> None:
        """A backward starts from ``roots``; what it differentiates is their sum, weighted by given gradients.

        Args:
            scale: by which the script has multiplied its loss itself; one element.
        """
        for root, gradient in zip(roots, gradients, strict=True):
            value = root.detach() if gradient is None else root.detach() * gradient.detach()
            value = value.real if value.is_complex() else value
            here = scale.detach().to(value.device, non_blocking=True) if isinstance(scale, Tensor) else scale
            self._losses.append(value.float().sum() / here)

    def clipped(self, parameters: Sequence[Tensor], norm: Any) -> None:
        """The script clipped these parameters' gradients, whose 2-norm was ``norm``."""
        self._clipped.append(({id(p) for p in parameters}, norm))

    def norm(self, parameters: Sequence[Tensor], only_clipped: bool = False) -> OnDevice:
        """The gradients' 2-norm before clipping: as the script's clipping found it, else measured."""
        mine = {id(p) for p in parameters if p.grad is not None}
        for clipped, norm in reversed(self._clipped):
            if mine and mine <= clipped:
                return norm if isinstance(norm, Tensor) and not hasattr(norm, "to_local") else float(norm)
        return None if only_clipped else gradient_norm_there(parameters)

    def starts(self, parameters: Sequence[Tensor]) -> None:
        """A step starts: what are gradients now was anonymous when backward made it."""
        if self._memory is not None:
            self._name(self._memory, parameters)

    def ended(
        self,
        optimizer: Optimizer,
        grad_norm: OnDevice,
        scale: OnDevice,
        overflowed: bool | Sequence[Tensor],
        device: torch.device | None,
        masters: MasterWeights | None = None,
    ) -> bool:
        """A step was made or skipped: record it, and say which.

        Args:
            scale: the loss scale of its gradients; None without loss scaling.
            overflowed: whether its gradients did, so that it was skipped; or tensors of one element, any of them not 0.
            device: the model's, as far as it is known; those of the optimizer's parameters are waited for too.
        """
        index = self._index.setdefault(optimizer, len(self._index))
        number = self._number[index] = self._number.get(index, 0) + 1
        self.seen += 1
        devices = {device, *(p.device for group in optimizer.param_groups for p in group["params"])}
        on_cuda = [d for d in devices if d is not None and d.type == "cuda"]
        flags = () if isinstance(overflowed, bool) else tuple(overflowed)
        # Not only what is read: the time of a step whose kernels are still queued would be that of queueing them.
        norm_read, scale_read, *rest = read((grad_norm, scale, *flags, *self._losses), on_cuda)
        applied = not (overflowed is True or any(rest[: len(flags)]))
        losses = rest[len(flags) :]
        self._losses.clear()
        self._clipped.clear()
        now = time.perf_counter()
        step = Step(
            step=number,
            optimizer=index,
            loss=float(torch.tensor(losses, dtype=torch.float32, device="cpu").sum()) if losses else None,
            seconds=now - self._last_end[index] if index in self._last_end else None,
            applied=applied,
            scale=scale_read,
            grad_norm=norm_read,
            rss_bytes=resident_bytes(),
            device_bytes=sum(map(torch.cuda.max_memory_allocated, on_cuda)) if on_cuda else None,
            tracked=self._memory is not None,
        )
        self._write(step)
        if index == 0:
            self._measure_memory(number, masters)
            if self._step_limit is not None and number >= self._step_limit:
                raise StepLimitReached
        # Our own work between two steps is not the script's time.
        ours = time.perf_counter() - now
        self._last_end = {key: at + ours for key, at in self._last_end.items()}
        self._last_end[index] = time.perf_counter()
        return applied

    def close(self) -> None:
        """End a memory measurement that was started."""
        if self._memory is not None:
            self._memory.finish(0)
            self._memory = None

    def _measure_memory(self, step: int, masters: MasterWeights | None) -> None:
        if (
            not self.measures_memory or in_backward()
        ):  # a step inside backward: dispatch modes are the engine's there, not ours to enter or leave
            return
        if self._memory is not None:
            measured, self._memory = self._memory.finish(step), None
            for memory in measured:
                self._write(memory)
        elif step == MEMORY_AFTER_STEP and compiled_frames() > self._compiled_before:
            self._write(
                Notice(
                    "memory-not-measured",
                    "the script uses torch.compile, and following its tensors would switch compiled code off",
                )
            )
        elif step == MEMORY_AFTER_STEP and PeakMemory.can_start():
            self._memory = PeakMemory()
            self._memory.start()
            for optimizer in self._index:
                self._name(self._memory, [p for group in optimizer.param_groups for p in group["params"]])
                state = [t for values in optimizer.state.values() for t in tree_leaves(values) if isinstance(t, Tensor)]
                self._memory.name("optimizer state", state)
            if masters is not None:
                self._memory.name("master weights", masters.masters())

    @staticmethod
    def _name(memory: PeakMemory, parameters: Sequence[Tensor]) -> None:
        memory.name("parameters", parameters)
        memory.name("gradients", [p.grad for p in parameters if p.grad is not None])


def compiled_frames() -> int:
    """How many Python frames torch.compile has met in this process."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return 0 if counters is None else sum(counters["frames"].values())
