"""Digits follow uncertainty, and no rounding shows a number that was not there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.compare import phrases
from halfstep.compare.result import Interval


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.6, 3, "1.60"),
        (9.996, 3, "10.0"),
        (0.0099996, 3, "0.0100"),
        (0.021, 2, "0.021"),
        (-123.4, 3, "-123"),
        (18234.0, 3, "18234"),
        (0, 3, "0"),
        (1.5e-7, 2, "1.5e-07"),
        (2e9, 3, "2.00e+09"),
        (math.nan, 3, "NaN"),
        (math.inf, 3, "infinity"),
        (-math.inf, 3, "-infinity"),
    ],
)
def test_number(value: float, digits: int, text: str) -> None:
    assert phrases.number(value, digits) == text


@given(st.floats(1e-5, 9e5), st.integers(1, 6))
def test_number_is_right_to_its_digits(value: float, digits: int) -> None:
    assert float(phrases.number(value, digits)) == pytest.approx(value, rel=0.5000001 * 10 ** (1 - digits))


@pytest.mark.parametrize(
    ("interval", "estimate", "ends"),
    [
        (Interval(1.624, 1.551, 1.698, 0.95), "1.62", "95 % interval 1.55 to 1.70"),
        (Interval(1.6234, 1.6211, 1.6256, 0.95), "1.623", "95 % interval 1.621 to 1.626"),
        (Interval(40.31, 38.12, 42.56, 0.95), "40.3", "95 % interval 38.1 to 42.6"),
        (Interval(0.0249, 0.02, 0.03, 0.95), "0.025", "95 % interval 0.020 to 0.030"),
        (Interval(2.0, 2.0, 2.0, 0.95), "2.00", "95 % interval 2.00 to 2.00"),
        (Interval(1234.0, 1200.0, 1300.0, 0.95), "1234", "95 % interval 1200 to 1300"),
    ],
)
def test_ratio(interval: Interval, estimate: str, ends: str) -> None:
    assert phrases.ratio(interval) == (estimate, ends)


@pytest.mark.parametrize(
    ("interval", "estimate", "ends"),
    [
        (Interval(0.0031, -0.004, 0.0102, 0.9), "+0.0031", "90 % interval -0.0040 to +0.0102"),
        (Interval(0.003, -0.02, 0.026, 0.9), "+0.003", "90 % interval -0.020 to +0.026"),
        (Interval(-0.0001, -0.02, 0.02, 0.9), "+0.000", "90 % interval -0.020 to +0.020"),
        (Interval(0.1, 0.1, 0.1, 0.9), "+0.10", "90 % interval +0.10 to +0.10"),
        (Interval(0.0, 0.0, 0.0, 0.9), "0", "90 % interval 0 to 0"),
        (Interval(-250.0, -900.0, 400.0, 0.9), "-250", "90 % interval -900 to +400"),
        (Interval(2e-12, 1e-12, 3e-12, 0.9), "+2.0e-12", "90 % interval +1.0e-12 to +3.0e-12"),
    ],
)
def test_difference(interval: Interval, estimate: str, ends: str) -> None:
    assert phrases.difference(interval) == (estimate, ends)


def test_inverse_turns_the_interval_round() -> None:
    assert phrases.inverse(Interval(0.5, 0.4, 0.8, 0.95)) == Interval(2.0, 1.25, 2.5, 0.95)


def test_duration_and_counts() -> None:
    assert [phrases.duration(s) for s in (0.0123456, 0.5, 1.5, 75.0)] == ["12.3 ms", "500 ms", "1.50 s", "75.0 s"]
    assert (phrases.count(1, "seed"), phrases.count(0, "seed")) == ("1 seed", "0 seeds")
    assert [phrases.runs(1, 1), phrases.runs(3, 3), phrases.runs(1, 3)] == [
        "",
        " in all 3 runs",
        " in 1 of its 3 runs",
    ]


def test_errors_are_cited_on_one_line() -> None:
    assert phrases.cited([]) == ""
    assert phrases.cited(["ValueError: a\n  b", "KeyError"]) == " (ValueError: a b; and 1 other error)"
    assert phrases.cited(["x" * 161]) == f" ({'x' * 159}…)"
