"""Each circumstance that weakens a conclusion is named, and none is named without cause."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from handmade import record

from halfstep.compare.conditions import foreign_load, same_but_for_seed, warnings


def at(seconds: float) -> str:
    return (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).isoformat()


def test_nothing_is_wrong_with_like_runs() -> None:
    runs = [record(policy, seed, [1.0] * 9) for policy in ("fp32", "bf16-mixed") for seed in range(3)]
    assert warnings(runs, {}) == ()


def test_another_policy_than_asked_for() -> None:
    runs = [
        record("fp32"),
        record("auto", 0, effective="bf16-mixed"),
        record("auto", 1, effective="bf16-mixed"),
    ]
    assert warnings(runs, {}) == ("auto ran as bf16-mixed: as asked",)


def test_different_commands() -> None:
    runs = [record("fp32", command=["a.py"]), record("bf16-mixed", command=["b.py", "--lr", "1"])]
    assert warnings(runs, {}) == ("the runs are of different commands: “a.py”; “b.py --lr 1”",)


@pytest.mark.parametrize(
    ("of_zero", "of_one", "same"),
    [
        (["a.py", "--seed", "0"], ["a.py", "--seed", "1"], True),
        (["a.py", "--seed=0"], ["a.py", "--seed=1"], True),
        (["a.py", "--out=runs/0/s0"], ["a.py", "--out=runs/1/s1"], True),
        (["a.py", "--width=10", "--seed=0"], ["a.py", "--width=10", "--seed=1"], True),
        (["a.py", "--lr", "0.1"], ["a.py", "--lr", "0.2"], False),
        (["a.py", "--seed", "0"], ["a.py", "--seed", "2"], False),
        (["a.py"], ["a.py", "1"], False),
        (["a.py", "x.y0"], ["a.py", "xzy1"], False),
    ],
)
def test_the_seed_may_differ_within_the_command(of_zero: list[str], of_one: list[str], same: bool) -> None:
    zero, one = record(seed=0, command=of_zero), record(seed=1, command=of_one)
    assert same_but_for_seed(zero, one) is same
    assert same_but_for_seed(one, zero) is same
    # Between runs of the same seed nothing may differ.
    assert same_but_for_seed(record(seed=0, command=of_zero), record("bf16-mixed", 0, command=of_one)) is False


@pytest.mark.parametrize(
    ("key", "values", "warning"),
    [
        (
            "device",
            ("NVIDIA H100", "NVIDIA A100"),
            "the runs were made on different devices: NVIDIA H100, NVIDIA A100",
        ),
        ("cpu", ("Xeon", "EPYC"), "the runs were made on different processors: Xeon, EPYC"),
        (
            "torch",
            ("2.11.0", "2.13.0"),
            "the runs were made under different versions of PyTorch: 2.11.0, 2.13.0",
        ),
        ("threads", (2, 4), "the runs were made with different numbers of threads: 2, 4"),
    ],
)
def test_different_machines(key: str, values: tuple[Any, Any], warning: str) -> None:
    runs = [record(policy, environment={key: value}) for policy, value in zip("ab", values, strict=True)]
    assert warnings(runs, {}) == (warning,)


def test_missing_seeds_and_unlike_lengths() -> None:
    runs = [record("fp32", 0, [1.0] * 9), record("bf16-mixed", 0, [1.0] * 7)]
    runs.append(record("bf16-mixed", 1, [1.0] * 3, outcome="error"))  # cut short: no surprise
    assert warnings(runs, {"fp32": [1, 2]}) == (
        "fp32 has no run of seed 1, 2; differences are paired over the seeds that are there",
        "the runs made 7 or 9 steps; losses are compared over the shorter",
    )


def test_a_loaded_machine() -> None:
    quiet = record("fp32", started=at(0), environment={"load": 1.5})
    assert warnings([quiet], {}) == ()
    busy = record("bf16-mixed", started=at(0), environment={"load": 1.6})
    (warning,) = warnings([quiet, busy], {})
    assert warning.startswith(
        "other work was on the machine when bf16-mixed, seed 0, started: a load of 1.6 on 2 cores"
    )
    assert foreign_load(record(environment={"load": None}), []) is None


def test_our_own_earlier_runs_are_no_other_work() -> None:
    """Runs one after another on two threads, against the kernel's recursion stepped every five seconds."""
    starts, lengths, gap = [0.0, 42.0, 120.0], [40.0, 75.0, 200.0], 2.0
    keep = math.exp(-5 / 60)
    runs, load, now = [], 0.0, 0.0
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        while now + 5 <= start:
            busy = any(s <= now < s + d for s, d in zip(starts[:index], lengths[:index], strict=True))
            load, now = load * keep + 2 * busy * (1 - keep), now + 5
        runs.append(record("fp32", index, started=at(start), lasted=length, environment={"load": load}))
    assert runs[-1].header.environment["load"] > 0.75 * 2 > 1.0 > gap / 60  # taken at its word, this would warn
    assert warnings(runs, {}) == ()
    for run in runs:
        remaining = foreign_load(run, [other for other in runs if other is not run])
        assert remaining is not None and remaining < 0.2
    disturbed = record("fp32", 2, started=at(120), environment={"load": 4.0})
    assert len(warnings([*runs[:2], disturbed], {})) == 1


def test_what_a_run_leaves_in_the_load() -> None:
    short = record("fp32", 0, started=at(0), lasted=10.0, environment={"threads": 3})
    following = record("bf16-mixed", 0, started=at(40), environment={"load": 4.0})
    left = 3 * (1 - math.exp(-10 / 60)) * math.exp(-30 / 60)  # loaded for 10 s, forgotten for 30 s
    assert foreign_load(following, [short]) == pytest.approx(4.0 - left)
    assert foreign_load(short, [following]) == 0.1  # a later run leaves nothing in an earlier one


def test_a_killed_run_leaves_the_load_of_its_steps() -> None:
    killed = record("fp32", 0, [1.0] * 101, seconds=1.0, outcome=None, started=at(0))
    ended = record("fp32", 0, started=at(0), lasted=100.0)
    following = record("fp32", 1, started=at(101), environment={"load": 1.9})
    assert foreign_load(following, [killed]) == pytest.approx(foreign_load(following, [ended]))


def test_runs_of_one_seed_that_start_apart_are_warned_about() -> None:
    same = [record("fp32", 0, [2.0]), record("bf16-mixed", 0, [2.05]), record("bf16-mixed", 1, [9.0])]
    assert not [w for w in warnings(same, {}) if "more than rounding explains" in w]
    apart = [record("fp32", 0, [2.0]), record("bf16-mixed", 0, [1.5])]
    (warning,) = [w for w in warnings(apart, {}) if "more than rounding explains" in w]
    assert warning.startswith("seed 0 starts at a loss of 2.00 under fp32 and 1.50 under bf16-mixed")
    assert not [w for w in warnings([record("fp32", 0, [2.0]), record("x", 0, [float("nan")])], {}) if "rounding" in w]


def test_arguments_that_hold_the_runs_own_name_are_the_same_command() -> None:
    commands = [("t.py", "out/fp32.seed0.pt"), ("t.py", "out/bf16-mixed.seed1.pt"), ("t.py", "out/other.pt")]
    one, other, different = (
        record(policy, seed, [1.0], command=command)
        for policy, seed, command in zip(["fp32", "bf16-mixed", "fp32"], [0, 1, 2], commands, strict=True)
    )
    assert same_but_for_seed(one, other)
    assert not same_but_for_seed(one, different)
