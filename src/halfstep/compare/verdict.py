"""From the records of several runs to one `Comparison`: groups by policy, judges each against the baseline.

Runs are grouped by the policy that was *asked for*: ``auto`` stays ``auto`` in the tables, with a warning
that says what it ran as. Runs that crashed or diverged stay in, as outcomes; what was measured before that
still counts for speed and memory, never for the final loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from halfstep.compare.conditions import warnings
from halfstep.compare.judgement import judge_quality, judge_speed
from halfstep.compare.result import Comparison, Outcome, PolicyResult, Quality
from halfstep.compare.schedule import RunResult
from halfstep.compare.sentence import Subject, verdict
from halfstep.compare.statistics import diverged, timed_seconds
from halfstep.record import Memory, Notice, RunRecord, strict_json

_COMPLETE = ("finished", "diverged")


class CompareError(ValueError):
    """These records cannot be compared; the message says which and why."""


def compare(
    records: Sequence[RunRecord],
    *,
    baseline: str = "fp32",
    runs: Sequence[RunResult] = (),
    running: bool = False,
) -> Comparison:
    """Conclude from records.

    Args:
        records: one for each policy and seed.
        baseline: the policy, as it was asked for, that the others are compared with. It may be absent.
        runs: what `run_all` returned, where it did: runs without a record then count as crashed, and a run
            that was killed is shown with its signal.
        running: a record without an end belongs to a run that is still under way, not to one that was killed.

    Raises:
        CompareError: nothing to compare, or two records of the same policy and seed.
    """
    by_policy = _grouped(records)
    ended = {(result.run.policy, result.run.seed): result for result in runs}
    if not records and not runs:
        raise CompareError("there are no run records to compare")
    as_asked = dict.fromkeys([*(policy for policy, _ in ended), *by_policy])
    names = sorted(as_asked, key=lambda name: name != baseline)
    everything = {name: by_policy.get(name, {}) for name in names}
    seeds_of = {
        name: sorted({*everything[name], *(seed for policy, seed in ended if policy == name)}) for name in names
    }
    outcomes = {
        (name, seed): _outcome(everything[name].get(seed), ended.get((name, seed)), running)
        for name in names
        for seed in seeds_of[name]
    }
    reference = everything.get(baseline)
    results = [_result(name, everything[name], seeds_of[name], outcomes, ended, baseline, reference) for name in names]
    subjects = [
        Subject(result, _label(result.policy, everything[result.policy]), _steps(everything[result.policy]))
        for result in results
    ]
    all_seeds = sorted({seed for _, seed in outcomes})
    # A seed left out while the comparison still runs, or after it was stopped, is no oddity of the records.
    stopped = running or any(outcome == "interrupted" for outcome in outcomes.values())
    gaps = {name: [seed for seed in all_seeds if seed not in seeds_of[name]] for name in names}
    missing = {} if stopped else {name: seeds for name, seeds in gaps.items() if seeds}
    return Comparison(
        command=_command(records),
        baseline=baseline,
        seeds=len(all_seeds),
        policies=tuple(results),
        verdict=verdict(subjects, baseline),
        findings=any(_is_finding(result) for result in results),
        warnings=warnings(_in_order(records), missing) if records else (),
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; non-finite numbers as the strings that run records use for them."""
    encoded: dict[str, Any] = strict_json(asdict(comparison))
    return encoded


def _grouped(records: Sequence[RunRecord]) -> dict[str, dict[int, RunRecord]]:
    """policy -> seed -> record, policies in the order in which they first ran."""
    groups: dict[str, dict[int, RunRecord]] = {}
    for record in _in_order(records):
        policy, seed = record.header.policy_requested, record.header.seed
        seeds = groups.setdefault(policy, {})
        if seed in seeds:
            raise CompareError(
                f"two records of {policy}, seed {seed}: {seeds[seed].path} and {record.path}; leave one out"
            )
        seeds[seed] = record
    return groups


def _in_order(records: Sequence[RunRecord]) -> list[RunRecord]:
    return sorted(records, key=lambda record: record.header.started)


def _command(records: Sequence[RunRecord]) -> tuple[str, ...]:
    return _in_order(records)[0].header.command if records else ()


def _outcome(record: RunRecord | None, ended: RunResult | None, running: bool) -> Outcome:
    if record is None or record.end is None:
        if ended is not None and ended.interrupted:
            return "interrupted"
        return "running" if running and ended is None else "crashed"
    if record.end.outcome == "error" or (record.end.outcome == "finished" and record.end.exit_code != 0):
        return "crashed"  # a script that exits with another code than 0 says itself that it failed
    if any(diverged(series) for series in _losses(record).values()):
        return "diverged"
    return "interrupted" if record.end.outcome == "interrupted" else "finished"


def _result(
    name: str,
    records: Mapping[int, RunRecord],
    seeds: Sequence[int],
    outcomes: Mapping[tuple[str, int], Outcome],
    ended: Mapping[tuple[str, int], RunResult],
    baseline: str,
    reference: Mapping[int, RunRecord] | None,
) -> PolicyResult:
    reference = {} if reference is None else reference
    errors = [_error(records.get(seed), ended.get((name, seed))) for seed in seeds if outcomes[name, seed] == "crashed"]
    peak = _peak(records)
    reference_peak = _peak(reference)
    return PolicyResult(
        policy=name,
        outcomes=tuple(outcomes[name, seed] for seed in seeds),
        errors=tuple(dict.fromkeys(errors)),
        speed=judge_speed(_times(records), baseline, None if name == baseline else _times(reference)),
        quality=_qualities(name, records, outcomes, baseline, reference),
        peak_bytes=peak.memory.peak_bytes if peak and peak.memory else None,
        memory_ratio=_memory_ratio(peak, reference_peak),
        memory_by_category=dict(peak.memory.by_category) if peak and peak.memory else {},
        peak_op=peak.memory.at_op if peak and peak.memory else None,
        skipped_steps=sum(not step.applied for record in records.values() for step in record.steps),
        notices=tuple(dict.fromkeys(_notice(notice) for record in records.values() for notice in record.notices)),
        memory_device=peak.memory.device if peak and peak.memory else None,
        allocator_bytes=_allocator_bytes(records),
        host_bytes=peak.host_memory.peak_bytes if peak and peak.host_memory else None,
    )


def _qualities(
    name: str,
    records: Mapping[int, RunRecord],
    outcomes: Mapping[tuple[str, int], Outcome],
    baseline: str,
    reference: Mapping[int, RunRecord],
) -> tuple[Quality, ...]:
    def split(policy: str, group: Mapping[int, RunRecord], optimizer: int, complete: bool) -> dict[int, list[float]]:
        return {
            seed: series
            for seed, record in group.items()
            if (outcomes[policy, seed] in _COMPLETE) is complete and (series := _losses(record).get(optimizer))
        }

    optimizers = sorted({optimizer for record in records.values() for optimizer in _losses(record)})
    judged = (
        judge_quality(
            optimizer,
            split(name, records, optimizer, complete=True),
            split(name, records, optimizer, complete=False),
            baseline,
            None if name == baseline else split(baseline, reference, optimizer, complete=True),
        )
        for optimizer in optimizers
    )
    return tuple(quality for quality in judged if quality is not None)


def _losses(record: RunRecord) -> dict[int, list[float]]:
    """Losses of each optimizer's steps; a step without a loss of its own is left out."""
    series: dict[int, list[float]] = {}
    for step in record.steps:
        if step.loss is not None:
            series.setdefault(step.optimizer, []).append(step.loss)
    return series


def _times(records: Mapping[int, RunRecord]) -> dict[int, list[float]]:
    return {seed: timed_seconds(record) for seed, record in records.items()}


def _steps(records: Mapping[int, RunRecord]) -> int:
    return sum(len(record.steps) for record in records.values())


def _peak(records: Mapping[int, RunRecord]) -> RunRecord | None:
    """The run whose peak was largest."""
    measured = [(record.memory.peak_bytes, seed) for seed, record in records.items() if record.memory]
    return records[max(measured)[1]] if measured else None


def _memory_device(memory: Memory) -> str:
    """Whose memory was measured; older records do not say it, and most were made on a CPU."""
    return memory.device or "cpu"


def _allocator_bytes(records: Mapping[int, RunRecord]) -> int | None:
    return max((step.device_bytes for r in records.values() for step in r.steps if step.device_bytes), default=None)


def _memory_ratio(peak: RunRecord | None, reference: RunRecord | None) -> float | None:
    if (
        peak is None
        or reference is None
        or peak.memory is None
        or not (reference.memory and reference.memory.peak_bytes)
        or _memory_device(peak.memory) != _memory_device(reference.memory)
    ):
        return None
    return peak.memory.peak_bytes / reference.memory.peak_bytes


def _error(record: RunRecord | None, ended: RunResult | None) -> str:
    if record is not None and record.end is not None:
        return record.end.error or f"exit code {record.end.exit_code}"
    return (ended.failure if ended else None) or "it ended without a word, as a killed process does"


def _notice(notice: Notice) -> str:
    return f"{notice.message} ({notice.where})" if notice.where else notice.message


def _label(name: str, records: Mapping[int, RunRecord]) -> str:
    effective = sorted({record.header.policy for record in records.values()} - {name})
    return f"{name} ({', '.join(effective)})" if effective else name


def _is_finding(result: PolicyResult) -> bool:
    failed = any(outcome in ("crashed", "diverged") for outcome in result.outcomes)
    return failed or any(quality.verdict in ("worse", "diverged") for quality in result.quality)
