"""Device facts: which number formats this machine computes in, and how well.

`detect` asks PyTorch and, on a CPU, `rates` measures; a choice of policy rests on both.
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
