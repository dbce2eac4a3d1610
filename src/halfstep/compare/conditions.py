"""What a reader must know of the conditions before trusting a comparison: runs that do not belong together, a
policy that was not the one asked for, a machine that was busy with something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from halfstep.compare import phrases
from halfstep.policy import file_name
from halfstep.record import RunRecord

LOADED = 0.75  #: share of the cores that other work may keep busy before times are suspect
SAME_START = 0.05  #: relative difference of first losses that rounding to 16 bits does not explain
_LOAD_DECAY_SECONDS = 60.0  #: the 1-minute load average forgets by this time constant


def warnings(records: Sequence[RunRecord], missing: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Everything about these runs that weakens a conclusion.

    Args:
        records: of all policies.
        missing: seeds that other policies ran and this one did not.
    """
    found = [*_other_policy(records), *_mixed(records)]
    for policy, seeds in missing.items():
        listed = ", ".join(map(str, seeds))
        found.append(f"{policy} has no run of seed {listed}; differences are paired over the seeds that are there")
    return (*found, *_unlike_starts(records), *_unlike_lengths(records), *_busy(records))


def same_but_for_seed(a: RunRecord, b: RunRecord) -> bool:
    """Whether two runs had the same command, apart from the seed's index where it stands in an argument.

    An argument may have held the index (``--seed {seed}``): wherever ``a`` has its own, ``b`` may have its
    own.
    """
    if len(a.header.command) != len(b.header.command):
        return False
    either = f"(?:{a.header.seed}|{b.header.seed})"
    for x, y in zip(_without_run(a), _without_run(b), strict=True):
        pattern = either.join(map(re.escape, x.split(str(a.header.seed))))
        if not re.fullmatch(pattern, y, re.DOTALL):
            return False
    return True


def foreign_load(record: RunRecord, others: Sequence[RunRecord]) -> float | None:
    """Load average at the start of a run, less what earlier runs among ``others`` can have left in it.

    Runs follow each other at once, and the 1-minute average still remembers the last: a process that keeps
    *n* threads busy from *a* to *b* adds n (exp(-(t - b)/60) - exp(-(t - a)/60)) to the average at a later
    time *t*. None where the system tells no load.
    """
    load = record.header.environment.get("load")
    if load is None:
        return None
    start = _started(record)
    own = 0.0
    for other in others:
        since_start = start - _started(other)
        if since_start <= 0:
            continue
        since_end = max(0.0, since_start - _lasted(other))
        threads = other.header.environment.get("threads") or other.header.environment.get("cpu_count") or 1
        own += threads * (math.exp(-since_end / _LOAD_DECAY_SECONDS) - math.exp(-since_start / _LOAD_DECAY_SECONDS))
    return max(0.0, float(load) - own)


def _other_policy(records: Sequence[RunRecord]) -> list[str]:
    found = dict.fromkeys(
        f"{r.header.policy_requested} ran as {r.header.policy}: {r.header.reason}"
        for r in records
        if r.header.policy != r.header.policy_requested
    )
    return list(found)


def _mixed(records: Sequence[RunRecord]) -> list[str]:
    found = []
    different = next((r for r in records[1:] if not same_but_for_seed(records[0], r)), None)
    if different is not None:
        commands = (" ".join(r.header.command) for r in (records[0], different))
        found.append("the runs are of different commands: " + "; ".join(f"“{command}”" for command in commands))
    of_environment: dict[str, Callable[[RunRecord], object]] = {
        "on different devices": lambda r: r.header.environment.get("device"),
        "on different processors": lambda r: r.header.environment.get("cpu"),
        "under different versions of PyTorch": lambda r: r.header.environment.get("torch"),
        "with different numbers of threads": lambda r: r.header.environment.get("threads"),
    }
    for what, value_of in of_environment.items():
        values = dict.fromkeys(value for r in records if (value := value_of(r)) is not None)
        if len(values) > 1:
            found.append(f"the runs were made {what}: {', '.join(map(str, values))}")
    return found


def _unlike_lengths(records: Sequence[RunRecord]) -> list[str]:
    ended = [r for r in records if r.end is not None and r.end.outcome in ("finished", "step limit")]
    lengths = dict.fromkeys(sum(step.optimizer == 0 for step in r.steps) for r in ended)
    if len(lengths) < 2:
        return []
    return [f"the runs made {' or '.join(map(str, sorted(lengths)))} steps; losses are compared over the shorter"]


def _without_run(record: RunRecord) -> list[str]:
    """The command with the run's own name, where an argument holds it (``--out {run}.pt``), taken out again."""
    own = f"{file_name(record.header.policy_requested)}.seed{record.header.seed}"
    return [argument.replace(own, "{run}") for argument in record.header.command]


def _unlike_starts(records: Sequence[RunRecord]) -> list[str]:
    """Runs of one seed start from the same weights and data: their first losses differ by rounding only."""
    firsts: dict[int, list[tuple[float, str]]] = {}
    for record in records:
        first = next((s.loss for s in record.steps if s.optimizer == 0 and s.loss is not None), None)
        if first is not None and math.isfinite(first):
            firsts.setdefault(record.header.seed, []).append((first, record.header.policy_requested))
    for seed, losses in sorted(firsts.items()):
        (low, one), (high, other) = min(losses), max(losses)
        if high - low > SAME_START * max(abs(low), abs(high)):
            return [
                f"seed {seed} starts at a loss of {phrases.number(high)} under {other} and {phrases.number(low)} under "
                f"{one}, more than rounding explains: does the script draw unseeded random numbers, or continue from "
                "a file that an earlier run wrote? Give each run its own file with {run} in an argument"
            ]
    return []


def _busy(records: Sequence[RunRecord]) -> list[str]:
    busiest: tuple[float, RunRecord] | None = None
    for record in records:
        load = foreign_load(record, [r for r in records if r is not record])
        cores = record.header.environment.get("cpu_count") or 1
        if load is not None and load > LOADED * cores and (busiest is None or load > busiest[0]):
            busiest = load, record
    if busiest is None:
        return []
    load, record = busiest
    cores = phrases.count(record.header.environment.get("cpu_count") or 1, "core")
    return [
        f"other work was on the machine when {record.header.policy_requested}, seed {record.header.seed}, "
        f"started: a load of {load:.1f} on {cores} beyond what these runs leave themselves; times may be off"
    ]


def _started(record: RunRecord) -> float:
    try:
        return datetime.fromisoformat(record.header.started).timestamp()
    except ValueError:
        return 0.0  # a date in another form: no run is then counted as having left a load


def _lasted(record: RunRecord) -> float:
    if record.end is not None:
        return record.end.seconds
    return sum(step.seconds or 0.0 for step in record.steps if step.optimizer == 0)
