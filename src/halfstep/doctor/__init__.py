"""The doctor: which op, which module, which line, why, and a remedy that was tried.

examine       any callable that runs PyTorch code -> findings
examination   the same as a context manager
lint          what is wrong before the first step
predict       from one FP32 step: what would go wrong in a format
replay        a bad step that `MixedPrecision.watch` kept
codes         the catalogue of findings
"""

from halfstep.doctor.codes import CODES, UnknownCodeError
from halfstep.doctor.examination import Examination
from halfstep.doctor.examine import examine
from halfstep.doctor.finding import Finding, Severity, Silence, SilenceError, Trial
from halfstep.doctor.lint import lint
from halfstep.doctor.predict import predict
from halfstep.doctor.replay import Replay, replay

__all__ = [
    "CODES",
    "Examination",
    "Finding",
    "Replay",
    "Severity",
    "Silence",
    "SilenceError",
    "Trial",
    "UnknownCodeError",
    "examine",
    "lint",
    "predict",
    "replay",
]
