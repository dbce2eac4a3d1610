"""The FP32 shadow: what every tensor would hold had nothing been rounded to 16 bits.

A shadow belongs to a *storage*, element for element::

    storage of a bf16 tensor   b0 b1 b2 b3 …        (the run's)
    its shadow                 f0 f1 f2 f3 …        (float32, as many elements)

so that the shadow of any view is the same view of the shadow, and writing through one view is seen by all others, as in
the run. A storage without a shadow is its own: nothing before it was rounded. Shadows end with their storages.

An op is shadowed by running it again on the shadows of its inputs. Ops that draw random numbers are not: their outputs
are taken as they are. What an op writes into gets a shadow of its own before it runs, never the tensor itself: an op
would be applied to that twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from halfstep.doctor.event import LOW_PRECISION
from halfstep.observe.place import Place
from halfstep.split import parts

_WIDE = (torch.float32, torch.float64)

#: Ops that write into arguments which their schema does not mark: running statistics.
_WRITES_UNMARKED = {
    "native_batch_norm": ("running_mean", "running_var"),
    "cudnn_batch_norm": ("running_mean", "running_var"),
    "miopen_batch_norm": ("running_mean", "running_var"),
    "_batch_norm_impl_index": ("running_mean", "running_var"),
}

#: Ops that are not run a second time: they crash the process on mixed arguments (a bf16 LSTM through oneDNN), wait for
#: other processes, or would ask the host.
_NEVER_TWICE = ("mkldnn_rnn_layer", "_cudnn_rnn", "_thnn_fused", "_local_scalar_dense", "_amp_")
_NEVER_TWICE_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "profiler", "prim")


@dataclass
class Entry:
    """What is known of one storage."""

    dtype: torch.dtype  #: of the tensors on it
    shadow: Tensor | None = None  #: float32, flat, one element per element of the storage
    made_by: Place | None = None
    marks: set[int] = field(default_factory=set)  #: of suspicions whose effect is in it


class Shadows:
    """Shadows and marks of storages, for as long as those live."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def entry(self, tensor: Tensor) -> Entry | None:
        """What is known of a tensor's storage; None for one never seen."""
        key = storage_key(tensor)
        return None if key is None else self._entries.get(key)

    def get(self, tensor: Tensor) -> Tensor | None:
        """The shadow of a tensor: float32, of its shape; None where it would be the tensor itself."""
        entry = self.entry(tensor)
        if entry is None or entry.shadow is None or entry.dtype != tensor.dtype:
            return None
        return entry.shadow.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def made(self, tensor: Tensor, by: Place | None) -> Entry | None:
        """Note the op that made a tensor; its entry, or None where it has no storage of its own kind."""
        key = storage_key(tensor)
        if key is None:
            return None
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(tensor.dtype)
            weakref.finalize(parts(tensor)[0].untyped_storage(), self._entries.pop, key, None).atexit = False
        entry.made_by = by
        return entry

    def put(self, tensor: Tensor, shadow: Tensor) -> None:
        """Give a tensor's storage a shadow that holds ``shadow`` where the tensor lies."""
        entry = self.made(tensor, None if (known := self.entry(tensor)) is None else known.made_by)
        if entry is None:
            return
        entry.dtype = tensor.dtype
        elements = elements_of(tensor)
        fits = shadow.stride() == tensor.stride() and tensor.storage_offset() == 0 and shadow.storage_offset() == 0
        own = shadow.untyped_storage().nbytes() == 4 * elements and shadow.dtype is torch.float32
        if fits and own and shadow.size() == tensor.size():
            entry.shadow = shadow.as_strided((elements,), (1,))
            return
        if elements == tensor.numel():
            flat = torch.empty(elements, dtype=torch.float32, device=tensor.device)
        else:  # the rest of the storage keeps its values
            flat = _flat(tensor, elements).float()
        flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(shadow)
        entry.shadow = flat

    def start(self, tensor: Tensor) -> Tensor | None:
        """The shadow of a tensor that is about to be written into: a copy of what its storage holds, if it has none."""
        shadow = self.get(tensor)
        if shadow is not None or not tensor.is_floating_point():
            return shadow
        entry = self.entry(tensor) or self.made(tensor, None)
        if entry is None:
            return None
        elements = elements_of(tensor)
        entry.dtype = tensor.dtype
        entry.shadow = _flat(tensor, elements).to(torch.float32, copy=True)
        return self.get(tensor)

    def forget(self, tensor: Tensor) -> None:
        """Take the tensor's own value as its shadow from here on."""
        entry = self.entry(tensor)
        if entry is not None:
            entry.shadow = None


def elements_of(tensor: Tensor) -> int:
    """How many elements the tensor's storage has."""
    part = parts(tensor)[0]
    return part.untyped_storage().nbytes() // part.element_size()


def _flat(tensor: Tensor, elements: int) -> Tensor:
    return tensor.detach().as_strided((elements,), (1,), 0)


def storage_key(tensor: Tensor) -> int | None:
    """What tells a tensor's storage from others while it lives; None where it has none."""
    try:
        return int(parts(tensor)[0].untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
        return None


# ------------------------------------------------------------------ running an op again


def can_follow(func: Any, namespace: str, name: str) -> bool:
    """Whether an op may run a second time, on shadows."""
    if namespace in _NEVER_TWICE_NAMESPACES or name.startswith(_NEVER_TWICE):
        return False
    return torch.Tag.nondeterministic_seeded not in func.tags


def written(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an op writes into, each once."""
    unmarked = _WRITES_UNMARKED.get(name, ())
    seen: set[int] = set()
    for argument, value in named(func, args, kwargs):
        marked = argument.alias_info is not None and argument.alias_info.is_write
        if marked or argument.name in unmarked:
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor) and id(item) not in seen:
                    seen.add(id(item))
                    yield item


def named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Arguments of the op's schema with the values given for them."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]
        elif position < len(args) and not argument.kwarg_only:
            yield argument, args[position]


def again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], replace: Callable[[Tensor], Tensor]) -> Any:
    """Run an op in float32: tensors by ``replace``, 16-bit dtypes among the arguments as float32."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return replace(value) if value.is_floating_point() else value
        return torch.float32 if isinstance(value, torch.dtype) and value in LOW_PRECISION else value

    given = dict(tree_map(wide, kwargs))
    positional = [tree_map(wide, value) for value in args]
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "half_to_float":  # of softmax: refuses a float32 input
            if position < len(positional):
                positional[position] = False
            elif "half_to_float" in given:
                given["half_to_float"] = False
    return func(*positional, **given)


def widened(tensor: Tensor) -> Tensor:
    """A floating tensor as float32 arithmetic takes it: 16 bits widened, others as they are."""
    return tensor if tensor.dtype in _WIDE else tensor.to(torch.float32)
