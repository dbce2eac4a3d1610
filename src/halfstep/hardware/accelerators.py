"""Which accelerators PyTorch finds and what they are, without touching them in this process.

To ask PyTorch whether there is a GPU starts the driver (``torch.cuda.is_available``), and to ask for its name CUDA
itself. After the first ``CUDA_VISIBLE_DEVICES`` and allocator settings that a script makes in its first lines have no
effect, and after either a process that it forks cannot use the GPU. So as long as this process has not used the device,
another one is asked, this file as a program, and the process remembers the answer. One that has used it asks PyTorch
itself, and learns of the devices that it sees.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: Kinds of devices whose drivers have to be started to ask.
KINDS = ("cuda", "xpu")
#: Seconds for the other process: a server's drivers take some until they have all their GPUs.
_PATIENCE = 120
#: What decides which devices a process sees.
_VISIBILITY = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)


@dataclass(frozen=True)
class Accelerator:
    """One device, in PyTorch's own words."""

    name: str
    memory_bytes: int
    architecture: str  #: CUDA's compute capability, as ``9.0``; ROCm's name for it, as ``gfx942``; else empty
    bf16: bool  #: PyTorch's own answer to whether it computes in BF16 without emulation


def accelerators(kind: str) -> tuple[Accelerator, ...]:
    """The devices of a kind that this process sees, in PyTorch's order; none where there are none.

    Args:
        kind: "cuda" or "xpu".
    """
    if not _can_be_there(kind):
        return ()
    if getattr(torch, kind).is_initialized():
        return _asked_here(kind)
    return _asked_apart(kind, tuple(os.environ.get(name) for name in _VISIBILITY))


def current_index(kind: str) -> int:
    """The device that PyTorch takes where none is named; 0 as long as this process has not used any."""
    module = getattr(torch, kind)
    return int(module.current_device()) if module.is_initialized() else 0


def _can_be_there(kind: str) -> bool:
    """Whether it is worth asking: most machines without a GPU are known by their build of PyTorch, or lack a driver."""
    if kind == "xpu":
        return bool(getattr(torch._C, "_has_xpu", False))
    if torch.version.hip is not None:
        return True
    if torch.version.cuda is None:
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@functools.cache
def _asked_apart(kind: str, visibility: tuple[str | None, ...]) -> tuple[Accelerator, ...]:
    """What another process finds; asked here where none can be had."""
    command = [sys.executable, "-P", __file__, kind]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=True, stdin=subprocess.DEVNULL
        )
        return tuple(Accelerator(**values) for values in json.loads(run.stdout.splitlines()[-1]))
    except (OSError, ValueError, TypeError, IndexError, subprocess.SubprocessError):
        return _asked_here(kind)


def _asked_here(kind: str) -> tuple[Accelerator, ...]:
    module = getattr(torch, kind)
    if not module.is_available():
        return ()
    return tuple(_accelerator(module.get_device_properties(index)) for index in range(module.device_count()))


def _accelerator(properties: Any) -> Accelerator:
    if not hasattr(properties, "major"):  # an Intel GPU
        bf16 = bool(torch.xpu.is_bf16_supported(including_emulation=False))
        return Accelerator(properties.name, properties.total_memory, "", bf16)
    if torch.version.hip is not None:
        bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return Accelerator(properties.name, properties.total_memory, properties.gcnArchName, bf16)
    capability = f"{properties.major}.{properties.minor}"
    return Accelerator(properties.name, properties.total_memory, capability, properties.major >= 8)


if __name__ == "__main__":
    print(json.dumps([asdict(accelerator) for accelerator in _asked_here(sys.argv[1])]))
