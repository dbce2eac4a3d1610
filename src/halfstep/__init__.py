"""halfstep: mixed-precision training of PyTorch models: automatic, measured, explained."""

from halfstep import doctor
from halfstep.autocast import autocast, cast_inputs, keep_fp32, recomputation
from halfstep.checkpoint import CheckpointError, load, save
from halfstep.engine import MixedPrecision, StepResult
from halfstep.hardware import DeviceFacts, DeviceUnavailableError, detect
from halfstep.optim import MasterWeights
from halfstep.policy import POLICIES, Policy, PolicyOptionError, UnknownPolicyError, choose
from halfstep.policy import parse as parse_policy
from halfstep.scale import GradScaler, LossScaleError
from halfstep.version import __version__

__all__ = [
    "POLICIES",
    "CheckpointError",
    "DeviceFacts",
    "DeviceUnavailableError",
    "GradScaler",
    "LossScaleError",
    "MasterWeights",
    "MixedPrecision",
    "Policy",
    "PolicyOptionError",
    "StepResult",
    "UnknownPolicyError",
    "__version__",
    "autocast",
    "cast_inputs",
    "choose",
    "detect",
    "doctor",
    "keep_fp32",
    "load",
    "parse_policy",
    "recomputation",
    "save",
]
