"""What is seen of real steps: memory, gradients, and the numbers that every op makes.

::

    memory       live tensor bytes at the peak of a step
    gradients    norms
    place        where an op runs: module path, phase, file and line
    attribution  finding that place, forward and backward (names, source_line, stepping)
    histogram    the 256-bin exponent histogram: the record of an op's numbers
    ops          one dispatch mode that records every op (levels scan and profile) into a `profile`
    lowering     whether an op's result would be in 16 bits under a policy, asked of an FP32 run (low_tags)
    watch        every step: the largest gradient of each parameter, for next to nothing
    bad_steps    keeping what is needed to replay a bad step (step_start, batches, randomness)
"""

from halfstep.observe.gradients import gradient_norm, gradient_norm_there
from halfstep.observe.memory import (
    ACTIVATIONS,
    OTHER,
    PeakMemory,
    peak_resident_bytes,
    resident_bytes,
)

__all__ = [
    "ACTIVATIONS",
    "OTHER",
    "PeakMemory",
    "gradient_norm",
    "gradient_norm_there",
    "peak_resident_bytes",
    "resident_bytes",
]
