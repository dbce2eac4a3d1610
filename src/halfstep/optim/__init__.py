"""Master weights: the FP32 truth behind 16-bit parameters."""

from halfstep.optim.master import MasterWeights

__all__ = ["MasterWeights"]
