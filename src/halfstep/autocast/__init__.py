"""A policy applied to computation: the autocast region, its rules, its FP32 islands, and how parameters are stored.

========== ==========================================================================================
region     `autocast` enters a policy; `recomputation` is its counterpart for backward
rules      which op runs in which format: CUDA's lists, and a policy's changes to a device's
kernels    the rules in PyTorch's dispatcher, while a region is entered
float32    what FP32 products are computed in: FP32, or TF32 where a policy says so
emulate    16-bit matrix products by FP32 arithmetic
float8     matrix products on operands rounded to float8
islands    `keep_fp32`: modules that stay FP32, by path
containers `to_float32`, `cast_inputs`: casts through tuples, mappings and dataclasses
storage    `store_in_planes`: parameters in two 16-bit planes, where the policy says so
========== ==========================================================================================
"""

from halfstep.autocast.containers import LOW_PRECISION, cast_inputs, to_float32
from halfstep.autocast.float32 import Float32Switches, float32_of, float32_precision
from halfstep.autocast.islands import Islands, NoSuchModuleError, keep_fp32
from halfstep.autocast.kernels import MissingKernelWarning
from halfstep.autocast.region import autocast, recomputation
from halfstep.autocast.rules import UnsupportedDeviceError
from halfstep.autocast.storage import FP32_ISLANDS, store_in_planes

__all__ = [
    "FP32_ISLANDS",
    "LOW_PRECISION",
    "Float32Switches",
    "Islands",
    "MissingKernelWarning",
    "NoSuchModuleError",
    "UnsupportedDeviceError",
    "autocast",
    "cast_inputs",
    "float32_of",
    "float32_precision",
    "keep_fp32",
    "recomputation",
    "store_in_planes",
    "to_float32",
]
