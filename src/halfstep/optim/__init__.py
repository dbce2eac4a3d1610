"""Optimizers that hold the FP32 truth behind 16-bit parameters, in few bytes.

====================================================== ===============================================================
``adam``, ``sgd``, ``lion``; ``base``                  the optimizers; what torch and its tools see of them
``rules``; ``masters``, ``moments``, ``dither``        the arithmetic of a step; how its numbers are stored
``update``; ``jobs``, ``layout``, ``pages``            the seam to backends; tensors and memory made ready for it
``backends``                                           who computes: C, Triton, ``torch.compile``, plain torch
``surveying``, ``clipping``                            norms and overflow of gradients, and what they are multiplied by
``release``, ``arrivals``                              steps inside the backward pass
``loading``, ``adopting``, ``plain``                   state from files, from FP32 parameters, and to plain FP32
``fused_on_planes``                                    PyTorch's fused optimizers on `halfstep.split` parameters
``master_weights``                                     FP32 masters around any other torch optimizer
====================================================== ===============================================================
"""

from halfstep.optim.adam import Adam, AdamW
from halfstep.optim.backends import BackendUnavailableError, SlowOptimizerWarning
from halfstep.optim.base import MasterOptimizer, MastersDroppedWarning
from halfstep.optim.fused_on_planes import teach as _teach_fused_optimizers
from halfstep.optim.lion import Lion
from halfstep.optim.master_weights import MasterWeights
from halfstep.optim.plain import export_fp32, import_fp32
from halfstep.optim.sgd import SGD
from halfstep.optim.surveying import survey_of
from halfstep.optim.update import Survey

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "Lion",
    "MasterOptimizer",
    "MasterWeights",
    "MastersDroppedWarning",
    "SlowOptimizerWarning",
    "Survey",
    "export_fp32",
    "import_fp32",
    "survey_of",
]

_teach_fused_optimizers()
