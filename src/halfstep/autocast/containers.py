"""Casting through containers: what enters an FP32 island, what leaves autocast.

One walk, `map_tensors`, knows tuples, named tuples, lists, mappings (Hugging Face's ``ModelOutput`` included) and
dataclasses, nested in any way. What it does not know it leaves alone, and whatever holds nothing to cast comes back as
the same object: identity is part of what a model may rely on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

LOW_PRECISION = (torch.float16, torch.bfloat16)


def to_float32(value: Any) -> Any:
    """``value`` with every 16-bit floating tensor in it cast to FP32 (differentiably).

    Goes through containers as `map_tensors` does; anything without a 16-bit tensor inside comes back as the same
    object.
    """
    return map_tensors(value, _widened)


def cast_inputs(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating tensor in it cast to ``dtype`` (differentiably).

    As in autocast, float64 is left alone: who computes in it means it. So are integer, bool, complex and 8-bit tensors,
    and objects of unknown classes. Containers as in `map_tensors`.
    """
    castable = (torch.float32, *LOW_PRECISION)
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.dtype in castable else tensor)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``function`` applied to every tensor in it; the same object where that changes nothing.

    Goes through tuples, named tuples, lists, mappings (``ModelOutput`` included) and dataclasses, which are copied, not
    constructed again.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        cast = {key: map_tensors(item, function) for key, item in value.items()}
        if all(cast[key] is item for key, item in value.items()):
            return value
        return _rebuild_mapping(value, cast)
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_fields"):  # a named tuple takes its items one by one
            return type(value)(*items)
        return type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        cast = {name: map_tensors(item, function) for name, item in fields.items()}
        changed = {name: item for name, item in cast.items() if item is not fields[name]}
        if not changed:
            return value
        twin = copy.copy(value)  # not replace(): fields may be init=False or checked in __post_init__
        for name, item in changed.items():
            object.__setattr__(twin, name, item)
        return twin
    return value


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


def _rebuild_mapping(value: Mapping[Any, Any], cast: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return cast
    twin = copy.copy(value)  # keeps the class, its attributes and order: OrderedDict, ModelOutput, defaultdict
    for key, item in cast.items():
        twin[key] = item  # type: ignore[index]  # a Mapping that cannot be set raises: its class is at fault
    return twin
