"""`OpEvent`: one op as the detectors see it, with what went in, what came out, and what FP32 would have made of it.

Detectors are functions from an event to findings. They read; they never write into a tensor, and they run below
autograd and outside of any dispatch mode, so that whatever they compute is neither recorded nor seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from halfstep.doctor.finding import Finding
from halfstep.observe.place import Place

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass
class Value:
    """A floating tensor that goes into an op or comes out of it.

    Attributes:
        tensor: what the run has. Of an op's input that the op writes into: what was there before.
        shadow: what FP32 arithmetic from the start of the examination would have: float32, same shape; None where it
            would be the tensor itself (nothing before it was rounded to 16 bits) or could not be followed.
        made_by: the op that made it; None for what was there before the examination.
    """

    tensor: Tensor
    shadow: Tensor | None = None
    made_by: Place | None = None
    _amax: float | None = None

    @property
    def is_low(self) -> bool:
        return self.tensor.dtype in LOW_PRECISION

    @property
    def reference(self) -> Tensor:
        """FP32's value as far as it is known: the shadow, else the tensor itself in float32."""
        return self.shadow if self.shadow is not None else self.tensor.detach().float()

    @property
    def amax(self) -> float:
        """The largest magnitude; NaN if one is NaN, 0 of an empty tensor. `measure` asks for several at once."""
        measure([self])
        assert self._amax is not None
        return self._amax

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.amax)


@dataclass
class OpEvent:
    """One op that ran.

    Attributes:
        func: the overload, e.g. ``torch.ops.aten.mm.default``.
        name: its name without namespace and overload: ``mm``, ``add_``.
        args, kwargs: as the op got them; tensors it writes into hold the new values here.
        inputs: every floating tensor among the arguments in their order, those in lists one by one. Where the op
            writes into one, its `Value.tensor` is a copy from before.
        written: the inputs that the op wrote into, as indices into `inputs`.
        outputs: every floating tensor that came out, in order; for what it wrote into, the new values.
        decisions: integer and bool tensors that came out, each with what FP32's shadow would have decided (None where
            the op saw no shadow).
        place: where.
        step: optimizer steps taken before it, plus 1.
        parameter: whether `inputs[i]` is a parameter that an optimizer steps, by index.
        error: what the op raised instead of giving a result; then there are no outputs.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    place: Place
    step: int = 1
    written: list[int] = field(default_factory=list)
    decisions: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    parameters: set[int] = field(default_factory=set)
    error: BaseException | None = None

    def scalars(self) -> list[tuple[str, float]]:
        """The Python numbers among the arguments with their names in the op's schema; those of lists too."""
        named = list(zip((a.name for a in self.func._schema.arguments), self.args, strict=False))
        found: list[tuple[str, float]] = []
        for name, value in [*named, *self.kwargs.items()]:
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, float):
                    found.append((name, item))
        return found


@dataclass
class Suspicion:
    """What a detector says of one event.

    Attributes:
        finding: reported as it is unless it has to reach something.
        outputs: indices into `OpEvent.outputs`. If not empty, the finding is reported only once what this op did to
            these outputs has reached a loss, a gradient, a parameter, a buffer, or Python.
    """

    finding: Finding
    outputs: tuple[int, ...] = ()


Detector = Callable[[OpEvent], Iterable[Suspicion]]


def measure(values: Iterable[Value]) -> None:
    """Find the largest magnitudes of all that were not measured yet, waiting once for their device."""
    waiting = [value for value in values if value._amax is None]
    ends: list[Tensor] = []
    for value in waiting:
        if value.tensor.numel() == 0:
            value._amax = 0.0
            continue
        tensor = value.tensor.detach()
        if tensor.dtype not in (torch.float32, torch.float64, *LOW_PRECISION):  # float8: no reductions
            tensor = tensor.float()
        ends += torch.aminmax(tensor)
    found = iter(read(*ends))
    for value in waiting:
        if value._amax is None:
            low, high = next(found), next(found)
            value._amax = max(abs(low), abs(high)) if low == low else math.nan


def read(*scalars: Tensor) -> list[float]:
    """The numbers in tensors without dimensions, of any real dtypes, waiting once for each device that they are on."""
    if len(scalars) < 2 or any(type(scalar) is not Tensor for scalar in scalars):  # DTensor has no `tolist`
        return [float(scalar) for scalar in scalars]
    found = [math.nan] * len(scalars)
    groups: dict[tuple[torch.device, bool], list[int]] = {}
    for index, scalar in enumerate(scalars):
        wide = scalar.dtype in (torch.float64, torch.int64)  # counts go beyond 2**24
        groups.setdefault((scalar.device, wide), []).append(index)
    for indices in groups.values():  # of several dtypes, `stack` makes one that holds them all
        for index, value in zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True):
            found[index] = float(value)
    return found


def floats(values: Any) -> list[Tensor]:
    """The floating tensors in a nest that have their numbers in memory one by one, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and _is_plain(leaf)]


def _is_plain(tensor: Tensor) -> bool:
    if tensor.device.type == "meta":  # shapes without numbers
        return False
    return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested
