"""Oracles: SciPy's intervals, closed forms, and loops that do the obvious thing slowly."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from halfstep.compare.statistics import (
    block_bootstrap,
    cut_to_common_length,
    diverged,
    final_loss,
    final_steps,
    paired_difference,
    seed_spread,
    speed_up,
    student_interval,
    timed_seconds,
)
from halfstep.record import Header, RunRecord, Step

positive = st.floats(1e-4, 1e3)


def record_of(steps: list[Step]) -> RunRecord:
    return RunRecord(Path("r.jsonl"), Header("", (), "fp32", "fp32", "", 0, {}), tuple(steps))


@given(st.lists(st.tuples(st.integers(0, 1), st.none() | positive, st.booleans()), max_size=80))
def test_timed_seconds_leave_out_warm_up_tracked_and_untimed_steps(
    raw: list[tuple[int, float | None, bool]],
) -> None:
    steps = [
        Step(i + 1, opt, 1.0, sec, True, None, None, 0, None, tracked) for i, (opt, sec, tracked) in enumerate(raw)
    ]
    expected, position, total = [], 0, sum(opt == 0 for opt, _, _ in raw)
    for opt, seconds, tracked in raw:
        if opt != 0:
            continue
        position += 1
        if position <= 3 or 10 * (position - 1) < total:  # 1-based: the first tenth, rounded up
            continue
        if seconds is not None and not tracked:
            expected.append(seconds)
    assert timed_seconds(record_of(steps)) == expected


@pytest.mark.parametrize(("steps", "counted"), [(3, 0), (4, 1), (30, 27), (31, 27), (100, 90), (101, 90)])
def test_warm_up_is_a_tenth_at_least_three(steps: int, counted: int) -> None:
    run = [Step(i + 1, 0, 1.0, float(i + 1), True, None, None, 0, None) for i in range(steps)]
    assert timed_seconds(record_of(run)) == [float(i + 1) for i in range(steps - counted, steps)]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.sampled_from([0.8, 0.9, 0.95]))
def test_student_interval_is_scipys(values: list[float], confidence: float) -> None:
    ours = student_interval(values, confidence)
    n = len(values)
    half = stats.t.interval(confidence, n - 1)[1] * np.std(values, ddof=1) / math.sqrt(n)
    assert ours.estimate == pytest.approx(np.mean(values), abs=1e-9)
    assert ours.low == pytest.approx(np.mean(values) - half, rel=1e-9, abs=1e-9)
    assert ours.high == pytest.approx(np.mean(values) + half, rel=1e-9, abs=1e-9)


def test_speed_up_over_seeds_is_the_t_interval_of_paired_log_ratios() -> None:
    fp32 = {0: [0.2] * 9, 1: [0.3] * 9, 2: [0.4] * 9, 7: [9.0] * 9}
    bf16 = {0: [0.1] * 5, 1: [0.2] * 5, 2: [0.25] * 5, 5: [9.0] * 9}  # 5 and 7 have no partner
    interval = speed_up(fp32, bf16)
    assert interval is not None
    logs = np.log([2.0, 1.5, 1.6])
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert interval.estimate == pytest.approx(np.exp(logs.mean()))
    assert (interval.low, interval.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert interval.confidence == 0.95


@given(st.floats(0.1, 10), st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_speed_up_of_exact_ratio_has_no_width(factor: float, times: list[float]) -> None:
    fp32 = {seed: [factor * t] * 6 for seed, t in enumerate(times)}
    interval = speed_up(fp32, {seed: [t] * 6 for seed, t in enumerate(times)})
    assert interval is not None
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((factor,) * 3)


def test_speed_up_needs_five_timed_steps_of_a_shared_seed() -> None:
    assert speed_up({0: [1.0] * 4}, {0: [1.0] * 9}) is None
    assert speed_up({0: [1.0] * 9}, {0: [1.0] * 4}) is None
    assert speed_up({0: [1.0] * 9}, {1: [1.0] * 9}) is None
    assert speed_up({}, {}) is None
    assert speed_up({0: [1.0] * 5}, {0: [1.0] * 5}) is not None
    # With one pair long enough, the short pair does not turn it into two seeds.
    one = speed_up({0: [1.0, 2.0] * 9, 1: [1.0] * 4}, {0: [1.0] * 18, 1: [1.0] * 9})
    assert one == block_bootstrap([1.0, 2.0] * 9, [1.0] * 18)


def test_block_bootstrap_is_the_slow_obvious_one() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.uniform(1, 2, 40).tolist(), generator.uniform(1, 2, 23).tolist()

    draws = np.random.default_rng(0)
    medians: list[list[float]] = []
    for series in (a, b):
        block = next(k for k in range(1, 99) if k**3 >= len(series))
        blocks = [series[i : i + block] for i in range(len(series) - block + 1)]
        medians.append([])
        starts = draws.integers(0, len(blocks), size=(2000, -(-len(series) // block)))
        for row in starts:
            resample = [value for i in row for value in blocks[i]][: len(series)]
            medians[-1].append(float(np.median(resample)))
    ratios = sorted(x / y for x, y in zip(*medians, strict=True))

    interval = block_bootstrap(a, b)
    assert interval.estimate == pytest.approx(np.median(a) / np.median(b))
    assert interval.low == pytest.approx(np.percentile(ratios, 2.5))
    assert interval.high == pytest.approx(np.percentile(ratios, 97.5))


def test_block_bootstrap_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    series = random.Random(1).choices([1.0, 1.5, 2.0], k=50)
    whole = block_bootstrap(series, series[::-1])
    real_split = np.array_split
    monkeypatch.setattr(np, "array_split", lambda rows, parts: real_split(rows, 7))
    assert block_bootstrap(series, series[::-1]) == whole


@given(
    st.lists(positive, min_size=5, max_size=30),
    st.lists(positive, min_size=5, max_size=30),
    st.floats(0.5, 2),
)
def test_block_bootstrap_contains_its_estimate_and_scales(a: list[float], b: list[float], factor: float) -> None:
    interval = block_bootstrap(a, b)
    assert interval.low <= interval.estimate <= interval.high
    scaled = block_bootstrap([factor * x for x in a], b)
    assert (scaled.low, scaled.estimate, scaled.high) == pytest.approx(
        (factor * interval.low, factor * interval.estimate, factor * interval.high)
    )


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.90), (0.5, 0.82)])
def test_block_bootstrap_covers_the_truth(correlation: float, least: float) -> None:
    """Log-normal AR(1) step times of equal medians: 95 % nominal, a little less where steps hang together."""
    generator = np.random.default_rng(11)
    trials, covered = 100, 0
    for _ in range(trials):
        runs = []
        for _ in range(2):
            noise = generator.normal(size=120)
            for i in range(1, len(noise)):
                noise[i] = correlation * noise[i - 1] + math.sqrt(1 - correlation**2) * noise[i]
            runs.append(np.exp(0.1 * noise).tolist())
        interval = block_bootstrap(*runs)
        covered += interval.low <= 1 <= interval.high
    assert covered / trials >= least


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=120))
def test_final_loss_is_the_mean_of_the_last_fifth_at_least_five(losses: list[float]) -> None:
    count = max(5, -(-len(losses) // 5))
    last = list(reversed(list(reversed(losses))[:count]))
    assert final_steps(len(losses)) == len(last)
    assert final_loss(losses) == pytest.approx(np.mean(last), abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_divergence_is_a_loss_that_is_not_finite_among_the_last_steps(bad: float) -> None:
    losses = [1.0] * 100
    for position in range(100):
        spoiled = [*losses[:position], bad, *losses[position + 1 :]]
        assert diverged(spoiled) is (position >= 80)
        assert math.isfinite(final_loss(spoiled)) is (position < 80)
    assert not diverged(losses)
    assert math.isnan(final_loss([math.inf, -math.inf]))


def test_paired_difference_takes_shared_seeds_only() -> None:
    fp32, bf16 = {0: 1.0, 1: 2.0, 2: 3.0, 9: 50.0}, {0: 1.1, 1: 2.3, 2: 3.2, 4: -50.0}
    interval = paired_difference(fp32, bf16)
    assert interval is not None
    expected = stats.ttest_rel([1.1, 2.3, 3.2], [1.0, 2.0, 3.0]).confidence_interval(0.90)
    assert interval.estimate == pytest.approx(0.2)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0}) is None


def test_seed_spread_is_the_sample_standard_deviation() -> None:
    assert seed_spread({0: 1.0, 1: 2.0, 4: 4.0}) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert seed_spread({0: 1.0}) is None


def test_runs_of_unlike_length_are_cut_to_the_shortest() -> None:
    assert cut_to_common_length({0: [1, 2, 3], 1: [4, 5]}, {0: [6, 7, 8, 9]}) == [
        {0: [1, 2], 1: [4, 5]},
        {0: [6, 7]},
    ]
    assert cut_to_common_length({}, {}) == [{}, {}]
