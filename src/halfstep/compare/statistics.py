"""The numbers behind a verdict: which steps count, and intervals for speed-up and difference of losses.

Seeds are the units of replication. Steps of one run share their process, its memory layout and the state of
the machine, so a run is boiled down to one number (its median step time, its final loss) and intervals are
formed over seeds, paired: seed *k* under a policy with seed *k* under the baseline, which share data order
and initial weights. Pairing removes what the seed does to both. Student's *t* is used because three seeds are
three numbers.

Only for speed, and only with a single seed, steps stand in for seeds: a moving-block bootstrap (Künsch 1989,
*Ann. Statist.* 17) resamples runs of consecutive steps, because neighbouring steps are slow together. Its
interval covers the noise within these two runs and nothing that differs from run to run; whoever shows it
must say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from scipy.special import stdtrit

from halfstep.compare.result import Interval
from halfstep.record import RunRecord

MIN_TIMED_STEPS = 5
SPEED_CONFIDENCE = 0.95
QUALITY_CONFIDENCE = 0.90  #: two one-sided tests at 5 %
_RESAMPLES = 2000

Series = Mapping[int, Sequence[float]]
"""Seed index -> one value per step."""


def timed_seconds(record: RunRecord) -> list[float]:
    """Seconds of the steps whose time counts.

    Only the first optimizer's: the time between two of its steps is one turn of the training loop, whatever
    other optimizers step in between. The first tenth of the steps, at least three, is warm-up (lazy
    initialisation, caches, allocator); steps under the memory tracker are slow for a reason that is ours.
    """
    steps = [step for step in record.steps if step.optimizer == 0]
    warm_up = max(3, math.ceil(len(steps) / 10))
    return [s.seconds for s in steps[warm_up:] if s.seconds is not None and s.seconds > 0 and not s.tracked]


def medians(times: Series) -> dict[int, float]:
    """Median step time of each run that has enough timed steps."""
    return {seed: float(np.median(t)) for seed, t in times.items() if len(t) >= MIN_TIMED_STEPS}


def speed_up(baseline: Series, policy: Series) -> Interval | None:
    """Baseline's step time over the policy's, with its 95 % interval; None where no seed has both.

    With two seeds or more the interval is Student's over the seeds' log ratios (a ratio's logarithm is
    symmetric: twice as fast and twice as slow are equally far from 1); with one, it comes from
    `block_bootstrap`.
    """
    ours, theirs = medians(policy), medians(baseline)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    if len(shared) == 1:
        return block_bootstrap(baseline[shared[0]], policy[shared[0]])
    logs = student_interval([math.log(theirs[seed] / ours[seed]) for seed in shared], SPEED_CONFIDENCE)
    return Interval(math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high), SPEED_CONFIDENCE)


def block_bootstrap(baseline: Sequence[float], policy: Sequence[float]) -> Interval:
    """Ratio of the two medians, with a percentile interval over resampled blocks of steps.

    Both runs are resampled independently in overlapping blocks of about n^(1/3) steps, the rate at which the
    bias of the block bootstrap balances its variance. The generator's seed is fixed: a report read twice says
    the same.
    """
    generator = np.random.default_rng(0)

    def resampled_medians(values: Sequence[float]) -> np.ndarray:
        series = np.asarray(values, dtype=np.float64)
        n = len(series)
        block = math.ceil(n ** (1 / 3))
        offsets = np.arange(block)
        starts = generator.integers(0, n - block + 1, size=(_RESAMPLES, math.ceil(n / block)))
        at_once = max(1, 1_000_000 // n)  # all resamples of a long run would not fit into memory
        return np.concatenate(
            [
                np.median(series[(part[:, :, None] + offsets).reshape(len(part), -1)[:, :n]], axis=1)
                for part in np.array_split(starts, math.ceil(_RESAMPLES / at_once))
            ]
        )

    ratios = resampled_medians(baseline) / resampled_medians(policy)
    tail = (1 - SPEED_CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    estimate = float(np.median(baseline) / np.median(policy))
    # With ties the percentiles may step over the estimate by a rounding error; an interval contains its
    # estimate.
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), SPEED_CONFIDENCE)


def student_interval(values: Sequence[float], confidence: float) -> Interval:
    """Mean of two or more values with Student's *t* interval."""
    n = len(values)
    mean = fmean(values)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, confidence)


def final_steps(steps: int) -> int:
    """How many of a run's last steps its final loss averages: a fifth, at least five.

    A single step's loss is one batch's; a fifth of the run averages that noise away and still belongs to the
    end.
    """
    return min(steps, max(5, math.ceil(steps / 5)))


def final_loss(losses: Sequence[float]) -> float:
    """Mean loss of the last steps; NaN or infinite where one of them is."""
    last = losses[-final_steps(len(losses)) :]
    return sum(last) / len(last)  # not fmean, which raises where +inf meets -inf


def diverged(losses: Sequence[float]) -> bool:
    """Whether a loss among the last steps is not finite."""
    return not all(map(math.isfinite, losses[len(losses) - final_steps(len(losses)) :]))


def cut_to_common_length(*groups: Series) -> list[dict[int, Sequence[float]]]:
    """The same series, all cut to the shortest: runs of unlike length are compared at the same step."""
    shortest = min((len(values) for group in groups for values in group.values()), default=0)
    return [{seed: values[:shortest] for seed, values in group.items()} for group in groups]


def paired_difference(baseline: Mapping[int, float], policy: Mapping[int, float]) -> Interval | None:
    """Mean over shared seeds of policy minus baseline, with its 90 % interval; None below two of them."""
    shared = sorted(baseline.keys() & policy.keys())
    if len(shared) < 2:
        return None
    return student_interval([policy[seed] - baseline[seed] for seed in shared], QUALITY_CONFIDENCE)


def seed_spread(finals: Mapping[int, float]) -> float | None:
    """Standard deviation of the final loss over seeds; None below two, or where one of them diverged."""
    if len(finals) < 2 or not all(map(math.isfinite, finals.values())):
        return None
    return stdev(finals.values())
