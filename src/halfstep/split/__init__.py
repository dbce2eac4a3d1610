"""FP32 parameters stored as two 16-bit planes: FP32 to everybody, and already cast for 16-bit products.

========= =====================================================================
planes    a float32 number as a 16-bit one and an int16, and back
tensor    `SplitTensor`, the float32 tensor that is kept so
store     `split_parameters` and `plain_parameters`, for a model
gradients `NarrowGradients`: their gradients in bfloat16, where nothing is accumulated
========= =====================================================================
"""

from halfstep.split.gradients import NarrowGradients
from halfstep.split.planes import join, split
from halfstep.split.store import plain_parameters, split_parameters
from halfstep.split.tensor import (
    PlainCopies,
    SplitTensor,
    make_plain,
    on_plain,
    on_temporary,
    parts,
    register,
    set_hooks_again,
    swap_keeping_hooks,
)

__all__ = [
    "NarrowGradients",
    "PlainCopies",
    "SplitTensor",
    "join",
    "make_plain",
    "on_plain",
    "on_temporary",
    "parts",
    "plain_parameters",
    "register",
    "set_hooks_again",
    "split",
    "split_parameters",
    "swap_keeping_hooks",
]
