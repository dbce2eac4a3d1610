"""Every verdict on speed and quality from numbers made for it, and how often each occurs by chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from halfstep.compare.judgement import judge_quality, judge_speed
from halfstep.compare.result import Quality, Speed

Series = Mapping[int, Sequence[float]]


def speed(baseline: Series, policy: Series) -> Speed:
    judged = judge_speed(policy, "fp32", baseline)
    assert judged is not None
    return judged


def steady(*seconds: float, steps: int = 20) -> Series:
    return {seed: [value] * steps for seed, value in enumerate(seconds)}


def quality(baseline: Sequence[float], policy: Sequence[float], steps: int = 20) -> Quality:
    """Constant losses, so that each run's final loss is the number given."""
    judged = judge_quality(0, steady(*policy, steps=steps), {}, "fp32", steady(*baseline, steps=steps))
    assert judged is not None
    return judged


def test_faster_with_the_numbers() -> None:
    judged = speed(steady(0.20, 0.21, 0.22), steady(0.10, 0.104, 0.111))
    assert judged.verdict == "faster"
    assert judged.speed_up is not None and judged.speed_up.estimate == pytest.approx(2.0, rel=0.01)
    assert judged.reason.startswith("95 % interval 1.9") and judged.reason.endswith(" over 3 seeds")
    assert judged.median_seconds == pytest.approx(0.104)
    assert judged.timed_steps == 60


def test_slower_counts_the_other_way_round() -> None:
    judged = speed(steady(0.1, 0.1, 0.1), steady(0.25, 0.25, 0.25))
    assert judged.verdict == "slower"
    assert judged.speed_up is not None and judged.speed_up.estimate == pytest.approx(0.4)
    assert judged.reason == "95 % interval 2.50 to 2.50 × slower over 3 seeds"


def test_a_difference_nobody_cares_for_is_the_same_speed() -> None:
    judged = speed(steady(0.102, 0.102), steady(0.1, 0.1))  # 2 % for certain
    assert judged.verdict == "same"
    assert judged.reason == "1.02 ×, 95 % interval 1.02 to 1.02 over 2 seeds"


def test_an_interval_that_includes_one_and_more_tells_nothing() -> None:
    judged = speed(steady(0.10, 0.12, 0.10), steady(0.10, 0.10, 0.12))
    assert judged.verdict == "cannot tell"
    assert "includes 1; run more seeds on a quiet machine" in judged.reason


def test_an_interval_may_exclude_one_and_be_too_wide() -> None:
    judged = speed(steady(2.0, 2.2, 3.0), steady(1.0, 1.0, 1.0))
    assert judged.speed_up is not None and judged.speed_up.low > 1
    assert judged.speed_up.high / judged.speed_up.low > 1.5
    assert judged.verdict == "cannot tell"
    assert "is too wide" in judged.reason


def test_one_seed_says_what_its_interval_covers() -> None:
    judged = speed({0: [0.2, 0.21] * 20}, {0: [0.1, 0.105] * 20})
    assert judged.verdict == "faster"
    assert judged.reason.endswith("from one seed, which covers only the noise within a run")


@pytest.mark.parametrize(
    ("baseline", "policy", "reason"),
    [
        ({}, {0: [1.0] * 9}, "there is no fp32 run to compare with"),
        ({0: [1.0] * 9}, {0: [1.0] * 1}, "only 1 timed step after the warm-up; at least 5 are needed"),
        (
            {0: [1.0] * 3},
            {0: [1.0] * 9},
            "fp32 has only 3 timed steps after the warm-up; at least 5 are needed",
        ),
        ({0: [1.0] * 9}, {1: [1.0] * 9}, "no seed has 5 timed steps under both"),
    ],
)
def test_without_pairs_of_timed_runs_there_is_no_ratio(baseline: Series, policy: Series, reason: str) -> None:
    judged = speed(baseline, policy)
    assert (judged.speed_up, judged.verdict, judged.reason) == (None, "cannot tell", reason)


def test_a_run_cut_short_does_not_move_the_median_over_seeds() -> None:
    judged = judge_speed({0: [1.0] * 9, 1: [1.2] * 9, 2: [50.0] * 2}, "fp32", None)
    assert judged is not None
    assert judged.median_seconds == pytest.approx(1.1)
    assert judged.verdict is None
    assert judge_speed({0: []}, "fp32", None) is None


def test_same_loss() -> None:
    judged = quality([2.00, 2.02, 2.04], [2.003, 2.021, 2.043])
    assert judged.verdict == "same"
    assert judged.seed_spread == pytest.approx(0.02)
    assert judged.reason == (
        "the difference of +0.0023 (90 % interval +0.0004 to +0.0043) lies within fp32's own seed-to-seed "
        "spread of 0.020"
    )
    assert judged.final_loss == pytest.approx(2.0223, abs=1e-4)
    assert judged.last_steps == 5


def test_worse_and_better_are_mirror_images() -> None:
    worse = quality([2.00, 2.02, 2.04], [2.10, 2.122, 2.139])
    better = quality([2.00, 2.02, 2.04], [1.90, 1.918, 1.941])
    assert worse.verdict == "worse"
    assert worse.reason.startswith("it is higher by 0.1003 (90 % interval +0.0")
    assert worse.reason.endswith("), more than fp32's own seed-to-seed spread of 0.020")
    assert better.verdict == "better"
    assert better.reason.startswith("it is lower by 0.1003 (90 % interval -0.1")


@pytest.mark.parametrize(
    "policy",
    [
        [1.90, 2.02, 2.20],  # noisy: the interval holds 0 and more than the margin
        [2.010, 2.034, 2.060],  # certainly above 0, not certainly within the margin, nor clearly beyond it
    ],
)
def test_uncertain_differences_are_not_told(policy: list[float]) -> None:
    judged = quality([2.00, 2.02, 2.04], policy)
    assert judged.verdict == "cannot tell"
    assert judged.reason.endswith("is too uncertain beside fp32's own seed-to-seed spread of 0.020; run more seeds")


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds(seeds: int) -> None:
    judged = quality([2.0, 2.1][:seeds], [2.0, 2.1][:seeds])
    noun = "seed" if seeds == 1 else "seeds"
    assert judged.verdict == "cannot tell"
    assert judged.reason == f"fp32 ended with {seeds} {noun}; at least 3 are needed to know its spread"
    assert (judged.seed_spread is None) is (seeds == 1)


def test_too_few_shared_seeds() -> None:
    judged = judge_quality(0, {2: [2.0] * 20, 5: [2.0] * 20}, {}, "fp32", steady(2.0, 2.1, 2.2))
    assert judged is not None
    assert judged.reason == "1 seed ended under both; at least 2 are needed"


def test_too_few_steps() -> None:
    judged = quality([2.0, 2.1, 2.2], [2.0, 2.1, 2.2], steps=19)
    assert (judged.verdict, judged.reason) == ("cannot tell", "19 steps with a loss; at least 20 are needed")
    assert quality([2.0, 2.1, 2.2], [2.0, 2.1, 2.2], steps=20).verdict == "same"


def test_an_ignored_seed_leaves_exact_equality_only() -> None:
    same = quality([2.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    assert same.verdict == "same"
    assert "identical to fp32's, though the script ignored the seed (all 3 runs of fp32" in same.reason
    other = quality([2.0, 2.0, 2.0], [2.1, 2.1, 2.1])
    assert other.verdict == "cannot tell"
    assert "the script ignored the seed" in other.reason
    assert "a difference of +0.10 has no spread to be judged by" in other.reason
    # Threads add in another order: the runs differ by rounding, which is not a spread over seeds either.
    rounding = quality([2.0, 2.0000002, 2.0], [2.0, 2.0000002, 2.0000002])
    assert rounding.verdict == "cannot tell"
    assert "the script ignored the seed" in rounding.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_diverged(bad: float) -> None:
    judged = quality([2.0, 2.1, 2.2], [2.0, bad, 2.2])
    assert judged.verdict == "diverged"
    assert judged.reason == "the loss ended as NaN or infinity in 1 of its 3 runs"
    assert not math.isfinite(judged.final_loss)
    assert judged.difference is None
    mixed = quality([2.0, 2.1, 2.2], [math.inf, -math.inf, 2.2])
    assert mixed.verdict == "diverged"


def test_nothing_is_told_beside_a_baseline_that_diverged() -> None:
    for policy in ([2.0, 2.1, 2.2], [math.nan, 2.1, 2.2]):
        judged = quality([2.0, math.inf, 2.2], policy)
        assert (judged.verdict, judged.reason) == ("cannot tell", "fp32 itself diverged")


def test_runs_of_unlike_length_are_compared_at_the_same_step() -> None:
    falling = [10.0 - 0.1 * i for i in range(60)]
    baseline = {seed: [x + 0.1 * seed for x in falling] for seed in range(3)}
    policy = {seed: series[:40] for seed, series in baseline.items()}
    judged = judge_quality(0, policy, {}, "fp32", baseline)
    assert judged is not None
    assert judged.verdict == "same"
    assert judged.difference is not None and judged.difference.estimate == pytest.approx(0)
    assert judged.last_steps == 8


def test_runs_cut_short_are_shown_but_not_judged() -> None:
    judged = judge_quality(0, {}, {0: [3.0] * 30}, "fp32", steady(2.0, 2.1, 2.2))
    assert judged is not None
    assert (judged.verdict, judged.final_loss) == ("cannot tell", 3.0)
    assert judged.reason == "no run came to its end, so there is nothing to compare"
    lonely = judge_quality(0, steady(2.0), {}, "fp32", {})
    assert lonely is not None and lonely.reason == "no fp32 run came to its end, so there is nothing to compare"
    assert judge_quality(0, {}, {}, "fp32", steady(2.0)) is None


def test_the_baseline_is_not_judged() -> None:
    judged = judge_quality(1, steady(2.0, 2.1, 2.2), {}, "fp32", None)
    assert judged is not None
    assert (judged.verdict, judged.difference, judged.optimizer) == (None, None, 1)
    assert judged.seed_spread == pytest.approx(0.1)
    assert judged.reason == "the baseline; its seed-to-seed spread is 0.10"
    broken = judge_quality(0, steady(2.0, math.inf, 2.2), {}, "fp32", None)
    assert broken is not None and broken.seed_spread is None


def verdicts(seeds: int, correlation: float, shift: float, trials: int = 1500) -> Counter[str | None]:
    """Verdicts over simulated comparisons: final losses normal over seeds with spread 1, moved by ``shift``.

    ``correlation`` is that of a seed's loss under the policy with the same seed's under the baseline.
    """
    generator = np.random.default_rng([seeds, round(100 * correlation), round(100 * shift)])
    told: Counter[str | None] = Counter()
    for _ in range(trials):
        baseline = 100 + generator.normal(size=seeds)
        own = 100 + generator.normal(size=seeds)
        policy = shift + correlation * baseline + math.sqrt(1 - correlation**2) * own
        policy += (1 - correlation - math.sqrt(1 - correlation**2)) * 100  # keep the mean at 100 + shift
        told[quality(baseline.tolist(), policy.tolist()).verdict] += 1
    assert sum(told.values()) == trials
    return Counter({verdict: n / trials for verdict, n in told.items()})


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_no_difference_is_seldom_called_one(seeds: int, correlation: float) -> None:
    told = verdicts(seeds, correlation, shift=0.0)
    # 5 % by construction; 1500 trials are off by 0.6 % (one standard error).
    assert told["worse"] <= 0.065
    assert told["better"] <= 0.065


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_a_large_difference_is_never_called_the_same(seeds: int, correlation: float) -> None:
    told = verdicts(seeds, correlation, shift=3.0)
    assert told["same"] <= 0.005
    assert told["better"] == 0


def test_runs_that_hang_together_are_told() -> None:
    """The verdicts have power: precision moves a seed's loss by a tenth of what the seed itself does."""
    assert verdicts(5, 0.995, shift=0.0)["same"] >= 0.95
    assert verdicts(3, 0.995, shift=0.0)["same"] >= 0.85
    assert verdicts(5, 0.995, shift=3.0)["worse"] >= 0.95
    # At the margin itself, "same" is a matter of how large the spread happens to come out: never the rule.
    assert verdicts(5, 0.995, shift=1.0)["same"] <= 0.5
