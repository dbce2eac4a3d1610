"""Numbers and outcomes in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scenarios
from hypothesis import given
from hypothesis import strategies as st

from halfstep.compare.result import Interval
from halfstep.report import wording


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (432 * 2**20, "432 MiB"),
        (1023 * 2**20, "0.999 GiB"),
        (11.1 * 2**30, "11.1 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_size(count: float, expected: str) -> None:
    assert wording.size(count) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(1.8, "1.80×"), (0.764, "0.76×"), (0.025, "0.025×"), (12.34, "12.3×"), (0.999, "0.999×")]
)
def test_ratio(value: float, expected: str) -> None:
    assert wording.ratio(value) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.76, 1.84, "1.76–1.84"), (1.665, 1.668, "1.665–1.668"), (2.0, 2.0, "2.0000–2.0000")]
)
def test_an_interval_has_digits_that_tell_its_ends_apart(low: float, high: float, expected: str) -> None:
    assert wording.speed_up(Interval((low + high) / 2, low, high, 0.95))[1] == expected


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(0.0021, -0.0019, 0.0061, 0.9), ("+0.0021", "-0.0019 to +0.0061")),
        (Interval(-0.123, -0.2, -0.05, 0.9), ("-0.123", "-0.200 to -0.050")),
        (Interval(-0.00001, -0.02, 0.02, 0.9), ("+0.000", "-0.020 to +0.020")),
        (Interval(0.5, 0.5, 0.5, 0.9), ("+0.500", "0.500 to 0.500")),
        (Interval(float("nan"), float("nan"), float("nan"), 0.9), ("+NaN", "NaN to NaN")),
    ],
)
def test_difference(interval: Interval, expected: tuple[str, str]) -> None:
    assert wording.difference(interval) == expected


def test_outcomes_are_counted() -> None:
    result = scenarios.one_seed()[1].policies[0]
    assert wording.outcome(result) == "finished"
    assert wording.outcome(replace(result, outcomes=("finished", "crashed", "finished"))) == "2 finished, 1 crashed"
    assert wording.outcome(replace(result, outcomes=())) == "no runs"


def test_a_notice_of_several_policies_is_said_once() -> None:
    comparison = scenarios.one_seed()[1]
    policies = tuple(replace(result, notices=("same for all",)) for result in comparison.policies)
    assert wording.notices(replace(comparison, policies=policies)) == [("same for all", ("fp32", "bf16-mixed"))]


@given(st.text(alphabet="ab(): .,;fp32"))
def test_the_weighted_verdict_keeps_every_character(verdict: str) -> None:
    comparison = replace(scenarios.one_seed()[1], verdict=verdict)
    sentences = ["".join(part for part, _ in sentence) for sentence in wording.weighted(comparison)]
    assert " ".join(sentences) == verdict


def test_the_conclusion_is_told_from_its_evidence() -> None:
    verdict = "bf16-mixed is faster (1.5 to 1.7), with the same loss: within 0.1. fp32 crashed (A: b. c)."
    comparison = replace(scenarios.one_seed()[1], verdict=verdict)
    assert wording.weighted(comparison) == [
        [
            ("bf16-mixed is faster ", True),
            ("(1.5 to 1.7),", False),
            (" with the same loss:", True),
            (" within 0.1.", False),
        ],
        [("fp32 crashed ", True), ("(A: b. c).", False)],
    ]
