"""Running one op of a program together with its FP32 shadow, and telling of it in an `OpEvent`.

Everything here runs inside a dispatch mode's handler: below autograd and autocast, with the mode itself off. What is
computed beside the run is kept out of it: no autocast, no gradients, no random numbers drawn, nothing of the run's
written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from halfstep.doctor import attention
from halfstep.doctor.event import LOW_PRECISION, OpEvent, Value, floats
from halfstep.doctor.shadow import Shadows, again, can_follow, named, widened, written
from halfstep.observe.place import Place

#: Ops that make floating numbers without being given any.
_FROM_CONSTANTS = ("_to_copy", "full", "arange", "linspace", "logspace", "scalar_tensor", "eye")

#: Ops whose floating results are whatever lay in memory: two of them differ, and neither is wrong.
_UNINITIALISED = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")

#: A failure of ours, with what was being done: kept, never raised.
Failed = Callable[[str, BaseException], None]


@dataclass(frozen=True)
class OpFacts:
    """What an overload's schema says, looked up once."""

    namespace: str
    name: str  #: without namespace and overload
    is_view: bool  #: its outputs are other looks at its input
    may_follow: bool


@cache
def facts_of(func: Any) -> OpFacts:
    namespace, _, name = func._schema.name.partition("::")
    returned = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    view = bool(returned) and not any(alias.is_write for alias in returned)
    follow = can_follow(func, namespace, name) or attention.is_fused(func)
    return OpFacts(namespace, name, view, follow)


@contextlib.contextmanager
def beside_the_run() -> Iterator[None]:
    """For computations that the program does not make: its autocast and its graph do not concern them."""
    with torch._C._DisableAutocast(), torch.no_grad():
        yield


class Execution:
    """Runs ops with their shadows."""

    def __init__(self, shadows: Shadows, failed: Failed) -> None:
        self._shadows = shadows
        self._failed = failed

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place, step: int
    ) -> tuple[Any, OpEvent]:
        """Run an op and its shadow.

        Returns:
            what the op returned, and its event; ``event.error`` is what it raised instead.
        """
        facts = facts_of(func)
        prepared = None
        with beside_the_run():
            try:
                prepared = self._prepare(func, facts, args, kwargs)
            except Exception as error:
                self._failed(f"the shadow of {facts.name}", error)
        inputs, writes, follows = prepared or ([], [], False)
        event = OpEvent(func, facts.name, args, kwargs, inputs, [], place, step)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            event.error = error
            return None, event
        with beside_the_run():
            try:
                self._conclude(event, result, writes, follows)
            except Exception as error:
                self._failed(f"the shadow of {facts.name}", error)
                for tensor in [*floats(result), *writes]:
                    self._shadows.forget(tensor)
        return result, event

    def _prepare(
        self, func: Any, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Value], list[Tensor], bool]:
        """Inputs as they are before, the floating tensors that will be written into, and whether to shadow the op."""
        tensors = [t for _, value in named(func, args, kwargs) for t in floats(value)]
        writes = [t for t in written(func, facts.name, args, kwargs) if t.is_floating_point()]
        makes_low = any(d in LOW_PRECISION for d in tree_leaves((args, kwargs)) if isinstance(d, torch.dtype))
        rounded = makes_low or any(t.dtype in LOW_PRECISION or self._shadows.get(t) is not None for t in tensors)
        has_numbers = facts.name not in _UNINITIALISED and (bool(tensors) or facts.name in _FROM_CONSTANTS)
        follows = rounded and has_numbers and (facts.may_follow or _draws_nothing(func, args, kwargs))
        into = {id(t) for t in writes}
        inputs = []
        for tensor in tensors:
            if id(tensor) in into:
                shadow = self._shadows.start(tensor) if follows else self._shadows.get(tensor)
                before = tensor.detach().clone()
                value = Value(before, None if shadow is None else shadow.clone())
            else:
                value = Value(tensor, self._shadows.get(tensor))
            entry = self._shadows.entry(tensor)
            value.made_by = None if entry is None else entry.made_by
            inputs.append(value)
        return inputs, writes, follows

    def _conclude(self, event: OpEvent, result: Any, writes: list[Tensor], follows: bool) -> None:
        """Run the shadow, and put outputs and decisions into the event."""
        into = {id(t) for t in writes}
        sources = [t for _, value in named(event.func, event.args, event.kwargs) for t in floats(value)]
        event.written = [i for i, t in enumerate(sources) if id(t) in into]
        outputs = [t for t in floats(result) if id(t) not in into]
        followed, shadow_result = self._followed(event, result) if follows else (False, None)
        if followed:
            # An in-place op has moved its target's shadow itself: only new tensors are left.
            new = [s for t, s in zip(floats(result), floats(shadow_result), strict=True) if id(t) not in into]
            for tensor, shadow in zip(outputs, new, strict=True):
                if tensor.shape == shadow.shape:  # unique, nonzero: as many results as there are different numbers
                    self._shadows.put(tensor, shadow)
        else:
            for tensor in writes:
                self._shadows.forget(tensor)
        for tensor in [*outputs, *writes]:
            self._shadows.made(tensor, event.place)
            event.outputs.append(Value(tensor, self._shadows.get(tensor), event.place))
        decided = _decisions(result)
        expected = _decisions(shadow_result) if followed else []
        known = expected if len(expected) == len(decided) else [None] * len(decided)
        event.decisions = list(zip(decided, known, strict=True))

    def _followed(self, event: OpEvent, result: Any) -> tuple[bool, Any]:
        """Whether the op could be run on the shadows of its inputs, and what it gave (nothing, where it writes)."""
        if event.name == "native_dropout":
            return True, _dropout(event, result)
        if event.name == "_amp_foreach_non_finite_check_and_unscale_":
            gradients, _, inverse_scale = event.args
            for gradient in gradients:
                if (known := self._shadows.get(gradient)) is not None:
                    known.mul_(inverse_scale)
            return True, result

        def replace(tensor: Tensor) -> Tensor:
            shadow = self._shadows.get(tensor)
            return widened(tensor.detach()) if shadow is None else shadow

        try:
            if attention.is_fused(event.func):
                return True, attention.in_fp32(event.func, event.args, event.kwargs, result, replace)
            return True, again(event.func, event.args, event.kwargs, replace)
        except Exception as error:
            self._failed(f"{event.name} in FP32", error)
            return False, None


def _dropout(event: OpEvent, result: Any) -> Any:
    """Dropout of the shadow by the mask that the run drew."""
    _, mask = result
    source = event.inputs[0]
    shadow = source.shadow if source.shadow is not None else widened(source.tensor)
    kept = 1.0 - float(event.args[1])
    return shadow * mask * (1.0 / kept if kept > 0 else 0.0), mask


def _draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op that may draw random numbers draws none in this call, or is known to `Execution`."""
    given = {argument.name: value for argument, value in named(func, args, kwargs)}
    if func._schema.name == "aten::native_dropout":
        return given.get("train") is not False
    if func._schema.name == "aten::_amp_foreach_non_finite_check_and_unscale_":
        return True
    schema = {argument.name: argument.default_value for argument in func._schema.arguments}
    return "dropout_p" in schema and given.get("dropout_p", schema["dropout_p"]) == 0.0


def _decisions(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype in (torch.int64, torch.bool)]
