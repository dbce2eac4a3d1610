"""FP32 parameters stored as two 16-bit planes: FP32 to everybody, and already cast for products in bfloat16.

====== =====================================================================
planes a float32 number as a bfloat16 and an int16, and back: exact
tensor `SplitTensor`, the float32 tensor that is kept so
store  `split_parameters` and `plain_parameters`, for a model
====== =====================================================================
"""

from halfstep.split.planes import join, split
from halfstep.split.store import plain_parameters, split_parameters
from halfstep.split.tensor import SplitTensor, make_plain, on_plain, register

__all__ = [
    "SplitTensor",
    "join",
    "make_plain",
    "on_plain",
    "plain_parameters",
    "register",
    "split",
    "split_parameters",
]
