"""HS201: gradients that became zero on their way to the parameters.

Counted where they arrive, over all parameters of one backward pass: elements that are zero in the run and not in FP32.
Elements smaller than 2**-20 of their parameter's largest gradient are left out on both sides: what a softmax's far tail
passes on vanishes in every format, and moves nothing. The op to name is the one in which most were lost that came in
alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfstep.doctor.event import OpEvent, read
from halfstep.doctor.finding import Finding, Severity
from halfstep.observe.place import Place

#: Share of a backward pass's gradients that has to have become zero, to be a warning and to be an error.
_WARNING, _ERROR = 0.25, 0.9
_NEGLIGIBLE = 2.0**-20


@dataclass
class _Count:
    zero: int = 0
    nonzero: int = 0

    @property
    def share(self) -> float:
        return self.zero / self.nonzero if self.nonzero else 0.0


@dataclass
class _Pass:
    """One backward pass."""

    task: int
    step: int
    scale: float | None
    total: _Count = field(default_factory=_Count)
    layers: dict[str, _Count] = field(default_factory=dict)
    amax: float = 0.0  #: of the parameters' gradients
    largest: float = 0.0  #: of all 16-bit results on the way to them
    ops: dict[Place, _Count] = field(default_factory=dict)


class GradientFlush:
    """Counts zero gradients, pass by pass.

    Attributes:
        by_step: per optimizer step, per layer (module path), the share of gradient elements that became zero.
    """

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}
        self._ops: dict[Place, _Count] = {}  # of the pass that runs
        self._task = -1  # autograd's number of it
        self._largest = 0.0  # of all its 16-bit results
        self._pass: _Pass | None = None

    def see(self, event: OpEvent) -> None:
        """An op of a backward pass: where is how much lost?"""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # the first op of another pass; those of the one before stay with it
            self._task, self._ops, self._largest = task, {}, 0.0
        for value in event.outputs:
            if value.is_low and value.shadow is not None:
                nonzero, zero, largest = _lost(value.tensor, value.shadow)
                self._largest = max(self._largest, largest)
                count = self._ops.setdefault(event.place, _Count())
                count.nonzero += nonzero
                if zero and not _was_lost(event, zero / nonzero):
                    count.zero += zero

    def accumulated(
        self, name: str, gradient: Tensor, shadow: Tensor | None, step: int, scale: float | None
    ) -> Iterator[Finding]:
        """A parameter's gradient has arrived; what the pass before it amounts to, if this begins another."""
        task = torch._C._current_graph_task_id()
        if self._pass is None or self._pass.task != task:
            yield from self.finished()
            self._pass = _Pass(task, step, scale)
        self._pass.ops = self._ops if self._task == task else {}
        if shadow is None:
            shadow = gradient.detach().float()
        nonzero, zero, largest = _lost(gradient.detach(), shadow)
        layer = name.rpartition(".")[0] or name
        for count in (self._pass.total, self._pass.layers.setdefault(layer, _Count())):
            count.zero += zero
            count.nonzero += nonzero
        self._pass.amax = max(self._pass.amax, largest)
        self._pass.largest = max(self._pass.amax, self._largest if self._task == task else 0.0)

    def finished(self) -> Iterator[Finding]:
        """The pass that has ended: a finding if too much of it was lost."""
        done, self._pass = self._pass, None
        if done is None:
            return
        ops = done.ops
        self.by_step[done.step] = {layer: count.share for layer, count in done.layers.items()}
        share = done.total.share
        if share < _WARNING or not ops:
            return
        worst = max(ops, key=lambda place: (ops[place].zero, ops[place].share))
        layer = max(done.layers, key=lambda name: (done.layers[name].share, done.layers[name].nonzero))
        scaled = f"at loss scale {done.scale:g}" if done.scale is not None else "without a loss scale"
        # The largest number on the way may go up to 2**14: two octaves of fp16 are left for other batches.
        fits = 2.0 ** (12 - math.frexp(done.largest)[1] + 1) * (done.scale or 1.0) if done.largest > 0 else 65536.0
        yield Finding(
            "HS201",
            worst,
            f"{share:.1%} of all gradient elements are zero {scaled} and not in FP32 ({done.total.zero} of "
            f"{done.total.nonzero}; worst in {layer}: {done.layers[layer].share:.0%}); the largest gradient is "
            f"{done.amax / (done.scale or 1.0):.3g}",
            "These weights are not trained at all, and nothing else tells.",
            f"Scale the loss: a scale of {fits:g} fits these gradients (halfstep.GradScaler finds it by itself); or "
            "bf16, which needs none.",
            Severity.ERROR if share >= _ERROR else Severity.WARNING,
            {"share": share, "zero": done.total.zero, "nonzero_in_fp32": done.total.nonzero, "suggested_scale": fits},
            step=done.step,
        )


def _was_lost(event: OpEvent, share: float) -> bool:
    """Whether what an op was given had lost half of this share already."""
    for value in event.inputs:
        if value.shadow is not None:
            nonzero, zero, _ = _lost(value.tensor, value.shadow)
            if zero >= share / 2 * max(nonzero, 1):
                return True
    return False


def _lost(here: Tensor, fp32: Tensor) -> tuple[int, int, float]:
    """Elements that are not zero in FP32, how many of them are zero here, and the largest finite one."""
    magnitude = fp32.abs()
    if magnitude.numel() == 0:
        return 0, 0, 0.0
    finite = torch.where(magnitude.isfinite(), magnitude, 0.0)
    largest = finite.max()
    there = finite > largest * _NEGLIGIBLE
    nonzero, zero, amax = read(there.sum(), (there & (here == 0)).sum(), largest)
    return int(nonzero), int(zero), amax
