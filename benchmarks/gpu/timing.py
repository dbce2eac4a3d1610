"""How long a step takes, and what it does meanwhile: waits for the device, launches, copies.

Times on a GPU lie between events that the device itself records, so they hold what the device computes and what the
host makes it wait for, and nothing of the host's clock. On a CPU they are the clock's.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of steps: median, quartiles, and how many were measured."""

    median: float
    low: float
    high: float
    steps: int

    def values(self) -> dict[str, Any]:
        return {
            "ms": round(self.median, 4),
            "quartiles": [round(self.low, 4), round(self.high, 4)],
            "steps": self.steps,
        }


def times(device: str, step: Step, warm: int, steps: int, most_seconds: float = math.inf) -> Times:
    """Run ``step`` ``warm`` times and then up to ``steps`` times; at least twice, even if that is over the time."""
    for _ in range(warm):
        step()
    synchronize(device)
    measured = (_by_events if device == "cuda" else _by_clock)(step, steps, most_seconds)
    low, median, high = statistics.quantiles(measured, n=4, method="inclusive") if len(measured) > 1 else measured * 3
    return Times(median, low, high, len(measured))


def _by_events(step: Step, steps: int, most_seconds: float) -> list[float]:
    began = time.monotonic()
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    while len(events) <= steps and (len(events) < 3 or time.monotonic() - began < most_seconds):
        step()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        events[-2].synchronize()  # the clock has to see the device; one step is always in its hands
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _by_clock(step: Step, steps: int, most_seconds: float) -> list[float]:
    began = time.monotonic()
    measured: list[float] = []
    while len(measured) < steps and (len(measured) < 2 or time.monotonic() - began < most_seconds):
        start = time.perf_counter()
        step()
        measured.append(1e3 * (time.perf_counter() - start))
    return measured


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- waits ------------------------------------------------------------------------------------------------------------


def waits(device: str, step: Step) -> dict[str, int]:
    """Where one step makes the host wait for the device: how often, by the line that does.

    On a GPU PyTorch itself says so; on a CPU the operations that would wait are counted.
    """
    if device != "cuda":
        with _WouldWait() as seen:
            step()
        return dict(seen.lines)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return dict(Counter(f"{_short(warning.filename)}:{warning.lineno}" for warning in found))


class _WouldWait(TorchDispatchMode):
    """Counts what would wait for a device, on a machine without one."""

    OPS = frozenset(
        f"aten::{op}" for op in ("_local_scalar_dense", "equal", "nonzero", "_unique2", "masked_select", "bincount")
    )

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.OPS:
            self.lines[_line_outside_torch()] += 1
        return func(*args, **(kwargs or {}))


def _line_outside_torch() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return "?" if frame is None else f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(filename: str) -> str:
    parts = Path(filename).parts
    root = next((name for name in ("halfstep", "torch") if name in parts[:-1]), None)
    return filename.rpartition("/")[2] if root is None else "/".join(parts[parts.index(root) :])


# --- launches ---------------------------------------------------------------------------------------------------------


def profiled(device: str, step: Step) -> dict[str, Any]:
    """Launches, waits, copies and device time of one step, by PyTorch's profiler."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler, record_function("the step"):
        step()
        synchronize(device)
    events = profiler.events() or []
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    whole = next((event.time_range for event in on_host if event.name == "the step"), None)
    if whole is None:
        return {}
    host = Counter(event.name for event in on_host if whole.start <= event.time_range.start <= whole.end)
    values: dict[str, Any] = {"host_ops": _count(host, r"aten::")}
    if not cuda:
        return values
    # Ranges that the host named stand on the device too, around their kernels: their names are not a kernel's.
    named = {event.name for event in on_host}
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and event.name not in named]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    return values | {
        "launches": _count(host, r"cu(da)?Launch(Cooperative)?Kernel"),
        "waits": max(0, _count(host, r"\w*Synchronize") - 1),  # ours at the end
        "copies_to_host": sum(event.name.startswith("Memcpy DtoH") for event in on_device),
        "copies_to_device": sum(event.name.startswith("Memcpy HtoD") for event in on_device),
        "kernels": len(kernels),
        "kernel_ms": round(_milliseconds(kernels), 3),
    }


def _count(names: Counter[str], pattern: str) -> int:
    return sum(number for name, number in names.items() if re.match(pattern, name))


def _milliseconds(events: Sequence[Any]) -> float:
    return float(sum(event.time_range.end - event.time_range.start for event in events)) / 1e3
