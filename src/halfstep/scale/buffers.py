"""Buffers that forward passes write to, put back when a step is not taken.

They complete "a skipped step leaves the model as it was": running statistics, moving averages, the vectors of a
spectral norm, and whatever else a module registers, are written by the *forward* pass, before anybody knows that the
step will be skipped. One overflow would leave NaN in them for good::

    keep(root)              before a forward pass: what the buffers below it are
    wrote(root)             after it
    before_backward(loss)   which of the forward passes the loss was made from
    after_backward()        (recomputation writes them again)
    claim(optimizer)        a step: the forward passes that it is of
    put_back(entries)       that step is not taken

**Whose is a forward pass?** A generator's step runs the discriminator too, and must not undo what the discriminator's
own step has kept. Each module call is a span of autograd's sequence numbers; the graph of a loss says which spans, and
which leaves, it has come from. The graph is walked only where several models or optimizers are about.

**What changed since, by others, stays.** Versions and identities are noted after each forward pass. A buffer that has
others when the next pass begins, or when a step is skipped, was loaded or set meanwhile, and is left alone.

**How it is written.** Batch normalisation does not count its writes to running statistics (autograd's versions stay),
for no backward pass reads what they were; so they are put back uncounted too, and a graph that waits for its backward
pass goes on to work. Counted writes are undone by counted ones: a graph that needs the number fails, as it must.

**Cost.** A model without buffers is walked, and that is all. Copied are buffers up to `SMALL` elements and those of
normalisation layers; of larger ones, once, then only those whose version was seen to move in a forward pass. One that
is written for the first time later, in a step that is skipped, cannot be put back: a warning names it.
"""

from __future__ import annotations

import warnings
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from halfstep.scale.graph import leaf_of, nodes
from halfstep.transfer import moved

#: Buffers of so many elements are copied whether they are written or not.
SMALL = 16_384


class BufferNotPutBackWarning(UserWarning):
    """A step was not taken, and a buffer that its forward pass wrote has no copy."""


@dataclass(eq=False, slots=True)
class _Place:
    """A module's buffer: what it was before the first forward pass of a step, and after the last one."""

    module: weakref.ref[nn.Module]
    name: str
    buffer: Tensor | None
    version: int
    value: Tensor | None = None  #: a copy of what it held, if one was made
    after: Tensor | None = None
    after_version: int = -1
    earlier: _Place | None = None  #: the same, of an earlier step that may yet be undone: no one else wrote between
    is_put_back: bool = False  #: or about to be: whatever is there then is ours

    def see(self, now: Tensor | None) -> None:
        self.after, self.after_version = now, _version(now)
        if self.earlier is not None:
            self.earlier.see(now)

    def is_as_seen(self, now: Tensor | None) -> bool:
        return now is self.after and _version(now) == self.after_version


@dataclass(eq=False)
class Entry:
    """The forward passes of one model since the last step that was of them."""

    root: weakref.ref[nn.Module]
    places: dict[tuple[int, str], _Place] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)  #: sequence numbers at the start of calls under way
    spans: list[tuple[int, int]] = field(default_factory=list)  #: of sequence numbers, one for each call
    reaches: set[int] | None = (
        None  #: leaves (their ids) of the losses that were made from it; None: no graph was walked
    )
    is_closed: bool = False  #: a step was of it: the next forward pass begins another one
    is_over: bool = False  #: that step was made, or undone


class KeptBuffers:
    """What forward passes wrote since the last steps, and what was there before."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._was_written = WeakIdKeyDictionary()  # of large buffers, whether a forward pass was seen to write them
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def keep(self, root: nn.Module) -> None:
        """A forward pass of ``root`` begins: remember its buffers, unless they are since the last step already."""
        found = _buffers(root)
        entry = self._open(root)
        earlier: dict[tuple[int, str], _Place] = {}
        if entry is None:
            if not found:
                return
            closed = [each for each in self._entries if each.is_closed and each.root() is root]
            self._entries = [each for each in self._entries if each not in closed]
            earlier = closed[-1].places if closed and not closed[-1].is_over else {}
            entry = Entry(weakref.ref(root))
            self._entries.append(entry)
        fresh: list[_Place] = []
        places: dict[tuple[int, str], _Place] = {}
        for module, name, buffer in found:
            key = (id(module), name)
            place = entry.places.get(key)
            if place is None or place.module() is not module or not place.is_as_seen(buffer):
                place = _Place(weakref.ref(module), name, buffer, _version(buffer))
                if buffer is not None and self._is_copied(module, buffer):
                    fresh.append(place)
                before = earlier.get(key)
                if before is not None and before.is_as_seen(buffer):
                    place.earlier = before
            place.see(buffer)
            places[key] = place
        entry.places = places
        _copy(fresh)
        entry.started.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]

    def wrote(self, root: nn.Module) -> None:
        """That forward pass has ended."""
        entry = self._open(root)
        if entry is None or not entry.started:
            return
        entry.spans.append((entry.started.pop(), torch.autograd._get_sequence_nr()))  # type: ignore[attr-defined]
        for place, now in _now(entry):
            place.see(now)
            buffer = place.buffer
            if buffer is None or buffer.numel() <= SMALL:
                continue
            if _version(buffer) != place.version:
                self._was_written[buffer] = True
            elif buffer not in self._was_written:
                self._was_written[buffer] = False
                if not isinstance(place.module(), nn.modules.batchnorm._NormBase):
                    place.value = None

    def before_backward(self, losses: Iterable[Tensor]) -> None:
        """A backward pass of these losses begins."""
        for entry in self._entries:
            for place, now in _now(entry):
                if not place.is_as_seen(now):  # loaded since
                    del entry.places[id(place.module()), place.name]
        if len(self._entries) <= 1 and len(self._optimizers) <= 1:
            return
        numbers: list[int] = []
        leaves: set[int] = set()
        for node in nodes(losses):
            leaf = leaf_of(node)
            if leaf is None:
                numbers.append(node._sequence_nr())
            else:
                leaves.add(id(leaf))
        numbers.sort()
        for entry in self._entries:
            if any(bisect_left(numbers, start) < bisect_left(numbers, end) for start, end in entry.spans):
                entry.reaches = leaves | (entry.reaches or set())

    def after_backward(self) -> None:
        """It has ended: recomputed forward passes wrote to buffers again."""
        for entry in self._entries:
            for place, now in _now(entry):
                place.see(now)

    def claim(self, optimizer: Optimizer) -> list[Entry]:
        """The forward passes that a step of ``optimizer`` is of, oldest first; to be put back, or forgotten."""
        if not self._entries:
            return []
        self._optimizers.add(optimizer)
        alone = len(self._entries) == 1 and len(self._optimizers) == 1
        stepped = set() if alone else {id(p) for group in optimizer.param_groups for p in group["params"]}
        claimed = [entry for entry in self._entries if alone or _is_of(entry, stepped)]
        for entry in claimed:
            entry.is_closed = True
        return claimed

    @torch.no_grad()
    def put_back(self, entries: Sequence[Entry], where: Tensor | None = None) -> None:
        """Undo what these forward passes wrote. May be called again, should it be interrupted.

        Args:
            where: 1 element; nothing is put back unless it is above 0. The host need not know which, unless a buffer
                was
                replaced by another tensor.
        """
        conditions: dict[torch.device, Tensor] = {}
        lost: list[str] = []
        for entry in reversed(entries):
            for place, now in _now(entry):
                before = place.buffer
                if not place.is_put_back and not place.is_as_seen(now):  # loaded since
                    continue
                place.is_put_back = True
                if now is not before:
                    if where is None or bool(moved(where, torch.device("cpu")) > 0):
                        if before is not None and place.value is not None and _version(before) != place.version:
                            before.copy_(place.value)
                        module = place.module()
                        assert module is not None
                        module._buffers[place.name] = before
                        if place.earlier is not None:
                            place.earlier.see(before)
                    continue
                if now is None:
                    continue
                if place.value is None:
                    if _version(now) != place.version:
                        lost.append(f"{place.name!r} of {type(place.module()).__name__} {tuple(now.shape)}")
                    continue
                value = place.value
                if where is not None:
                    if now.device not in conditions:
                        conditions[now.device] = moved(where, now.device) > 0
                    value = torch.where(conditions[now.device], value, now)
                # `.data` has a version counter of its own.
                (now if _version(now) != place.version else now.data).copy_(value)
                if place.earlier is not None:
                    place.earlier.see(now)
        if lost and where is None:
            warnings.warn(
                f"a step was not taken, and {len(lost)} large buffers that its forward pass wrote for the first time "
                f"cannot be put back (first: {lost[0]}). From now on they are copied before each step",
                BufferNotPutBackWarning,
                stacklevel=2,
            )

    def are_kept(self) -> bool:
        """Whether there is any."""
        return bool(self._entries)

    def settle(self, entries: Sequence[Entry]) -> None:
        """A step was made: what these forward passes wrote stays, unless another optimizer's, of the same, is not."""
        for entry in entries:
            entry.is_over = True

    def forget(self, entries: Sequence[Entry]) -> None:
        """What these forward passes wrote stays, or was put back."""
        if entries:
            self.settle(entries)
            self._entries = [entry for entry in self._entries if entry not in entries]

    def _open(self, root: nn.Module) -> Entry | None:
        return next((e for e in self._entries if not e.is_closed and e.root() is root), None)

    def _is_copied(self, module: nn.Module, buffer: Tensor) -> bool:
        if buffer.is_meta or nn.parameter.is_lazy(buffer):
            return False
        strides = buffer.stride() if buffer.layout is torch.strided and not buffer.is_contiguous() else ()
        if any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, strides, strict=False)):
            return False  # expanded: nobody can write to it
        if buffer.numel() <= SMALL or isinstance(module, nn.modules.batchnorm._NormBase) or buffer.is_inference():
            return True
        return buffer not in self._was_written or bool(self._was_written[buffer])


def _is_of(entry: Entry, stepped: set[int]) -> bool:
    if entry.reaches is not None and not entry.reaches.isdisjoint(stepped):
        return True
    root = entry.root()
    return root is not None and any(id(parameter) in stepped for parameter in root.parameters())


def _buffers(root: nn.Module) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Every buffer below ``root``, once, that has values. Written for speed: it is asked for at each forward pass."""
    found: list[tuple[nn.Module, str, Tensor | None]] = []
    waiting, seen, buffers = [root], {root}, set[int]()
    while waiting:
        module = waiting.pop()
        for name, buffer in module._buffers.items():
            if buffer is None or (id(buffer) not in buffers and not is_lazy(buffer)):
                found.append((module, name, buffer))
                buffers.add(id(buffer))
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _now(entry: Entry) -> list[tuple[_Place, Tensor | None]]:
    """The places of modules that exist, with what is there now."""
    found = []
    for place in entry.places.values():
        module = place.module()
        if module is not None:
            found.append((place, module._buffers.get(place.name)))
    return found


def _version(buffer: Tensor | None) -> int:
    return -1 if buffer is None or buffer.is_inference() else buffer._version


@torch.no_grad()
def _copy(places: list[_Place]) -> None:
    """Copy the buffers, those alike in one kernel."""
    alike: dict[tuple[torch.device, torch.dtype], list[_Place]] = {}
    for place in places:
        buffer = place.buffer
        assert buffer is not None
        if type(buffer) is Tensor and buffer.layout is torch.strided and not buffer.is_inference():
            alike.setdefault((buffer.device, buffer.dtype), []).append(place)
        else:
            place.value = buffer.detach().clone()
    for together in alike.values():
        sources = [place.buffer for place in together if place.buffer is not None]
        copies = [torch.empty_like(source) for source in sources]
        torch._foreach_copy_(copies, sources)
        for place, copy in zip(together, copies, strict=True):
            place.value = copy
