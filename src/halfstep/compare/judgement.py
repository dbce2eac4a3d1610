"""Judges one policy's speed and quality against the baseline's, with the reason in words.

**Speed.** The speed-up's 95 % interval decides. Within 0.95 to 1.05 the speeds are the *same*: nobody changes
a policy for that. Else a policy is *faster* or *slower* where the interval excludes 1 and is narrow enough to
be of use (its ends within a factor of 1.5). Everything else is *cannot tell*.

**Quality.** Two training runs never end at the same loss; the question is whether a policy moves it by more
than something that nobody cares about. The yardstick is the baseline's own seed-to-seed standard deviation
*s* of the final loss, and the margin is one *s*: a shift below it moves a run's end by less than the choice
of its seed does. Of two runs with different seeds, the one that is worse by a true *s* still ends ahead in
Φ(-1/√2) = 24 % of cases; at three *s* that is 2 %, which anybody would notice. With the 90 % interval of the
paired difference (two one-sided tests at 5 %, Schuirmann 1987):

- *same*: the whole interval lies within ± *s*;
- *worse*: the interval lies above 0 and its estimate beyond *s* (*better*: the mirror image);
- *cannot tell*: everything else, so that few seeds or much noise never pass for equality.

*s* is itself estimated, from few seeds; simulations in the tests hold that no true difference yields *worse*
in more than about 5 % of comparisons, and that a true difference of three *s* hardly ever yields *same*.
"""

from __future__ import annotations

import math

import numpy as np

from halfstep.compare import phrases
from halfstep.compare.result import Interval, Quality, QualityVerdict, Speed, SpeedVerdict
from halfstep.compare.statistics import (
    MIN_TIMED_STEPS,
    Series,
    cut_to_common_length,
    diverged,
    final_loss,
    final_steps,
    medians,
    paired_difference,
    seed_spread,
    speed_up,
)

SAME_SPEED = (0.95, 1.05)
USEFUL_WIDTH = 1.5  #: an interval whose ends are further apart than this factor says too little
MIN_SEEDS = 3
MIN_STEPS = 20
_IGNORED_SEED = 1e-6  #: relative spread below which only rounding differs from seed to seed (FP32: eps 1.2e-7)


def judge_speed(times: Series, baseline_name: str, baseline: Series | None) -> Speed | None:
    """Speed of a policy from its timed steps, None without any; for the baseline, ``baseline`` is None."""
    pooled = [seconds for series in times.values() for seconds in series]
    if not pooled:
        return None
    # A run cut short after a step or two must not count as much as a whole one.
    per_run = list(medians(times).values()) or [float(np.median(series)) for series in times.values() if series]
    low, high = np.quantile(pooled, [0.25, 0.75])
    interval, verdict, reason = _speed_verdict(times, baseline_name, baseline)
    return Speed(
        median_seconds=float(np.median(per_run)),
        quartiles_seconds=(float(low), float(high)),
        timed_steps=len(pooled),
        speed_up=interval,
        verdict=verdict,
        reason=reason,
    )


def _speed_verdict(
    times: Series, baseline_name: str, baseline: Series | None
) -> tuple[Interval | None, SpeedVerdict | None, str]:
    if baseline is None:
        return None, None, "the baseline"
    interval = speed_up(baseline, times)
    if interval is None:
        return None, "cannot tell", _why_no_ratio(times, baseline_name, baseline)
    seeds = len(medians(times).keys() & medians(baseline).keys())
    scope = (
        "from one seed, which covers only the noise within a run"
        if seeds == 1
        else f"over {phrases.count(seeds, 'seed')}"
    )
    estimate, ends = phrases.ratio(interval)
    if SAME_SPEED[0] <= interval.low and interval.high <= SAME_SPEED[1]:
        return interval, "same", f"{estimate} ×, {ends} {scope}"
    excludes_one = interval.low > 1 or interval.high < 1
    if excludes_one and interval.high <= USEFUL_WIDTH * interval.low:
        if interval.low > 1:
            return interval, "faster", f"{ends} {scope}"
        return interval, "slower", f"{phrases.ratio(phrases.inverse(interval))[1]} × slower {scope}"
    too_wide = "is too wide" if excludes_one else "includes 1"
    advice = "run more seeds on a quiet machine" if seeds > 1 else "run more seeds"
    return interval, "cannot tell", f"{estimate} ×, but the {ends} {scope} {too_wide}; {advice}"


def _why_no_ratio(times: Series, baseline_name: str, baseline: Series) -> str:
    if not baseline:
        return f"there is no {baseline_name} run to compare with"
    for series, whose in ((times, ""), (baseline, f"{baseline_name} has ")):
        if not medians(series):
            most = max(map(len, series.values()), default=0)
            had = f"only {phrases.count(most, 'timed step')} after the warm-up"
            return f"{whose}{had}; at least {MIN_TIMED_STEPS} are needed"
    return f"no seed has {MIN_TIMED_STEPS} timed steps under both"


def judge_quality(
    optimizer: int, losses: Series, cut_short: Series, baseline_name: str, baseline: Series | None
) -> Quality | None:
    """Final loss of one optimizer under a policy.

    Args:
        losses: of the runs that came to their end.
        cut_short: of the runs that did not; shown only where nothing else is there.
        baseline: losses of the baseline's runs that came to their end; None for the baseline itself.

    Returns:
        None where no loss was recorded.
    """
    shown = {seed: series for seed, series in (losses or cut_short).items() if series}
    if not shown:
        return None
    if baseline is None or not baseline or not losses:
        finals = {seed: final_loss(series) for seed, series in _common(shown).items()}
        steady = bool(losses) and all(map(math.isfinite, finals.values()))
        spread = seed_spread(finals) if baseline is None and steady else None
        if baseline is not None:
            who = "no run" if not losses else f"no {baseline_name} run"
            reason = f"{who} came to its end, so there is nothing to compare"
        elif spread is None:
            reason = "the baseline; its seed-to-seed spread is not known"
        else:
            reason = f"the baseline; its seed-to-seed spread is {phrases.number(spread, 2)}"
        verdict: QualityVerdict | None = None if baseline is None else "cannot tell"
        return Quality(optimizer, _mean(finals), _last(shown), spread, None, verdict, reason)

    theirs, ours = cut_to_common_length(baseline, losses)
    finals, baseline_finals = ({seed: final_loss(s) for seed, s in group.items()} for group in (ours, theirs))
    last = _last(ours)
    if any(map(diverged, baseline.values())):
        reason = f"{baseline_name} itself diverged"
        return Quality(optimizer, _mean(finals), last, None, None, "cannot tell", reason)
    spread = seed_spread(baseline_finals)
    if bad := sum(map(diverged, losses.values())):
        reason = "the loss ended as NaN or infinity" + phrases.runs(bad, len(losses))
        worst = {seed: final_loss(series) for seed, series in losses.items()}
        return Quality(optimizer, _mean(worst), last, spread, None, "diverged", reason)
    difference = paired_difference(baseline_finals, finals)
    verdict, reason = _quality_verdict(ours, theirs, baseline_name, spread, difference)
    return Quality(optimizer, _mean(finals), last, spread, difference, verdict, reason)


def _quality_verdict(
    ours: Series, theirs: Series, name: str, spread: float | None, difference: Interval | None
) -> tuple[QualityVerdict, str]:
    """The verdict on finite losses of equal length."""
    steps = min(map(len, ours.values()))
    if steps < MIN_STEPS:
        return "cannot tell", f"{phrases.count(steps, 'step')} with a loss; at least {MIN_STEPS} are needed"
    shared = sorted(ours.keys() & theirs.keys())
    level = max(abs(final_loss(series)) for series in theirs.values())
    if spread is not None and spread <= _IGNORED_SEED * level:
        ignored = f"the script ignored the seed (all {len(theirs)} runs of {name} end at the same loss)"
        if shared and all(list(ours[seed]) == list(theirs[seed]) for seed in shared):
            return "same", f"every step's loss is identical to {name}'s, though {ignored}"
        gap = phrases.difference(difference)[0] if difference else "any size"
        advice = "seed it through {seed} in its arguments"
        return "cannot tell", f"{ignored}, so a difference of {gap} has no spread to be judged by; {advice}"
    if len(theirs) < MIN_SEEDS or spread is None:
        have = phrases.count(len(theirs), "seed")
        return "cannot tell", f"{name} ended with {have}; at least {MIN_SEEDS} are needed to know its spread"
    if difference is None:
        return "cannot tell", f"{phrases.count(len(shared), 'seed')} ended under both; at least 2 are needed"
    estimate, ends = phrases.difference(difference)
    yardstick = f"{name}'s own seed-to-seed spread of {phrases.number(spread, 2)}"
    if -spread <= difference.low and difference.high <= spread:
        return "same", f"the difference of {estimate} ({ends}) lies within {yardstick}"
    if difference.low > 0 and difference.estimate > spread:
        return "worse", f"it is higher by {estimate.lstrip('+')} ({ends}), more than {yardstick}"
    if difference.high < 0 and difference.estimate < -spread:
        return "better", f"it is lower by {estimate.lstrip('-')} ({ends}), more than {yardstick}"
    uncertain = f"the difference of {estimate} ({ends}) is too uncertain beside {yardstick}"
    return "cannot tell", f"{uncertain}; run more seeds"


def _common(series: Series) -> Series:
    return cut_to_common_length(series)[0]


def _last(series: Series) -> int:
    return final_steps(min(map(len, series.values())))


def _mean(finals: dict[int, float]) -> float:
    return sum(finals.values()) / len(finals)
