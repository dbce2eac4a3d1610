"""Batches as tensors and plain values, and back: what a data loader gives is not always a tuple of tensors.

`encode` takes a batch apart when it is handed out. Containers are made anew, since a loop may pop keys or append;
tensors are those of the batch and cost nothing, but what changes *in* them later is noticed (by their version counters)
and said. Types that loading without running code cannot give back are written down by name::

    dict, list, tuple, tensors, numbers, text    as they are
    tensors on a device, sparse tensors          and where they were
    NumPy arrays and numbers                     as tensors
    mappings (BatchEncoding), dataclasses,
    named tuples, objects with attributes        their type's name and their items
    anything else                                named in `Encoded.missing`, and None in its place

`decode` makes the batch again. It imports and constructs no type that a file names: give it the types
(``types=[BatchEncoding]``) and they come back, or get `Fields`, a dict with attributes, in their place, and a plain
named tuple in that of a named one.
"""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from halfstep.observe.randomness import has_device

#: The key of a dict that stands for something else.
KIND = "halfstep.kind"
#: More items than this are not taken apart: the price would be paid in every step.
MOST_ITEMS = 50_000
_PLAIN = frozenset((type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size))


@dataclass
class Encoded:
    """A batch taken apart."""

    value: Any = None  #: tensors and plain values
    missing: dict[str, str] = field(default_factory=dict)  #: place in the batch -> what was left out, and why
    versions: list[tuple[str, Tensor, int]] = field(default_factory=list)  #: of the tensors, when it was taken apart

    def altered(self) -> dict[str, str]:
        """Tensors that were written to since."""
        return {
            place: "was changed in place after the batch was handed out; it is as it was after that"
            for place, tensor, version in self.versions
            if tensor._version != version
        }


class Fields(dict[str, Any]):
    """Stands for a batch of a type that was not given: items, also as attributes, and ``to`` for all tensors."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"this batch has no {name!r}, only {', '.join(self)}. For methods of its class, give the class: "
                "halfstep.doctor.replay(path, types=[...])"
            ) from None

    def to(self, *args: Any, **kwargs: Any) -> Fields:
        """The same with all tensors moved, as by ``Tensor.to``."""
        return Fields({name: tree_map_only(Tensor, lambda x: x.to(*args, **kwargs), x) for name, x in self.items()})


def encode(batch: Any) -> Encoded:
    """A batch as tensors and plain values. Copies no tensor, runs nothing of the batch's but its iteration."""
    encoded = Encoded()
    encoded.value = _Encoder(encoded).encode(batch, "batch")
    return encoded


def decode(value: Any, types: Iterable[type] = ()) -> Any:
    """The batch that was encoded; tensors on their devices, where this machine has them.

    Args:
        types: classes to make again where the batch had them: mappings from a dict, named tuples from their values,
            others without ``__init__``, by setting their attributes.
    """
    return _decode(value, {_name(cls): cls for cls in (dict, OrderedDict, PackedSequence, *types)})


class _Encoder:
    def __init__(self, into: Encoded) -> None:
        self._into = into
        self._items = 0
        self._open: set[int] = set()

    def encode(self, value: Any, place: str) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if kind in (list, tuple) and _PLAIN.issuperset(map(type, value)):  # token lists, texts: at one go
            return kind(value)
        self._items += 1
        if self._items > MOST_ITEMS:
            return self._leave_out(place, f"one of more than {MOST_ITEMS} items")
        if id(value) in self._open:
            return self._leave_out(place, f"a {kind.__name__} that contains itself")
        self._open.add(id(value))
        try:
            return self._container(value, kind, place)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any, kind: type, place: str) -> Any:
        if kind in (list, tuple):
            return kind(self._sequence(value, place))
        if kind is dict and all(type(key) in _PLAIN for key in value) and KIND not in value:
            return {key: self.encode(item, f"{place}[{key!r}]") for key, item in value.items()}
        name = _name(kind)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = [str(each) for each in value._fields]
            return {KIND: "named tuple", "type": name, "fields": fields, "values": self._sequence(value, place)}
        if isinstance(value, Mapping):
            return {KIND: "mapping", "type": name, "items": self._sequence(list(value.items()), f"{place}.items()")}
        if kind in (bytes, bytearray):
            return {KIND: "bytes", "values": bytearray(value)}
        if kind in (set, frozenset):
            return {KIND: kind.__name__, "values": self._sequence(list(value), place)}
        if kind.__module__ == "numpy":
            return self._numpy(value, kind, place)
        attributes = _attributes(value)
        if attributes is None:
            return self._leave_out(place, f"a {name}, which cannot be stored without running code to load it")
        items = {str(key): self.encode(item, f"{place}.{key}") for key, item in attributes.items()}
        return {KIND: "object", "type": name, "fields": items}

    def _sequence(self, values: Sequence[Any], place: str) -> list[Any]:
        return [self.encode(item, f"{place}[{index}]") for index, item in enumerate(values)]

    def _tensor(self, value: Tensor, place: str) -> Any:
        if hasattr(value, "to_local"):
            return self._leave_out(place, "a DTensor")
        tensor = value.detach()
        if type(value) not in (Tensor, nn.Parameter):
            tensor = tensor.as_subclass(Tensor)
        if tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            return self._leave_out(place, "a tensor that is not plain memory")
        if not value.is_inference():
            self._into.versions.append((place, tensor, tensor._version))
        if tensor.layout is torch.sparse_coo:
            parts = (tensor._indices(), tensor._values(), tensor.shape)
            return {KIND: "sparse", "parts": parts, "coalesced": tensor.is_coalesced(), "device": str(tensor.device)}
        if tensor.layout is not torch.strided:
            return self._leave_out(place, f"a {tensor.layout} tensor")
        if tensor.device.type == "cpu" and not value.requires_grad:
            return tensor
        return {KIND: "tensor", "values": tensor, "device": str(tensor.device), "requires_grad": value.requires_grad}

    def _numpy(self, value: Any, kind: type, place: str) -> Any:
        import numpy

        try:
            return {
                KIND: "array",
                "values": torch.from_numpy(numpy.array(value)),
                "is_number": kind is not numpy.ndarray,
            }
        except TypeError:  # of text, or of objects
            return self._leave_out(place, f"a NumPy array of {value.dtype}")

    def _leave_out(self, place: str, what: str) -> None:
        self._into.missing[place] = what


def _attributes(value: Any) -> dict[str, Any] | None:
    """What makes up an object; None of one that is more than its attributes."""
    if isinstance(value, type | types.FunctionType | types.ModuleType | nn.Module | Iterator):
        return None
    if dataclasses.is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if hasattr(value, each.name)}
    return dict(vars(value)) if hasattr(value, "__dict__") and vars(value) else None


def _decode(value: Any, known: Mapping[str, type]) -> Any:
    if type(value) in (list, tuple):
        return type(value)(_decode(item, known) for item in value)
    if type(value) is not dict:
        return value
    if KIND not in value:
        return {key: _decode(item, known) for key, item in value.items()}
    kind, cls = value[KIND], known.get(value.get("type", ""))
    if kind == "tensor":
        return _at_home(value["values"], value["device"]).requires_grad_(value["requires_grad"])
    if kind == "sparse":
        indices, values, shape = (_at_home(part, value["device"]) for part in value["parts"])
        return torch.sparse_coo_tensor(
            indices,
            values,
            shape,
            dtype=values.dtype,
            device=values.device,
            check_invariants=True,
            is_coalesced=value["coalesced"] or None,
        )
    if kind == "array":
        array = value["values"].numpy()
        return array[()] if value["is_number"] else array
    if kind == "bytes":
        return bytes(value["values"])
    if kind in ("set", "frozenset"):
        return (set if kind == "set" else frozenset)(_decode(item, known) for item in value["values"])
    if kind == "named tuple":
        values = [_decode(item, known) for item in value["values"]]
        return (cls or namedtuple("Batch", value["fields"]))(*values)  # which checks that they are names
    if kind == "mapping":
        items = dict(_decode(pair, known) for pair in value["items"])
        return Fields(items) if cls is None else cls(items)
    if kind == "object":
        fields = {name: _decode(item, known) for name, item in value["fields"].items()}
        if cls is None:
            return Fields(fields)
        made: Any = object.__new__(cls)
        for name, item in fields.items():
            object.__setattr__(made, name, item)
        return made
    raise ValueError(f"this batch holds a {kind!r}, which this version of halfstep does not know: update halfstep")


def _at_home(value: Any, device: str) -> Any:
    home = torch.device(device)
    return value.to(home) if isinstance(value, Tensor) and has_device(home) else value


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
