"""Optimizers that hold the FP32 truth behind 16-bit parameters, in few bytes."""

from halfstep.optim.adam import Adam, AdamW
from halfstep.optim.backends import BackendUnavailableError, SlowOptimizerWarning
from halfstep.optim.base import MasterOptimizer
from halfstep.optim.lion import Lion
from halfstep.optim.master import MasterWeights
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
    "SlowOptimizerWarning",
    "Survey",
    "export_fp32",
    "import_fp32",
    "survey_of",
]
