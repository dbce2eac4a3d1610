"""FP32 master weights around any torch optimizer: `halfstep.MasterWeights`."""

from halfstep.optim.master_weights.wrapper import MasterWeights

__all__ = ["MasterWeights"]
