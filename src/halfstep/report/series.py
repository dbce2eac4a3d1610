"""The numbers behind the figures: run records reduced to short arrays that can be drawn.

A record may hold hundreds of thousands of steps and a figure shows a few hundred points, so losses are
averaged over groups of consecutive steps. That is the only smoothing there is, and runs short enough to draw
step by step get none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfstep.compare.result import Comparison
from halfstep.compare.statistics import timed_seconds
from halfstep.record import RunRecord

Array = NDArray[np.float64]

MAX_POINTS = 240  #: points per drawn loss curve
_LARGEST = 1e100


@dataclass(frozen=True)
class Band:
    """Mean, minimum and maximum over seeds at every point; NaN where no seed has a finite value."""

    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class LossCurves:
    """Loss of one optimizer, per policy and seed, on a common axis of points."""

    optimizer: int
    steps_per_point: int  #: 1: as recorded; n: each point is the mean of n consecutive steps
    steps: Array  #: step number at the middle of each point
    last_step: int
    runs: Mapping[str, Mapping[tuple[int, int], Array]]  #: policy -> (seed, repetition) -> loss per point
    stopped: Mapping[str, tuple[tuple[float, float], ...]]  #: (step, loss) where a run broke off or turned non-finite

    def band(self, policy: str) -> Band:
        return over_seeds(list(self.runs[policy].values()))

    def differences(self, policy: str, baseline: str) -> list[Array]:
        """Policy minus baseline for every seed that both have run."""
        base = self.runs.get(baseline, {})
        return [losses - base[key] for key, losses in self.runs[policy].items() if key in base]


def runs_by_policy(records: Iterable[RunRecord], comparison: Comparison) -> dict[str, list[RunRecord]]:
    """Records under the policy they were compared as, in the comparison's order, then any that it does not name.

    A comparison calls a policy what the user called it, so ``auto`` stays ``auto``.
    """
    groups: dict[str, list[RunRecord]] = {result.policy: [] for result in comparison.policies}
    for record in records:
        requested = record.header.policy_requested
        groups.setdefault(requested if requested in groups else record.header.policy, []).append(record)
    return {policy: sorted(group, key=lambda r: (r.header.seed, r.header.started)) for policy, group in groups.items()}


def optimizers(records: Iterable[RunRecord]) -> list[int]:
    """Indices of all optimizers that stepped in any of the records."""
    return sorted({step.optimizer for record in records for step in record.steps})


def losses(record: RunRecord, optimizer: int) -> Array:
    """Loss at each step of one optimizer; NaN where a step had none.

    Finite values stop at ±10^100: no picture tells them from larger ones, and their squares do not overflow.
    """
    values = [math.nan if s.loss is None else s.loss for s in record.steps if s.optimizer == optimizer]
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), np.clip(array, -_LARGEST, _LARGEST), array)


def group_means(values: Array, size: int) -> Array:
    """Mean of the finite values in each group of ``size`` consecutive ones; NaN for a group without any."""
    padded = np.full(-(-len(values) // size) * size, math.nan)
    padded[: len(values)] = values
    return (
        over_seeds(list(padded.reshape(-1, size).T)).mean
        if size > 1
        else np.where(np.isfinite(padded), padded, math.nan)
    )


def over_seeds(runs: Sequence[Array]) -> Band:
    """Mean, minimum and maximum of the finite values at each point; runs may differ in length."""
    length = max((len(run) for run in runs), default=0)
    stack = np.full((max(len(runs), 1), length), math.nan)
    for row, run in zip(stack, runs, strict=False):
        row[: len(run)] = run
    finite = np.isfinite(stack)
    count = finite.sum(axis=0)
    none = count == 0
    mean = np.where(finite, stack, 0.0).sum(axis=0) / np.maximum(count, 1)
    low = np.where(finite, stack, math.inf).min(axis=0)
    high = np.where(finite, stack, -math.inf).max(axis=0)
    return Band(*(np.where(none, math.nan, values) for values in (mean, low, high)))


def loss_curves(groups: Mapping[str, Sequence[RunRecord]], optimizer: int, max_points: int = MAX_POINTS) -> LossCurves:
    """Losses of every run, averaged over so many steps per point that the longest fits ``max_points``."""
    raw: dict[str, dict[tuple[int, int], tuple[RunRecord, Array]]] = {}
    for policy, records in groups.items():
        of_policy: dict[tuple[int, int], tuple[RunRecord, Array]] = {}
        for record in records:
            seed = record.header.seed
            repetition = sum(1 for other, _ in of_policy if other == seed)
            of_policy[seed, repetition] = (record, losses(record, optimizer))
        raw[policy] = of_policy
    longest = max((len(values) for runs in raw.values() for _, values in runs.values()), default=0)
    size = max(1, -(-longest // max_points))
    points = -(-longest // size)
    runs: dict[str, dict[tuple[int, int], Array]] = {}
    stopped: dict[str, tuple[tuple[float, float], ...]] = {}
    for policy, of_policy in raw.items():
        runs[policy] = {}
        marks = []
        for key, (record, values) in of_policy.items():
            curve = np.full(points, math.nan)
            means = group_means(values, size)
            curve[: len(means)] = means
            runs[policy][key] = curve
            if mark := _breaking_point(record, values, curve, size):
                marks.append(mark)
        stopped[policy] = tuple(marks)
    middles = np.minimum(np.arange(points) * size + (size + 1) / 2, float(longest))
    return LossCurves(optimizer, size, middles, longest, runs, stopped)


def _breaking_point(record: RunRecord, values: Array, curve: Array, size: int) -> tuple[float, float] | None:
    """Where to mark that a run ended in an error or with non-finite losses: its last finite point."""
    failed = record.end is not None and record.end.outcome == "error"
    diverged = len(values) > 0 and not math.isfinite(values[-1])
    finite = np.flatnonzero(np.isfinite(curve))
    if not (failed or diverged) or len(finite) == 0:
        return None
    at = int(finite[-1])
    return at * size + (size + 1) / 2, float(curve[at])


def seed_deviation(runs: Sequence[Array]) -> Array | None:
    """Standard deviation over seeds at each point, its square averaged over neighbouring points.

    With two or three seeds the deviation at a single point says little; neighbours share it. None for fewer
    than two runs.
    """
    if len(runs) < 2 or len(runs[0]) == 0:
        return None
    stack = np.array(runs)
    shown = np.isfinite(stack).sum(axis=0) >= 2
    centred = stack - over_seeds(runs).mean
    count = np.isfinite(stack).sum(axis=0)
    squares = np.where(np.isfinite(centred), centred, 0.0) ** 2
    variance = np.where(shown, squares.sum(axis=0) / np.maximum(count - 1, 1), 0.0)
    width = max(1, len(variance) // 12) | 1
    window = np.ones(width)
    total = np.convolve(variance, window)[width // 2 :][: len(variance)]
    weight = np.convolve(shown.astype(float), window)[width // 2 :][: len(variance)]
    # A point without two seeds of its own draws nothing, whatever its neighbours know.
    return np.where(shown & (weight > 0.5), np.sqrt(np.maximum(total, 0) / np.maximum(weight, 1)), math.nan)


def scale_history(record: RunRecord, optimizer: int) -> tuple[Array, Array]:
    """(steps, scales) at the changes of the loss scale, the first and the last step; empty without one."""
    points: list[tuple[int, float]] = []
    last: tuple[int, float] | None = None
    for step in record.steps:
        if step.optimizer != optimizer or step.scale is None:
            continue
        last = (step.step, step.scale)
        if not points or points[-1][1] != step.scale:
            points.append(last)
    if last is not None and points[-1] != last:
        points.append(last)
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def skipped_steps(records: Iterable[RunRecord]) -> Array:
    """Step number of every update that any optimizer of any of the records skipped, sorted."""
    return np.array(
        sorted(step.step for record in records for step in record.steps if not step.applied), dtype=np.float64
    )


def timed_milliseconds(records: Iterable[RunRecord]) -> Array:
    """Step times in ms, pooled over the records; the same steps that the comparison times."""
    return np.array([1e3 * seconds for record in records for seconds in timed_seconds(record)], dtype=np.float64)


def thinned(values: Array, most: int) -> Array:
    """At most ``most`` of the sorted values, evenly spaced in rank, smallest and largest included."""
    ordered: Array = np.sort(values)
    if len(ordered) <= most:
        return ordered
    return np.take(ordered, np.linspace(0, len(ordered) - 1, most).round().astype(int))
