"""halfstep: mixed-precision training of PyTorch models: automatic, measured, explained."""

from halfstep.autocast import autocast
from halfstep.engine import MixedPrecision, StepResult
from halfstep.hardware import DeviceFacts, DeviceUnavailableError, detect
from halfstep.optim import MasterWeights
from halfstep.policy import POLICIES, Policy, UnknownPolicyError, choose
from halfstep.policy import parse as parse_policy
from halfstep.scale import GradScaler, LossScaleError
from halfstep.version import __version__

__all__ = [
    "POLICIES",
    "DeviceFacts",
    "DeviceUnavailableError",
    "GradScaler",
    "LossScaleError",
    "MasterWeights",
    "MixedPrecision",
    "Policy",
    "StepResult",
    "UnknownPolicyError",
    "__version__",
    "autocast",
    "choose",
    "detect",
    "parse_policy",
]
