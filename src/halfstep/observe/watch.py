"""`GradientWatch`: the largest gradient of each parameter, every step, for next to nothing.

A hook after each parameter's gradient accumulation takes ``aminmax`` of the gradient while it is still in the cache:
two numbers, which stay on the device. Nobody waits for them until `GradientWatch.read`, which brings all of them to the
host at once. inf and NaN go through ``aminmax``, so the same numbers say whether a step is bad, and in which parameter
it was bad first: gradients arrive in the order of the backward pass, nearest to the loss first.

When is a gradient complete? What a hook sees differs::

    one process                      the gradient accumulated so far: the last micro-batch's hook sees all of it
    FSDP2 (DTensor)                  it calls these hooks itself, after reduction, on this rank's shard
    DistributedDataParallel          the hook runs *before* the ranks' gradients are averaged, which is done when the
                                     backward pass ends: so look then (``when="backward"``)
    halfstep's released gradients    freed by a hook of the same kind: ours has to come before it, and does

The last look at a parameter wins, so accumulation needs nothing.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

#: accumulated: when a gradient has been accumulated · backward: when the backward pass has ended
When = Literal["accumulated", "backward"]


@dataclass(frozen=True)
class GradientReading:
    """What the host read: largest magnitudes, in the order in which gradients arrived."""

    amax: Mapping[str, float] = field(default_factory=dict)  #: by parameter name; inf or NaN if the gradient holds one

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Parameters whose gradients hold inf or NaN, the one that arrived first, nearest to the loss, first."""
        return tuple(name for name, amax in self.amax.items() if not math.isfinite(amax))

    @property
    def largest(self) -> tuple[str, float] | None:
        """The parameter with the largest gradient, and its magnitude; the first that is not finite, if one is not."""
        if bad := self.nonfinite:
            return bad[0], self.amax[bad[0]]
        return max(self.amax.items(), key=lambda item: item[1], default=None)

    def scaled(self, factor: float) -> GradientReading:
        """The reading of these gradients times a factor: 1 / loss scale makes them the loss's."""
        return GradientReading({name: amax * factor for name, amax in self.amax.items()})


@dataclass(frozen=True)
class UnreadGradients:
    """What was seen of one step's gradients, on their devices; `read` waits for it."""

    seen: Mapping[str, tuple[Tensor, Tensor]]  #: smallest and largest element by parameter, 0-d; in order of arrival

    def read(self) -> GradientReading:
        """In one wait for each device."""
        return self.read_with(())[0]

    @torch.no_grad()
    def read_with(self, numbers: Sequence[Tensor]) -> tuple[GradientReading, list[float]]:
        """The same, and the magnitudes of other tensors of one element, in the same wait."""
        pairs: dict[str | int, tuple[Tensor, Tensor]] = dict(
            enumerate((each.detach().reshape(()),) * 2 for each in numbers)
        )
        pairs.update(self.seen)
        alike: dict[tuple[torch.device, torch.dtype], list[str | int]] = {}
        for key, (smallest, _) in pairs.items():
            alike.setdefault((smallest.device, smallest.dtype), []).append(key)
        parts: dict[torch.device, list[Tensor]] = {}
        keys: dict[torch.device, list[str | int]] = {}
        for (device, _), members in alike.items():
            ends = torch.stack([end for key in members for end in pairs[key]])
            parts.setdefault(device, []).append(ends.float() if device.type == "mps" else ends.double())
            keys.setdefault(device, []).extend(members)
        found: dict[str | int, float] = {}
        for device, ends_of in parts.items():
            magnitudes = torch.cat(ends_of).view(-1, 2).abs().amax(1).tolist()  # amax carries NaN on
            found.update(zip(keys[device], magnitudes, strict=True))
        amax = {name: found[name] for name in self.seen}
        return GradientReading(amax), [found[index] for index in range(len(numbers))]


@dataclass(frozen=True)
class StepWatch:
    """One step in a line: how large its largest gradient was, where, and whether it was taken."""

    step: int
    applied: bool
    scale: float | None  #: the loss scale; None without loss scaling
    parameter: str | None  #: of the largest gradient, or of the first that was not finite; None without gradients
    amax: float | None  #: its magnitude, unscaled
    nonfinite: tuple[str, ...] = ()  #: parameters whose gradients held inf or NaN, in the order of their arrival

    def __str__(self) -> str:
        """``step 12: largest gradient 0.31 in blocks.3.wo.weight, loss scale 65536``."""
        said = f"step {self.step}: "
        if self.nonfinite:
            said += f"{len(self.nonfinite)} gradients not finite, first in {self.nonfinite[0]}"
        elif self.amax is not None:
            said += f"largest gradient {self.amax:.3g} in {self.parameter}"
        else:
            said += "no gradients"
        said += "" if self.scale is None else f", loss scale {self.scale:g}"
        return said if self.applied else f"{said}; not applied"


def summarise(step: int, reading: GradientReading, *, applied: bool, scale: float | None) -> StepWatch:
    """One step in a line, from a reading of gradients as they arrived, which is scaled."""
    unscaled = reading if scale is None else reading.scaled(1 / scale)
    name, amax = unscaled.largest or (None, None)
    return StepWatch(step, applied, scale, name, amax, reading.nonfinite)


class GradientWatch:
    """Looks at gradients as they arrive, and keeps each one's largest magnitude on its device.

    Args:
        parameters: by name, as ``model.named_parameters()``; those that are frozen are left out. They are not kept
            alive. Give FSDP2's parameters after ``fully_shard``, which makes new ones.
        when: "backward" under DistributedDataParallel; see the module.

    Attributes:
        active: set it to False to look away: hooks then return at once.

    Of sparse gradients the values are looked at as they are stored: where an index comes twice, at each part.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, when: When = "accumulated"
    ) -> None:
        self.active = True
        self._when = when
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}  # smallest and largest element, 0-d
        self._pending: dict[str, weakref.ref[Tensor]] = {}
        self._task = -1
        self._handles: list[RemovableHandle] = []
        named = parameters.items() if isinstance(parameters, Mapping) else parameters
        for name, parameter in named:
            if parameter.requires_grad:
                self._handles.append(_first_hook(parameter, _Hook(self, name)))
        weakref.finalize(self, _remove, self._handles).atexit = False

    def read(self) -> GradientReading:
        """All that was seen since the last `take`, in one wait for each device."""
        return UnreadGradients(dict(self._seen)).read()

    def take(self) -> UnreadGradients:
        """What was seen since the last call, still on the device; a new step begins."""
        seen, self._seen = self._seen, {}
        self._pending.clear()
        return UnreadGradients(seen)

    def remove(self) -> None:
        """Take the hooks off. What was seen can still be read."""
        _remove(self._handles)

    def arrived(self, name: str, parameter: Tensor) -> None:
        """What the hooks do."""
        if not self.active:
            return
        if self._when == "accumulated":
            self._look(name, parameter)
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:  # the first gradient of this backward pass
            self._task = task
            # DistributedDataParallel queues its own callback, which averages, in the hook of the last bucket. Queued
            # once more when the callbacks run, ours comes after it.
            _when_backward_ends(lambda: _when_backward_ends(self._look_at_pending))
        self._pending[name] = weakref.ref(parameter)

    def _look_at_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for name, reference in pending.items():
            if (parameter := reference()) is not None:
                self._look(name, parameter)

    def _look(self, name: str, parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        if gradient is None:
            return
        gradient = gradient.detach()  # outside of any graph, so that no_grad, which costs more, is not needed
        if hasattr(gradient, "to_local"):
            gradient = gradient.to_local()
        if gradient.layout is not torch.strided:
            gradient = gradient._values()
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient)
        if gradient.numel():  # a rank may have no part of a small parameter
            self._seen.pop(name, None)  # the order is that of the last arrivals
            self._seen[name] = torch.aminmax(gradient)


class _Hook:
    """On a parameter; holds the watch weakly."""

    def __init__(self, watch: GradientWatch, name: str) -> None:
        self._watch = weakref.ref(watch)
        self._name = name

    def __call__(self, parameter: Tensor) -> None:
        watch = self._watch()
        if watch is not None:
            watch.arrived(self._name, parameter)


def _first_hook(parameter: Tensor, hook: _Hook) -> RemovableHandle:
    """Register a hook that runs before those that are there, one of which may step and free the gradient."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call,unused-ignore]
    hooks: Any = parameter._post_accumulate_grad_hooks  # torch's, an OrderedDict
    others = [(key, value) for key, value in hooks.items() if key != handle.id]
    for key, _ in others:  # autograd runs through the plain dict beneath, which move_to_end leaves as it is
        del hooks[key]
    hooks.update(others)
    return handle


def _when_backward_ends(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
