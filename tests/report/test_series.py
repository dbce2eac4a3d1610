"""Reduction of records to drawable arrays, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scenarios
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.report import series
from halfstep.report.figures import losses
from halfstep.report.svg import looks

ANY_LOSS = st.floats(allow_nan=True, allow_infinity=True)
NICE_LOSS = st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf)


def finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


@given(st.lists(NICE_LOSS, max_size=40), st.integers(1, 7))
def test_group_means_are_means_of_the_finite_values(values: list[float], size: int) -> None:
    expected = [finite_mean(values[start : start + size]) for start in range(0, len(values), size)]
    np.testing.assert_allclose(series.group_means(np.array(values), size), expected, rtol=1e-9, atol=1e-6)


@given(st.lists(st.lists(NICE_LOSS, max_size=8), max_size=5))
def test_the_band_over_seeds_of_unlike_length(runs: list[list[float]]) -> None:
    band = series.over_seeds([np.array(run) for run in runs])
    longest = max(map(len, runs), default=0)
    assert len(band.mean) == len(band.low) == len(band.high) == longest
    for point in range(longest):
        there = [run[point] for run in runs if point < len(run) and math.isfinite(run[point])]
        expected = (finite_mean(there), min(there), max(there)) if there else (math.nan,) * 3
        np.testing.assert_allclose((band.mean[point], band.low[point], band.high[point]), expected, atol=1e-6)


def test_the_seed_deviation_averages_the_variance_over_neighbours() -> None:
    generator = np.random.default_rng(0)
    runs = [generator.normal(size=60) for _ in range(3)]
    deviation = series.seed_deviation(runs)
    assert deviation is not None
    variances = np.var(runs, axis=0, ddof=1)
    width = 5  # a twelfth of 60
    for point in range(60):
        neighbours = variances[max(0, point - width // 2) : point + width // 2 + 1]
        assert deviation[point] == pytest.approx(math.sqrt(neighbours.mean()))


def test_one_seed_has_no_deviation_and_points_with_one_seed_draw_none() -> None:
    assert series.seed_deviation([np.ones(5)]) is None
    deviation = series.seed_deviation([np.array([1.0, 2.0, math.nan]), np.array([3.0, 2.0, 2.0])])
    assert deviation is not None
    np.testing.assert_allclose(deviation, [math.sqrt(2), 0.0, math.nan])


def test_differences_are_paired_by_seed() -> None:
    runs = {
        "fp32": [scenarios.record("fp32", seed) for seed in (0, 1)],
        "bf16-mixed": [scenarios.record("bf16-mixed", seed) for seed in (1, 2)],
    }
    curves = series.loss_curves(runs, 0)
    (only,) = curves.differences("bf16-mixed", "fp32")
    ours, theirs = runs["bf16-mixed"][0].losses, runs["fp32"][1].losses
    np.testing.assert_allclose(only, np.subtract(ours, theirs))


def test_long_runs_are_averaged_and_short_ones_left_alone() -> None:
    record = scenarios.record(steps=50)
    curves = series.loss_curves({"fp32": [record]}, 0, max_points=50)
    assert curves.steps_per_point == 1
    np.testing.assert_array_equal(curves.steps, np.arange(1, 51))
    np.testing.assert_array_equal(curves.band("fp32").mean, record.losses)

    curves = series.loss_curves({"fp32": [record]}, 0, max_points=20)
    assert curves.steps_per_point == 3 and len(curves.steps) == 17
    assert curves.steps[0] == 2.0, "the middle of steps 1, 2, 3"
    assert curves.band("fp32").mean[0] == pytest.approx(sum(record.losses[:3]) / 3)


def test_a_run_that_broke_off_is_marked_where_it_did() -> None:
    records, comparison = scenarios.three_policies()
    curves = series.loss_curves(series.runs_by_policy(records, comparison), 0)
    assert [step for step, _ in curves.stopped["fp16-mixed"]] == [17.0]
    assert curves.stopped["fp32"] == ()


def test_runs_are_grouped_by_what_was_asked_for() -> None:
    records, comparison = scenarios.single_run()
    assert list(series.runs_by_policy(records, comparison)) == ["auto"]


def test_the_scale_history_keeps_every_change() -> None:
    record = scenarios.record("fp16-mixed", steps=60)
    steps, scales = series.scale_history(record, 0)
    assert list(zip(steps, scales, strict=True)) == [(1, 2**20), (2, 2**19), (3, 2**18), (32, 2**17), (60, 2**17)]
    assert [len(part) for part in series.scale_history(scenarios.record("fp32"), 0)] == [0, 0]


def test_skipped_steps_count_every_skip_of_every_run() -> None:
    records, comparison = scenarios.three_policies()
    fp16 = [record for record in records if record.header.policy == "fp16-mixed"]
    counted = next(result.skipped_steps for result in comparison.policies if result.policy == "fp16-mixed")
    assert len(series.skipped_steps(fp16)) == counted > 0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50), st.integers(2, 20))
def test_thinned_values_keep_the_extremes_and_the_order(values: list[float], most: int) -> None:
    kept = series.thinned(np.array(values), most)
    assert len(kept) == min(most, len(values))
    assert kept[0] == min(values) and kept[-1] == max(values)
    assert (np.diff(kept) >= 0).all() and set(kept) <= set(values)


@settings(max_examples=25, deadline=None)  # drawing takes a tenth of a second
@given(st.lists(ANY_LOSS | st.none(), min_size=1, max_size=12), st.lists(ANY_LOSS, min_size=1, max_size=12))
def test_any_losses_can_be_drawn(ours: list[float | None], theirs: list[float]) -> None:
    """Whatever numbers a broken training writes, the figure is drawn without a warning or a coordinate that is none."""
    _, comparison = scenarios.one_seed()
    runs = {}
    for policy, values in (("fp32", theirs), ("bf16-mixed", ours)):
        run = scenarios.record(policy, steps=len(values))
        steps = tuple(replace(step, loss=loss) for step, loss in zip(run.steps, values, strict=True))
        runs[policy] = [replace(run, steps=steps)]
    chart = losses(runs, comparison, looks(list(runs)), 0, several=False)
    drawn = any(loss is not None and math.isfinite(loss) for loss in (*ours, *theirs))
    assert (chart.drawing is not None) == drawn
    if chart.drawing:
        assert "nan" not in chart.drawing.wide and "inf" not in chart.drawing.wide
