"""Compares policies on one script and concludes in a `Comparison`.

It runs the script under each policy (`schedule`), measures (`statistics`), judges (`judgement`), weighs the
conditions (`conditions`) and concludes (`verdict`, in the words of `sentence`).

Records are all that it reads of a run; how a conclusion is shown is the concern of `halfstep.report` and the
command line.
"""

from halfstep.compare.result import Comparison, Interval, Outcome, PolicyResult, Quality, Speed
from halfstep.compare.schedule import (
    Event,
    Interrupted,
    Run,
    RunEnded,
    RunResult,
    RunStarted,
    ScheduleError,
    StepSeen,
    plan_runs,
    run_all,
)
from halfstep.compare.verdict import CompareError, compare, to_json

__all__ = [
    "CompareError",
    "Comparison",
    "Event",
    "Interrupted",
    "Interval",
    "Outcome",
    "PolicyResult",
    "Quality",
    "Run",
    "RunEnded",
    "RunResult",
    "RunStarted",
    "ScheduleError",
    "Speed",
    "StepSeen",
    "compare",
    "plan_runs",
    "run_all",
    "to_json",
]
