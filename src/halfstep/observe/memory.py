"""Memory of real steps: live tensor bytes at the peak, and the memory of this process.

`PeakMemory` counts the bytes of every live tensor storage through one training step and says what they were at the
moment when most were alive: in each kind of memory by itself, the accelerator's and the host's, because a data set on
the host fills no GPU. It sees storages that ops hand back; workspaces that a kernel allocates and frees inside itself
(oneDNN, cuDNN) are invisible at this level, so convolutions use somewhat more than it reports. On an accelerator the
allocator's own peak is recorded beside it.

The idea is the allocation log of PyTorch's memory trackers, replayed: a storage that becomes a gradient is an
anonymous result when it is made, so events are logged first and named when the step is over.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from halfstep.record import Memory
from halfstep.split import on_temporary, parts

#: Storages that were not named otherwise: saved for backward, or living for one op.
ACTIVATIONS = "activations and temporaries"
#: Tensors that were alive before the step and belong to nothing that training names, such as the data set.
OTHER = "other tensors"


class PeakMemory(TorchDispatchMode):
    """Follow live tensor bytes from `start` to `finish`, on all devices of a kind together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch lacks annotations here
        self._storages = 0
        self._number: dict[int, int] = {}  # storage address -> number, while alive
        self._bytes: list[int] = []  # by storage number
        self._device: list[str] = []  # the same; its kind
        self._events: list[tuple[int, str | None]] = []  # number + 1 when made, with its op; -(number + 1) when freed
        self._names: dict[int, str] = {}
        self._op: str | None = None

    @staticmethod
    def can_start() -> bool:
        """Whether no other dispatch mode is active: entering and leaving would not nest with it."""
        return not _get_current_dispatch_mode_stack()  # type: ignore[no-untyped-call,unused-ignore]

    def start(self) -> None:
        """Count what is alive now, and everything made from here on."""
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                # Whatever lives in the process is looked at: tensors of others that do not answer have no bytes here.
                with suppress(Exception):
                    self._see_all(item)
                    if item.is_leaf and item.grad is not None:
                        self._see(item.grad)
        for number in self._number.values():
            self._names[number] = OTHER
        on_temporary.append(self._see_all)
        self.__enter__()  # type: ignore[no-untyped-call,unused-ignore]

    def name(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors are; the first name given to a storage stays, except over `OTHER`."""
        for part in (part for tensor in tensors for part in parts(tensor)):
            number = self._see(part)
            if number is not None and self._names.get(number, OTHER) == OTHER:
                self._names[number] = category

    def finish(self, step: int) -> list[Memory]:
        """Stop counting; for each kind of device the bytes by category at the moment when most were alive there.

        Accelerators first, then the host; the host alone where nothing was anywhere else.
        """
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call,unused-ignore]
        on_temporary.remove(self._see_all)
        events, self._events = self._events, []
        kinds = sorted({"cpu", *self._device}, key=lambda kind: (kind == "cpu", kind))
        return [self._peak(step, kind, events) for kind in kinds]

    def _peak(self, step: int, kind: str, events: list[tuple[int, str | None]]) -> Memory:
        now: dict[str, int] = {}
        total = peak = 0
        at_peak: dict[str, int] = {}
        at_op: str | None = None
        for signed, op in events:
            number = abs(signed) - 1
            if self._device[number] != kind:
                continue
            size = self._bytes[number] if signed > 0 else -self._bytes[number]
            category = self._names.get(number, ACTIVATIONS)
            now[category] = now.get(category, 0) + size
            total += size
            if total > peak:
                peak, at_peak, at_op = total, dict(now), op
        return Memory(step, peak, at_op, {name: size for name, size in at_peak.items() if size}, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._op = str(func)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see_all(leaf)
        return result

    def _see_all(self, tensor: Tensor) -> None:
        for part in parts(tensor):
            self._see(part)

    def _see(self, tensor: Tensor) -> int | None:
        try:
            storage = tensor.untyped_storage()
            size = storage.nbytes()
        except RuntimeError:  # sparse and other tensors without a storage
            return None
        # Fake tensors are those of a compiler at work, meta tensors are shapes: there are no bytes behind them.
        if not isinstance(size, int) or isinstance(tensor, FakeTensor) or storage.device.type == "meta":
            return None
        key = storage._cdata
        number = self._number.get(key)
        if number is None:
            number = self._number[key] = self._storages
            self._storages += 1
            self._bytes.append(size)
            self._device.append(storage.device.type)
            self._events.append((number + 1, self._op))
            weakref.finalize(storage, self._free, key, number).atexit = False
        return number

    def _free(self, key: int, number: int) -> None:
        if self._number.pop(key, None) is not None:
            self._events.append((-(number + 1), None))


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far; the present one where the system does not keep the peak."""
    try:
        import resource
    except ImportError:  # Windows
        return resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
