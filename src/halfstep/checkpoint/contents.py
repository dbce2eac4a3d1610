"""What may be in a checkpoint: everything that weights-only loading gives back, found out before anything is written.

torch.load names a class that it refuses when a checkpoint is needed again; here the place in the state is named when
it is saved. The rule is strict: exact types only, because a subclass (a numpy scalar is a float, torch.__version__ a
string) is pickled as a call of its class. What torch allows is listed in torch/_weights_only_unpickler.py; classes
that a program adds with torch.serialization.add_safe_globals stay out, since the next program may not.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.checkpoint.error import CheckpointError
from halfstep.checkpoint.memory import without_unseen
from halfstep.split import SplitTensor

_CONTAINERS = (dict, OrderedDict, Counter, list, tuple)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.Size)
#: torch.save knows them as values, not as the format of a tensor.
_SUB_BYTE = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)}


def storable(state: object) -> object:
    """``state`` in new containers, with tensors as they are to be stored; raises for what cannot be."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    _examine(state, "state", tensors, {})
    return _rebuilt(state, without_unseen(tensors), {})


def _examine(value: Any, place: str, tensors: dict[int, tuple[str, Tensor]], still_open: dict[int, bool]) -> None:
    """Collect the tensors under ``value``, and raise at the first thing that weights-only loading would refuse."""
    if isinstance(value, Tensor):
        _examine_tensor(value, place)
        tensors.setdefault(id(value), (place, value))
    elif type(value) in _CONTAINERS:
        if still_open.get(id(value)):
            raise CheckpointError(f"{place} is a {type(value).__name__} that contains itself: break the circle")
        if id(value) not in still_open:
            still_open[id(value)] = True
            for where, item in _items(value, place):
                _examine(item, where, tensors, still_open)
            still_open[id(value)] = False
    elif type(value) is set:
        for item in value:
            _examine_plain(item, f"an element of {place}")
    elif type(value) is not bytearray:
        _examine_plain(value, place)


def _items(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            _examine_plain(key, f"a key of {place}")
            yield f"{place}[{key!r}]", item
        if type(value) is OrderedDict:  # the _metadata of a module's state dict: versions of its modules
            yield from ((f"{place}.{name}", item) for name, item in vars(value).items())
    else:
        yield from ((f"{place}[{index}]", item) for index, item in enumerate(value))


def _examine_plain(value: Any, place: str) -> None:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if type(value) is tuple:  # inside a key or a set; elsewhere tuples are containers
        for item in value:
            _examine_plain(item, place)
    elif type(value) not in _PLAIN:
        raise CheckpointError(
            f"{place} is of type {kind}, which cannot be loaded without running code: {_remedy(value, kind)}"
        )
    elif type(value) is int and value.bit_length() >= 2040:
        raise CheckpointError(f"{place} is an integer of {value.bit_length()} bits, more than 2039: store it as text")
    elif value == b"" and type(value) is bytes:  # pickled as a call of bytes(), which torch.load does not allow
        raise CheckpointError(f"{place} is an empty bytes object, which torch.load refuses: store None or bytearray()")


def _remedy(value: Any, kind: str) -> str:
    if kind == "numpy.ndarray":
        return "store torch.from_numpy(it)"
    if kind.startswith("numpy."):
        return "store it.item()"
    for plain in (dict, list, tuple, set, str, int, float):  # subclasses, such as defaultdict or torch.__version__
        if isinstance(value, plain):
            return f"store {plain.__name__}(it)"
    if hasattr(value, "state_dict"):
        return "store its state_dict()"
    return "store the tensors and plain values that it can be made from again"


def _examine_tensor(tensor: Tensor, place: str) -> None:
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, SplitTensor):
        if kind.endswith(".DTensor"):
            remedy = "save sharded states with torch.distributed.checkpoint, or gather it with .full_tensor()"
        else:
            remedy = "convert it to a plain tensor, or use torch.distributed.checkpoint"
        raise CheckpointError(f"{place} is a {kind}, of which only plain memory could be stored: {remedy}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        what = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise CheckpointError(f"{place} is a {what} tensor: store the dense tensors that it is made of")
    if tensor.dtype in _SUB_BYTE:
        raise CheckpointError(f"{place} is of {tensor.dtype}, which torch.save does not know: store its bytes as uint8")
    if tensor.is_meta:
        raise CheckpointError(f"{place} is on the meta device and has no values: materialise the model first")


def _rebuilt(value: Any, stored: dict[int, Tensor], copies: dict[int, Any]) -> Any:
    """``value`` with each tensor replaced; what was one container in two places is one again."""
    if isinstance(value, Tensor):
        return stored[id(value)]
    if type(value) not in _CONTAINERS:
        return value
    if id(value) not in copies:
        if isinstance(value, dict):
            copy = type(value)()
            for key, item in value.items():
                copy[key] = _rebuilt(item, stored, copies)
            if type(value) is OrderedDict:
                vars(copy).update({name: _rebuilt(item, stored, copies) for name, item in vars(value).items()})
        else:
            copy = type(value)(_rebuilt(item, stored, copies) for item in value)
        copies[id(value)] = copy
    return copies[id(value)]
