"""Loss scaling: a `torch.amp.GradScaler` that cannot collapse to zero, and says why a step was skipped."""

from halfstep.scale.buffers import BufferNotPutBackWarning, KeptBuffers
from halfstep.scale.diagnosis import Cause, LossScaleError
from halfstep.scale.gradients import HalfGradientError
from halfstep.scale.scaler import GradScaler
from halfstep.scale.skips import Skip

__all__ = [
    "BufferNotPutBackWarning",
    "Cause",
    "GradScaler",
    "HalfGradientError",
    "KeptBuffers",
    "LossScaleError",
    "Skip",
]
