"""The detectors: functions from an `OpEvent` to suspicions, one mechanism each.

Those that look at more than one op are asked by the `Examination` itself: `GradientFlush` and `ScaleCourse`.
"""

from collections.abc import Sequence

from halfstep.doctor.detectors.cancellation import cancelled_differences, error_jumps
from halfstep.doctor.detectors.casts import colliding_values
from halfstep.doctor.detectors.constants import rounded_constants
from halfstep.doctor.detectors.decisions import flipped_decisions
from halfstep.doctor.detectors.range import flushed_results, hidden_overflow, range_of_results
from halfstep.doctor.detectors.updates import lost_updates
from halfstep.doctor.event import Detector

DETECTORS: Sequence[Detector] = (
    range_of_results,
    hidden_overflow,
    flushed_results,
    lost_updates,
    rounded_constants,
    colliding_values,
    cancelled_differences,
    error_jumps,
    flipped_decisions,
)
