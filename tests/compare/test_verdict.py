"""From records made by hand to the conclusion: outcomes, every field, and sentences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import record
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.compare import CompareError, Comparison, Run, RunResult, compare, to_json
from halfstep.record import Memory, Notice, RunRecord

SPREAD = (0.0, 0.02, 0.04)  # of three seeds: a standard deviation of 0.02


def three(policy: str, *, shift: Sequence[float] = (0, 0, 0), **kwargs: Any) -> list[RunRecord]:
    return [
        record(policy, seed, [2.0 + base + moved] * 20, **kwargs)
        for seed, (base, moved) in enumerate(zip(SPREAD, shift, strict=True))
    ]


def by_policy(comparison: Comparison, policy: str) -> Any:
    return next(result for result in comparison.policies if result.policy == policy)


def lost(policy: str, seed: int, exit_code: int, tmp_path: Path, output: str = "", **kwargs: Any) -> RunResult:
    log = tmp_path / f"{policy}.seed{seed}.log"
    log.write_text(output)
    return RunResult(Run(policy, seed), None, log, exit_code, **kwargs)


def test_the_whole_conclusion() -> None:
    notice = Notice("own-autocast", "the script uses autocast itself", "train.py:3")
    fp32 = three("fp32", seconds=0.020, peak_bytes=1000)
    bf16 = three("bf16-mixed", shift=(0.002, 0.001, 0.003), peak_bytes=710, skipped=2, notices=[notice, notice])
    comparison = compare([*bf16, *fp32])
    assert comparison.verdict == (
        "bf16-mixed trains 2.00 × faster than fp32 (95 % interval 2.00 to 2.00 over 3 seeds) in 71 % of "
        "the memory, "
        "with the same loss: the difference of +0.0020 (90 % interval +0.0003 to +0.0037) lies within "
        "fp32's own "
        "seed-to-seed spread of 0.020."
    )
    assert (comparison.command, comparison.baseline, comparison.seeds) == (("train.py",), "fp32", 3)
    assert [result.policy for result in comparison.policies] == ["fp32", "bf16-mixed"]
    assert not comparison.findings
    assert comparison.warnings == ()
    result = by_policy(comparison, "bf16-mixed")
    assert result.outcomes == ("finished",) * 3
    assert (result.peak_bytes, result.memory_ratio, result.peak_op) == (710, pytest.approx(0.71), "aten.mm")
    assert result.memory_by_category == {"activations": 710}
    assert result.skipped_steps == 6
    assert result.notices == ("the script uses autocast itself (train.py:3)",)
    assert result.errors == ()
    base = by_policy(comparison, "fp32")
    assert base.speed.verdict is None and base.quality[0].verdict is None
    assert base.memory_ratio == 1


def test_runs_on_a_gpu_are_compared_by_its_memory() -> None:
    host = Memory(3, 5000, "aten.stack", {"other tensors": 5000}, "cpu")

    def on_gpu(policy: str, peak: int, allocated: int) -> RunRecord:
        run = record(policy, 0, [1.0] * 20)
        steps = tuple(replace(step, device_bytes=allocated + step.step) for step in run.steps)
        return replace(run, steps=steps, memory=Memory(3, peak, "aten.mm", {}, "cuda"), host_memory=host)

    result = by_policy(compare([on_gpu("fp32", 1000, 2000), on_gpu("bf16-mixed", 600, 1500)]), "bf16-mixed")
    assert (result.peak_bytes, result.memory_ratio, result.memory_device) == (600, 0.6, "cuda")
    assert (result.allocator_bytes, result.host_bytes) == (1520, 5000)


@pytest.mark.parametrize(("device", "ratio"), [(None, 2.0), ("cpu", 2.0), ("cuda", None)])
def test_memory_of_two_kinds_is_not_compared(device: str | None, ratio: float | None) -> None:
    """Records of schema 1 do not say whose memory it was; most were made on a CPU."""
    base = replace(record("fp32", 0, [1.0] * 20), memory=Memory(3, 100, None, {}))
    other = replace(record("bf16-mixed", 0, [1.0] * 20), memory=Memory(3, 200, None, {}, device))
    assert by_policy(compare([base, other]), "bf16-mixed").memory_ratio == ratio


def test_memory_is_that_of_the_largest_run() -> None:
    runs = [record("fp32", seed, [1.0], peak_bytes=size) for seed, size in enumerate((50, 90, 70))]
    assert by_policy(compare(runs), "fp32").peak_bytes == 90


@pytest.mark.parametrize(
    ("kwargs", "outcome"),
    [
        ({}, "finished"),
        ({"outcome": "step limit"}, "finished"),
        ({"outcome": "interrupted", "exit_code": 130}, "interrupted"),
        ({"outcome": "error", "exit_code": 1, "error": "ValueError: no"}, "crashed"),
        ({"outcome": "finished", "exit_code": 3}, "crashed"),
        ({"outcome": None}, "crashed"),
        ({"losses": [1.0] * 17 + [math.nan] + [1.0] * 2}, "diverged"),
        ({"losses": {0: [1.0] * 20, 1: [1.0] * 19 + [math.inf]}}, "diverged"),
        ({"losses": [math.nan] + [1.0] * 19}, "finished"),
        ({"losses": [math.inf] * 20, "outcome": "interrupted"}, "diverged"),
        ({"losses": [math.nan] * 20, "outcome": "error", "error": "nan"}, "crashed"),
        ({"losses": [None] * 20}, "finished"),
    ],
)
def test_outcome_of_a_run(kwargs: dict[str, Any], outcome: str) -> None:
    run = record("fp32", 0, **{"losses": [1.0] * 20, **kwargs})
    comparison = compare([run])
    assert by_policy(comparison, "fp32").outcomes == (outcome,)
    assert comparison.findings is (outcome in ("crashed", "diverged"))


def test_a_run_without_an_end_is_running_only_if_asked() -> None:
    run = record("fp32", 0, [1.0] * 20, outcome=None)
    assert by_policy(compare([run]), "fp32").errors == ("it ended without a word, as a killed process does",)
    live = compare([run], running=True)
    assert by_policy(live, "fp32").outcomes == ("running",)
    assert by_policy(live, "fp32").errors == ()
    assert live.verdict.startswith("fp32 took 10.0 ms a step and ended at a loss of 1.000. fp32 is still running.")


def test_how_a_process_ended_is_known_from_the_schedule(tmp_path: Path) -> None:
    killed = record("bf16-mixed", 0, [1.0] * 20, outcome=None)
    result = RunResult(Run("bf16-mixed", 0), killed.path, tmp_path / "none.log", -9)
    comparison = compare([record("fp32", 0, [1.0] * 20), killed], runs=[result])
    assert by_policy(comparison, "bf16-mixed").errors == ("killed by SIGKILL (memory ran out?)",)
    assert "bf16-mixed crashed (killed by SIGKILL (memory ran out?))." in comparison.verdict
    assert comparison.findings


def test_a_run_without_a_record_has_crashed(tmp_path: Path) -> None:
    runs = [lost("bf16-mixed", seed, 2, tmp_path, "Traceback\nImportError: no module\n") for seed in range(3)]
    comparison = compare(three("fp32"), runs=runs)
    result = by_policy(comparison, "bf16-mixed")
    assert result.outcomes == ("crashed",) * 3
    assert result.errors == ("exit code 2, no record written: ImportError: no module",)
    assert (result.speed, result.quality, result.peak_bytes) == (None, (), None)
    assert comparison.findings
    assert comparison.verdict == (
        "bf16-mixed crashed in all 3 runs (exit code 2, no record written: ImportError: no module)."
    )


def test_policies_stand_in_the_order_asked_for_even_without_records(tmp_path: Path) -> None:
    runs = [
        lost("fp16-mixed", 0, 1, tmp_path),
        lost("bf16-mixed", 0, 1, tmp_path),
        lost("fp32", 0, 1, tmp_path),
    ]
    comparison = compare([record("bf16-mixed", 0, [1.0] * 20)], runs=runs)
    assert [result.policy for result in comparison.policies] == ["fp32", "fp16-mixed", "bf16-mixed"]
    # Records alone: in the order in which they ran, whatever the order of their files.
    late, early = record("bf16-mixed", 0, started="2026-01-02"), record("tf32", 0, started="2026-01-01")
    assert [result.policy for result in compare([late, early]).policies] == ["tf32", "bf16-mixed"]


def test_an_interrupted_run_is_no_crash(tmp_path: Path) -> None:
    runs = [lost("fp32", 1, -15, tmp_path, interrupted=True)]
    comparison = compare([record("fp32", 0, [1.0] * 20), record("bf16-mixed", 0, [1.0] * 20)], runs=runs)
    assert by_policy(comparison, "fp32").outcomes == ("finished", "interrupted")
    assert not comparison.findings
    assert comparison.verdict.endswith("fp32 was interrupted in 1 of its 2 runs.")
    assert comparison.warnings == ()  # no word about seeds that were not reached


def test_crashed_seeds_are_left_out_of_the_pairs() -> None:
    fp32 = three("fp32")
    bf16 = three("bf16-mixed")
    bf16[1] = record("bf16-mixed", 1, [500.0] * 20, outcome="error", exit_code=1, error="RuntimeError: out of memory")
    comparison = compare([*fp32, *bf16])
    (quality,) = by_policy(comparison, "bf16-mixed").quality
    assert quality.verdict == "same"
    assert quality.difference is not None and quality.difference.estimate == 0
    assert comparison.findings
    assert comparison.verdict.endswith(" bf16-mixed crashed in 1 of its 3 runs (RuntimeError: out of memory).")


def test_two_records_of_one_run_are_refused() -> None:
    with pytest.raises(CompareError, match=r"two records of fp32, seed 1: fp32.seed1.jsonl and fp32.seed1.jsonl"):
        compare([record("fp32", 1), record("fp32", 1)])


def test_nothing_is_refused() -> None:
    with pytest.raises(CompareError, match="no run records"):
        compare([])


def test_missing_seeds_are_named() -> None:
    comparison = compare([*three("fp32"), *three("bf16-mixed")[:2]])
    assert comparison.warnings == (
        "bf16-mixed has no run of seed 2; differences are paired over the seeds that are there",
    )


def test_an_effective_policy_other_than_asked_is_named() -> None:
    runs = [*three("fp32"), *three("auto", effective="bf16-mixed")]
    comparison = compare(runs)
    assert [result.policy for result in comparison.policies] == ["fp32", "auto"]
    assert comparison.verdict.startswith("auto (bf16-mixed) trains as fast as fp32 (")
    assert comparison.warnings == ("auto ran as bf16-mixed: as asked",)


# --- sentences --------------------


def test_sentence_worse() -> None:
    comparison = compare([*three("fp32"), *three("bf16-mixed", shift=(0.1, 0.102, 0.099), seconds=0.03)])
    assert comparison.findings
    assert comparison.verdict == (
        "bf16-mixed trains 3.00 × slower than fp32 (95 % interval 3.00 to 3.00 × slower over 3 seeds); "
        "its loss is "
        "worse: it is higher by 0.1003 (90 % interval +0.0978 to +0.1029), more than fp32's own "
        "seed-to-seed spread "
        "of 0.020."
    )


def test_sentence_better() -> None:
    comparison = compare([*three("fp32"), *three("tf32", shift=(-0.1, -0.1, -0.1), peak_bytes=3)])
    assert not comparison.findings
    assert comparison.verdict.endswith(
        "; its loss is better: it is lower by 0.10 (90 % interval -0.10 to -0.10), more than fp32's own "
        "seed-to-seed "
        "spread of 0.020."
    )


def test_sentence_single_seed_cannot_tell() -> None:
    runs = [record(policy, 0, [2.0] * 30, peak_bytes=100) for policy in ("fp32", "bf16-mixed")]
    assert compare(runs).verdict == (
        "bf16-mixed trains as fast as fp32 (1.00 ×, 95 % interval 1.00 to 1.00 from one seed, which "
        "covers only the "
        "noise within a run), in 100 % of the memory; whether its loss is the same cannot be told: fp32 "
        "ended with "
        "1 seed; at least 3 are needed to know its spread."
    )


def test_sentence_speed_unknown() -> None:
    runs = [*three("fp32"), *(record("bf16-mixed", s, [2.0] * 2, peak_bytes=1) for s in range(3))]
    assert compare(runs).verdict.startswith(
        "bf16-mixed trains at a speed that cannot be compared with fp32's (no step was timed after the "
        "warm-up); "
        "whether its loss is the same cannot be told: 2 steps with a loss; at least 20 are needed."
    )


def test_sentences_for_intervals_too_wide() -> None:
    fp32 = [record("fp32", s, [2.0] * 20, seconds=t) for s, t in enumerate((0.20, 0.22, 0.30))]
    faster = [record("bf16-mixed", s, [2.0] * 20, seconds=0.1) for s in range(3)]
    unknown = [record("fp16-mixed", s, [2.0] * 20, seconds=t) for s, t in enumerate((0.3, 0.2, 0.3))]
    told = compare([*fp32, *faster, *unknown]).verdict
    assert re.search(
        r"^bf16-mixed trains faster than fp32, by how much cannot be told \(2\.36 ×, but the 95 % in", told
    )
    assert re.search(
        r"fp16-mixed trains at a speed that cannot be told from fp32's \(0\.9\d\d ×, but .* includes 1", told
    )


def test_sentence_diverged() -> None:
    bad = three("fp16-mixed", shift=(0, math.nan, math.inf))
    comparison = compare([*three("fp32"), *bad])
    assert comparison.findings
    assert comparison.verdict == "fp16-mixed diverged in 2 of its 3 runs: its loss ended as NaN or infinity."
    assert by_policy(comparison, "fp16-mixed").quality[0].verdict == "diverged"


def test_sentence_baseline_diverged() -> None:
    comparison = compare([*three("fp32", shift=(0, 0, math.nan)), *three("bf16-mixed")])
    assert comparison.verdict.endswith(
        "; whether its loss is the same cannot be told: fp32 itself diverged. fp32, the baseline, "
        "diverged itself in "
        "1 of its 3 runs."
    )
    assert comparison.findings


def test_sentence_baseline_crashed() -> None:
    crashed = three("fp32", outcome="error", exit_code=1, error="KeyError: 'x'")
    assert compare([*crashed, *three("bf16-mixed")]).verdict == (
        "fp32, the baseline, crashed in all 3 runs (KeyError: 'x'), so nothing can be compared with it. "
        "bf16-mixed "
        "took 10.0 ms a step and ended at a loss of 2.020."
    )


def test_sentence_baseline_missing() -> None:
    comparison = compare([record("bf16-mixed", 0, [2.0] * 20), record("fp16-mixed", 0, [2.5] * 2)])
    assert comparison.verdict == (
        "There is no fp32 run to compare with. bf16-mixed took 10.0 ms a step and ended at a loss of 2.000. "
        "fp16-mixed made too few steps to be timed and ended at a loss of 2.500."
    )
    for result in comparison.policies:
        assert result.memory_ratio is None
        assert result.speed is None or result.speed.speed_up is None
        assert result.quality[0].difference is None


def test_sentence_single_record() -> None:
    assert compare([record("fp32", 0, {0: [2.0] * 20, 1: [3.0] * 20}, seconds=2.5)]).verdict == (
        "fp32 took 2.50 s a step and ended at losses of 2.000 and 3.000. No other policy was run to compare it with."
    )


def test_sentence_another_baseline() -> None:
    comparison = compare([*three("fp32"), *three("tf32")], baseline="tf32")
    assert comparison.policies[0].policy == "tf32"
    assert comparison.verdict.startswith("fp32 trains as fast as tf32 (")


def test_sentences_without_steps(tmp_path: Path) -> None:
    never = "the script never called backward() followed by an optimizer's step()"
    assert compare([record("fp32"), record("bf16-mixed")]).verdict == f"Nothing was trained: {never}."
    only_one = compare([*three("fp32"), record("bf16-mixed")])
    assert only_one.verdict == f"bf16-mixed made no step: {never}."
    early = compare([*three("fp32"), record("bf16-mixed", outcome="interrupted")])
    assert early.verdict == "bf16-mixed was stopped before its first step. bf16-mixed was interrupted."


def test_sentence_without_losses() -> None:
    runs = [record(policy, seed, [None] * 20) for policy in ("fp32", "bf16-mixed") for seed in range(2)]
    assert compare(runs).verdict.endswith("; no loss was recorded to compare.")


def test_sentences_for_several_optimizers() -> None:
    def gan(policy: str, shift: float) -> list[RunRecord]:
        losses = [{0: [2.0 + base] * 20, 1: [3.0 + base + shift] * 20} for base in SPREAD]
        return [record(policy, seed, series) for seed, series in enumerate(losses)]

    same = compare([*gan("fp32", 0), *gan("bf16-mixed", 0)]).verdict
    assert (
        ", with the same loss for each of its 2 optimizers; for the first, the difference of 0 (90 % interval" in same
    )
    worse = compare([*gan("fp32", 0), *gan("bf16-mixed", 0.1)])
    assert "; its loss of optimizer 1 is worse: it is higher by 0.10" in worse.verdict
    assert [quality.verdict for quality in by_policy(worse, "bf16-mixed").quality] == ["same", "worse"]


# --- any records at all --------------------

losses_of_a_run = st.one_of(
    st.lists(st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf]) | st.none(), max_size=26),
    st.builds(lambda value, n: [value] * n, st.floats(1, 2), st.integers(0, 30)),
)
runs_of_a_comparison = st.dictionaries(
    st.tuples(st.sampled_from(["fp32", "bf16-mixed", "auto"]), st.integers(0, 3)),
    st.tuples(
        losses_of_a_run,
        losses_of_a_run,
        st.sampled_from(["finished", "finished", "step limit", "interrupted", "error", None]),
        st.none() | st.integers(0, 10**10),
        st.floats(1e-5, 10),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(runs_of_a_comparison, st.booleans())
def test_any_records_give_a_readable_conclusion(runs: dict[Any, Any], running: bool) -> None:
    records = [
        record(policy, seed, {0: first, 1: second}, outcome=outcome, peak_bytes=peak, seconds=seconds)
        for (policy, seed), (first, second, outcome, peak, seconds) in runs.items()
    ]
    comparison = compare(records, running=running)
    said = comparison.verdict
    assert re.fullmatch(r"[^ ].*\.", said) and "  " not in said and ".." not in said and "None" not in said
    if not said.startswith("Nothing was trained"):
        for result in comparison.policies[1:]:
            assert result.policy in said
    for result in comparison.policies:
        assert len(result.outcomes) == sum(policy == result.policy for policy, _ in runs)
        for quality in result.quality:
            assert quality.reason and (quality.verdict is None) is (result.policy == "fp32")
            assert (quality.verdict == "diverged") <= ("diverged" in result.outcomes)
    worse = any(quality.verdict == "worse" for result in comparison.policies for quality in result.quality)
    failed = any(outcome in ("crashed", "diverged") for result in comparison.policies for outcome in result.outcomes)
    assert comparison.findings is (worse or failed)
    text = json.dumps(to_json(comparison), allow_nan=False)
    assert json.loads(text)["verdict"] == said


def test_json_spells_non_finite_numbers_as_records_do() -> None:
    runs = [*three("fp32"), *three("bf16-mixed", shift=(math.nan, 0, 0))]
    fields = to_json(compare(runs))
    assert fields["policies"][1]["quality"][0]["final_loss"] == "NaN"
    assert fields["policies"][0]["quality"][0]["final_loss"] == pytest.approx(2.02)
    assert fields["policies"][1]["speed"]["speed_up"]["confidence"] == 0.95
