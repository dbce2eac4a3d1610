"""Device facts: which number formats this machine computes in, and how well.

A format is *native* where the hardware multiplies matrices in it, *emulated* where PyTorch gives right results by
converting around wider arithmetic, *slow* where it works but no faster than FP32, and *missing* where PyTorch
refuses. Facts come from PyTorch's own queries and from the compute capability; on a CPU, whose features promise less
than they seem to, products are timed once (`halfstep.hardware.rates`) and the measurement decides. Nothing is guessed:
what cannot be known is said to be unknown.

Sources: NVIDIA's tensor cores multiply FP16 from compute capability 7.0, BF16 and TF32 from 8.0, FP8 from 8.9
(CUDA C++ programming guide, arithmetic instructions). ``torch.cuda.is_bf16_supported()`` also answers True for
emulation, so the capability is asked instead. Among x86 CPUs AVX512_BF16 and AMX_BF16 multiply BF16 faster than FP32;
with AVX512_FP16 FP16 runs at FP32's rate, without it and AMX_FP16 about 40 times slower.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from halfstep.hardware.accelerators import Accelerator, accelerators, current_index
from halfstep.hardware.rates import Rates, product_rates
from halfstep.version import __version__

DeviceType = Literal["cpu", "cuda", "mps", "xpu"]
Support = Literal["native", "emulated", "slow", "missing", "unknown"]
DEVICE_TYPES: tuple[DeviceType, ...] = ("cpu", "cuda", "mps", "xpu")

FP16_TENSOR_CORES = (7, 0)
BF16_TENSOR_CORES = (8, 0)
FP8_TENSOR_CORES = (8, 9)


class DeviceUnavailableError(RuntimeError):
    """The device asked for does not exist here; the message says what does."""


@dataclass(frozen=True)
class FormatSupport:
    """How a device computes in one format, and how that is known."""

    support: Support
    because: str


@dataclass(frozen=True)
class DeviceFacts:
    """One device and its formats."""

    type: DeviceType
    name: str
    memory_bytes: int
    formats: Mapping[str, FormatSupport]  #: by format name: fp32, tf32, bf16, fp16, fp8
    detail: str  #: compute capability or the CPU features that matter


def detect(device: str | torch.device | None = None) -> DeviceFacts:
    """Facts of one device of this machine. Never starts CUDA in a process that has not used it.

    Args:
        device: "cpu", "cuda", "mps" or "xpu", and for one of several GPUs its index, as in "cuda:1"; without one, the
            device that PyTorch would take. None takes the first accelerator present, else the CPU.

    Raises:
        DeviceUnavailableError: no such device on this machine, or PyTorch was built without it.
    """
    if device is None:
        device = next(t for t in ("cuda", "xpu", "mps", "cpu") if _is_available(t))
    kind, _, index = str(device).partition(":")
    if kind not in DEVICE_TYPES or not (index.isdigit() or not index):
        raise DeviceUnavailableError(f"unknown device {str(device)!r}; known: {', '.join(DEVICE_TYPES)}")
    if not _is_available(kind):
        present = ", ".join(t for t in DEVICE_TYPES if _is_available(t))
        raise DeviceUnavailableError(f"no {kind} device: {_absence(kind)}; this machine has: {present}")
    if kind == "cpu":
        return _cpu()
    if kind == "mps":
        return _mps()
    found = accelerators(kind)
    number = int(index) if index else current_index(kind)
    if number >= len(found):
        raise DeviceUnavailableError(f"no device {device}: PyTorch finds {len(found)} of this type")
    return _cuda(found[number]) if kind == "cuda" else _xpu(found[number])


def environment(facts: DeviceFacts) -> dict[str, Any]:
    """What a run record keeps of machine and versions (JSON values; no names of people, hosts or folders)."""
    import numpy

    return {
        "halfstep": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device_type": facts.type,
        "device": facts.name,
        "device_detail": facts.detail,
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cpu_count": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    return str(_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def cpu_flags() -> list[str]:
    """The CPU features that decide which formats are native, as PyTorch names them."""
    wanted = (
        "avx2",
        "avx512_f",
        "avx512_bf16",
        "avx512_fp16",
        "amx_bf16",
        "amx_fp16",
        "neon",
        "bf16",
        "sve",
        "sve2",
    )
    return [name for name in wanted if _capabilities().get(name) is True]


def cuda_formats(capability: tuple[int, int]) -> dict[str, FormatSupport]:
    """Formats of an NVIDIA GPU of a compute capability, e.g. ``(7, 5)``."""
    major, minor = capability
    known = f"compute capability {major}.{minor}"

    def since(first: tuple[int, int], otherwise: Support) -> FormatSupport:
        needs = f"tensor cores for it start at {first[0]}.{first[1]}"
        return FormatSupport("native" if capability >= first else otherwise, f"{known}; {needs}")

    return {
        "fp32": FormatSupport("native", known),
        "tf32": since(BF16_TENSOR_CORES, "missing"),
        "bf16": since(BF16_TENSOR_CORES, "emulated"),
        "fp16": since(FP16_TENSOR_CORES, "slow"),
        "fp8": since(FP8_TENSOR_CORES, "missing"),
    }


#: How much faster than FP32's a format's products must be to count as native: below it, the casts eat what is won.
NATIVE_FROM = 1.25


def cpu_formats(capabilities: Mapping[str, Any], rates: Rates) -> dict[str, FormatSupport]:
    """Formats of a CPU.

    Args:
        capabilities: its features as ``torch.cpu.get_capabilities()`` names them.
        rates: the speed of its 16-bit products as multiples of FP32's, which decides.
    """
    return {
        "fp32": FormatSupport("native", "every CPU"),
        "tf32": FormatSupport("missing", "TF32 is a format of GPUs"),
        "bf16": _judged(rates["bf16"], capabilities, ("amx_bf16", "avx512_bf16", "bf16")),
        "fp16": _judged(rates["fp16"], capabilities, ("amx_fp16", "avx512_fp16")),
        "fp8": FormatSupport("missing", "no FP8 products on CPUs"),
    }


def _judged(rate: float | None, capabilities: Mapping[str, Any], features: tuple[str, ...]) -> FormatSupport:
    """What to think of a format that is multiplied by these features, the best first."""
    feature = next((name for name in features if capabilities.get(name)), None)
    lacking = "neither " + " nor ".join(name.upper() for name in features[:2])
    if rate is None:
        return FormatSupport("missing", "PyTorch has no products of it here")
    measured = f"products at {_times(rate)} the rate of fp32's, measured"
    if rate >= NATIVE_FROM:
        return FormatSupport("native", f"{feature}: {measured}" if feature else measured)
    return FormatSupport("slow" if feature or rate < 0.1 else "emulated", f"{feature or lacking}: {measured}")


def _times(rate: float) -> str:
    return f"{rate:.1f} ×" if rate >= 0.95 else f"{rate:.2g} ×"


def _cpu() -> DeviceFacts:
    flags = cpu_flags()
    return DeviceFacts(
        type="cpu",
        name=cpu_name(),
        memory_bytes=psutil.virtual_memory().total,
        formats=cpu_formats(_capabilities(), product_rates()),
        detail=", ".join(flags) if flags else "no AVX or NEON features reported",
    )


def _cuda(device: Accelerator) -> DeviceFacts:
    if torch.version.hip:
        known = FormatSupport("native", f"PyTorch's own answer for ROCm ({device.architecture})")
        unknown = FormatSupport("unknown", "not known for ROCm devices")
        formats = {
            "fp32": known,
            "tf32": unknown,
            "bf16": known if device.bf16 else unknown,
            "fp16": known,
            "fp8": unknown,
        }
        detail = f"ROCm {torch.version.hip}"
    else:
        major, minor = device.architecture.split(".")
        formats = cuda_formats((int(major), int(minor)))
        detail = f"compute capability {device.architecture}, CUDA {torch.version.cuda}"
    return DeviceFacts("cuda", device.name, device.memory_bytes, formats, detail)


def _mps() -> DeviceFacts:
    unmeasured = FormatSupport("unknown", "PyTorch runs it on Apple GPUs; halfstep has not measured it")
    missing = FormatSupport("missing", "not on Apple GPUs")
    formats = {
        "fp32": FormatSupport("native", "Apple GPU"),
        "tf32": missing,
        "bf16": unmeasured if torch.backends.mps.is_macos_or_newer(14, 0) else missing,
        "fp16": unmeasured,
        "fp8": missing,
    }
    return DeviceFacts("mps", cpu_name(), psutil.virtual_memory().total, formats, f"macOS {platform.mac_ver()[0]}")


def _xpu(device: Accelerator) -> DeviceFacts:
    native = FormatSupport("native", "PyTorch's own answer for this Intel GPU; halfstep has not measured it")
    unknown = FormatSupport("unknown", "not known for Intel GPUs")
    formats = {
        "fp32": native,
        "tf32": unknown,
        "bf16": native if device.bf16 else unknown,
        "fp16": unknown,
        "fp8": unknown,
    }
    return DeviceFacts("xpu", device.name, device.memory_bytes, formats, "Intel GPU")


def _is_available(kind: str) -> bool:
    if kind == "cpu":
        return True
    return torch.backends.mps.is_available() if kind == "mps" else bool(accelerators(kind))


def _absence(kind: str) -> str:
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    return "PyTorch finds none (driver, visibility or build)"


def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()
