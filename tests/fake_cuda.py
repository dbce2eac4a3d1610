"""A CUDA device that is not there, and what a step asks of it: waits of the host, and what the device is given to do.

Tensors are PyTorch's fake ones on ``cuda:0``: shapes and formats are real, nothing is computed. `Counting`, a dispatch
mode above them, counts the operations that start something on the device, and those that make the host wait for it;
what it answers for the device is 0. halfstep's Triton backend runs as it is, with kernels that only count.

Autograd cannot run here: a CPU build of PyTorch aborts where it looks for the device's streams. So tests give
parameters their gradients, and count what comes after the backward pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep import engine, hardware
from halfstep.optim import backends, foreach, layout
from halfstep.optim.backends import cuda

CUDA = torch.device("cuda", 0)
#: Operations that give out memory, or look at it in another way, and start nothing.
_NO_KERNEL = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "is_same_size",
}  # fmt: skip
#: Operations whose result has a size that only the device knows.
_SIZED_BY_VALUES = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "equal"}


class Counting(TorchDispatchMode):
    """What was asked of the device, by operation; and what made the host wait, by operation and line."""

    def __init__(self) -> None:
        super().__init__()
        self.started: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "prim::device":
            return func(*args, **kwargs)
        given = [t for t in _flat((args, tuple(kwargs.values()))) if isinstance(t, Tensor)]
        on_device = any(t.device.type == "cuda" for t in given)
        if name == "_local_scalar_dense":
            return self._answer(given[0])
        if on_device and name in _SIZED_BY_VALUES:
            self._wait(name)
        if on_device and any(t.device.type == "cpu" and t.dim() for t in given) and name.startswith("index"):
            self._wait(f"{name} with places from the host")
            self.started[name] += 1
            return given[0]
        if on_device and name == "copy_" and given[0].device.type != given[1].device.type:
            self._copied(given[1].device, given[0].device, given[1].dim(), args[2:] or kwargs.get("non_blocking"))
        result = func(*args, **kwargs)
        made = [t for t in _flat((result,)) if isinstance(t, Tensor)]
        if name == "_to_copy" and given[0].device.type != made[0].device.type:
            # A number of the host's reaches the device with the launch that takes it.
            self._copied(given[0].device, made[0].device, 1, kwargs.get("non_blocking"))
        starts = made[0].device.type == "cuda" if made else on_device
        if starts and not func.is_view and name not in _NO_KERNEL:
            self.started[name] += 1
        return result

    def _copied(self, source: torch.device, destination: torch.device, dimensions: int, free: Any) -> None:
        if destination.type == "cpu" and free:
            raise AssertionError(f"{_line()}: a copy to the host that may be read before it came")
        if not free and (dimensions or destination.type == "cpu"):
            self._wait(f"a copy from {source.type}")

    def _answer(self, tensor: Tensor) -> Any:
        number = 1.0  # a count of steps
        if tensor.device.type == "cuda":
            self._wait("item")
            number = 0.0  # nothing was found
        return number if tensor.dtype.is_floating_point else tensor.dtype is not torch.bool

    def _wait(self, what: str) -> None:
        self.waits[f"{what}, {_line()}"] += 1


def _flat(values: Any) -> list[Any]:
    return [leaf for v in values for leaf in (_flat(v) if isinstance(v, list | tuple) else [v])]


def _line() -> str:
    frame: Any = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata * 16 + tensor.storage_offset() * tensor.element_size()


def _taken(tensor: Tensor, place: Any) -> Tensor:
    """``tensor[place]`` along the first dimension."""
    if isinstance(place, int):
        return tensor.select(0, place)
    return torch.ops.aten.slice(tensor, 0, place.start, place.stop, place.step or 1)


class _Kernel:
    """A Triton kernel that counts its launches and computes nothing."""

    def __init__(self, name: str, device: FakeCuda) -> None:
        self.name = name
        self.device = device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *arguments, **constants: self.device.note(f"triton {self.name}")


class _Stream:
    """The one stream."""

    cuda_stream = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class FakeCuda:
    """The device, inside `FakeTensorMode`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counting | None = None
        kernels = ("adam", "sgd", "lion", "prepare", "survey_chunk", "survey_gradient", "arrive", "follow")
        stub = SimpleNamespace(NUMBERS=SimpleNamespace(value=4), **{name: _Kernel(name, self) for name in kernels})
        facts = hardware.DeviceFacts("cuda", "a fake one", 80 << 30, hardware.cuda_formats((9, 0)), "9.0")
        for where, name, value in (
            (torch.cuda, "current_stream", lambda *_: _Stream()),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (torch.nn.utils.clip_grad, "_device_has_foreach_support", lambda *_: True),
            (FakeTensor, "tolist", lambda tensor: self._tolist(tensor)),
            (engine.hardware, "detect", lambda *_: facts),
            (backends, "choose", lambda *_: (cuda, "the fastest for cuda")),
            (backends, "lacking", lambda *_: ""),
            (layout, "PLAIN", (*layout.PLAIN, FakeTensor)),
            (foreach, "PLAIN", (*layout.PLAIN, FakeTensor)),
            (cuda, "_kernels", lambda: stub),
            (cuda, "_dtype", lambda dtype: dtype),
            (cuda, "_on", lambda device: contextlib.nullcontext()),
            (cuda, "_send", self._send),
        ):
            monkeypatch.setattr(where, name, value)
        for name, value in (  # PyTorch 2.13's own ask for the device first; fake memory lies nowhere
            ("__invert__", lambda tensor: torch.bitwise_not(tensor)),
            ("__getitem__", _taken),
            ("__float__", lambda tensor: float(tensor.item())),
            ("data_ptr", _address),
            ("copy_", lambda tensor, source, non_blocking=False: torch.ops.aten.copy_(tensor, source, non_blocking)),
        ):
            monkeypatch.setattr(FakeTensor, name, value, raising=False)
        monkeypatch.setattr(cuda, "_tables", type(cuda._tables)())

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counting]:
        """Within, what is asked of the device is counted."""
        with Counting() as self.count:
            yield self.count
        self.count = None

    def note(self, what: str) -> None:
        if self.count is not None:
            self.count.started[what] += 1

    def _send(self, host: Tensor, device: torch.device) -> Tensor:
        self.note("triton table")
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    def _tolist(self, tensor: Tensor) -> Any:
        assert self.count is not None
        self.count._wait("tolist")
        return [0.0] * tensor.numel()
