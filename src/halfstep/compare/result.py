"""What a comparison concludes: plain frozen values that the terminal, the HTML report and ``--json`` all show.

Every judgement carries the numbers it was made from. Ratios are *policy to baseline* in the direction a reader
expects: a speed-up above 1 is faster, a memory ratio below 1 is smaller, a loss difference above 0 is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

QualityVerdict = Literal["same", "worse", "better", "cannot tell", "diverged"]
SpeedVerdict = Literal["faster", "slower", "same", "cannot tell"]
Outcome = Literal["finished", "diverged", "crashed", "interrupted", "running"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float  #: e.g. 0.95


@dataclass(frozen=True)
class Speed:
    """Step time of one policy, and its ratio to the baseline's."""

    median_seconds: float  #: median over seeds of each run's median step time
    quartiles_seconds: tuple[float, float]  #: of the pooled timed steps
    timed_steps: int  #: steps counted, warm-up and memory-tracked steps left out
    speed_up: Interval | None  #: baseline time / this time; None for the baseline or where it cannot be formed
    verdict: SpeedVerdict | None  #: None for the baseline
    reason: str  #: one clause that says why, with the numbers


@dataclass(frozen=True)
class Quality:
    """Final training loss of one policy against the baseline, per optimizer."""

    optimizer: int
    final_loss: float  #: mean over seeds of the mean loss of the last steps
    last_steps: int  #: how many steps that mean takes
    seed_spread: float | None  #: baseline's seed-to-seed standard deviation of final_loss: the yardstick
    difference: Interval | None  #: mean over seeds of (this - baseline), paired by seed
    verdict: QualityVerdict | None  #: None for the baseline
    reason: str


@dataclass(frozen=True)
class PolicyResult:
    """Everything measured of one policy."""

    policy: str
    outcomes: tuple[Outcome, ...]  #: one per seed
    errors: tuple[str, ...]  #: distinct error messages of crashed runs
    speed: Speed | None
    quality: tuple[Quality, ...]  #: one per optimizer, in the order they stepped
    peak_bytes: int | None  #: live tensor bytes at the peak of a step (largest over seeds), on `memory_device`
    memory_ratio: float | None  #: peak_bytes / baseline's peak_bytes
    memory_by_category: Mapping[str, int]
    peak_op: str | None
    skipped_steps: int  #: summed over seeds
    notices: tuple[str, ...]  #: distinct
    memory_device: str | None = None  #: "cpu" for the host's memory, "cuda", …; None: all together, of older records
    allocator_bytes: int | None = None  #: the accelerator's own count at its peak in the run (largest over seeds)
    host_bytes: int | None = None  #: live tensor bytes in the host's memory at their peak, beside an accelerator's


@dataclass(frozen=True)
class Comparison:
    """Several policies on one script."""

    command: tuple[str, ...]
    baseline: str  #: the policy that the others are compared with
    seeds: int
    policies: tuple[PolicyResult, ...]  #: baseline first, then as asked
    verdict: str  #: one or two sentences with the uncertainty
    findings: bool  #: a run crashed or diverged, or quality is worse: exit code 1
    warnings: tuple[str, ...]  #: e.g. the machine was loaded, too few seeds
