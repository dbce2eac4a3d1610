"""Device facts: which number formats this machine computes in, and how well.

`detect` says it; `accelerators` asks PyTorch for GPUs without starting their drivers here, and `rates` measures a CPU.
"""

from halfstep.hardware.detect import (
    DEVICE_TYPES,
    DeviceFacts,
    DeviceType,
    DeviceUnavailableError,
    FormatSupport,
    Support,
    cpu_flags,
    cpu_formats,
    cuda_formats,
    detect,
    environment,
)
from halfstep.hardware.rates import product_rates

__all__ = [
    "DEVICE_TYPES",
    "DeviceFacts",
    "DeviceType",
    "DeviceUnavailableError",
    "FormatSupport",
    "Support",
    "cpu_flags",
    "cpu_formats",
    "cuda_formats",
    "detect",
    "environment",
    "product_rates",
]
