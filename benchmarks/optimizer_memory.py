"""The memory that an optimizer's training keeps, for ``benchmarks/optimizers.py``: counted, and seen by the system.

A row of `optimizer_rows` trains for two steps in this process, which does nothing else. Its backward pass makes the
gradients one layer after the other, as in a real network, so that an optimizer that frees each gradient as soon as it
is there can do so. Then the storages of all living tensors are counted, whatever object holds them: that is exact, and
the same on every machine. What is no tensor escapes it; therefore the growth of the resident set and of its peak stand
beside it (on a GPU: of the memory that PyTorch's allocator has given out).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from optimizer_rows import Parameters, Step, parameters_of, refusal, rows
from torch import Tensor

GRADIENT = 1e-3


def measure_memory(name: str, size: str, device: str) -> dict[str, Any]:
    """Bytes for each parameter after two steps: weights, master and state, gradients."""
    torch.set_num_threads(1)
    row = next(row for row in rows(device) if row.name == name)
    try:  # on a small model first: what is imported, compiled and cached by the way is not counted
        small = parameters_of("smoke", row.dtype, device)
        train(small, row.start(small))
        del small
        before = live_storages(device)
        start = resident(device)
        has_peak = restart_peak(device)
        parameters = parameters_of(size, row.dtype, device)
        step = row.start(parameters)
        train(parameters, step)
    except Exception as error:  # whatever a package raises is this row's result
        return {"unavailable": refusal(error)}
    gradients = [p.grad for p in parameters if p.grad is not None]  # holds their Python objects, so that they are found
    live = {address: count for address, count in live_storages(device).items() if address not in before}
    weights = sum(live[p.untyped_storage().data_ptr()] for p in parameters)
    of_gradients = sum(live[g.untyped_storage().data_ptr()] for g in gradients)
    found = {
        "weights": weights,
        "master_and_state": sum(live.values()) - weights - of_gradients,
        "gradients": of_gradients,
        "total": sum(live.values()),
        "resident": resident(device) - start,
    }
    if has_peak:
        found["peak_resident"] = peak(device) - start
    count = sum(p.numel() for p in parameters)
    return {key: round(value / count, 3) for key, value in found.items()}


class Layer(torch.autograd.Function):
    """Stands for a layer: its backward makes the gradient of its parameter, and passes on to the layer before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.full_like(ctx.parameter, GRADIENT)


def train(parameters: Parameters, step: Step) -> None:
    """Two steps with their backward passes; the gradients of the second, where there are any, stay."""
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        y: Any = torch.zeros((), device=parameters[0].device, requires_grad=True)
        for parameter in parameters:
            y = Layer.apply(y, parameter)  # type: ignore[no-untyped-call]
        y.backward()
        step()


def live_storages(device: str) -> dict[int, int]:
    """Address and bytes of the storage of every tensor on this device that is alive in this process."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            # A wrapper without a storage of its own raises or has none: the tensors inside it are seen too.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                storage = thing.untyped_storage()
                if storage.device.type == device:
                    found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def resident(device: str) -> int:
    """Bytes in use, as the system sees it; on a GPU, as PyTorch's allocator does."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    # Of what is freed, malloc keeps some for later; only glibc has a way to give it back.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


def restart_peak(device: str) -> bool:
    """Let the peak begin anew; False where the system cannot."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(device: str) -> int:
    """The most bytes in use since `restart_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
