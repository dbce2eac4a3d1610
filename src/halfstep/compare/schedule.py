"""Runs one script once per policy and seed, each in a process of its own, and says what became of each.

Processes are separate so that no run inherits another's allocator, caches, random state or patches; they come
one after another so that none slows another down. Policies are interleaved, and for seed *k* their order is
rotated by *k*: a machine that grows warm, or busy, then slows every policy alike instead of the one that
always came last.

A run that fails is a result: its exit code and the end of its log are kept, and the next run starts. What is
known of a run comes from its record (`halfstep.record`); while it runs, the lines it appends are read as they
come and handed on as events, for a progress display.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from halfstep.policy import file_name
from halfstep.processes import Tail, sigterm_raises, stop

POLL_SECONDS = 0.2
INTERRUPT_GRACE_SECONDS = 10.0
_TERMINATE_SECONDS = 5.0
_TAIL_LINES = 20
_TAIL_BYTES = 16_384


class ScheduleError(RuntimeError):
    """No comparison can be made at all; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One run of the script."""

    policy: str
    seed: int  #: index: 0 leaves the script's own seeds alone

    @property
    def stem(self) -> str:
        """Name of the run's record and log, without their endings."""
        return f"{file_name(self.policy)}.seed{self.seed}"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    run: Run
    record: Path | None  #: None: the process ended before it wrote a header
    log: Path  #: standard output and error of the process
    exit_code: int  #: negative: the number of the signal that ended it
    interrupted: bool = False  #: it was stopped because the user stopped the comparison

    @property
    def log_tail(self) -> str:
        """The last lines that the process printed."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return "\n".join(file.read().decode("utf-8", "replace").rstrip().splitlines()[-_TAIL_LINES:])
        return ""

    @property
    def failure(self) -> str | None:
        """How the process ended if not well, in one line; None where it exited with 0 and left a record."""
        if self.exit_code < 0:
            try:
                name = signal.Signals(-self.exit_code).name
            except ValueError:
                name = f"signal {-self.exit_code}"
            hint = " (memory ran out?)" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
        if self.exit_code == 0 and self.record is not None:
            return None
        what = f"exit code {self.exit_code}" + ("" if self.record else ", no record written")
        last = self.log_tail.rpartition("\n")[2].strip()
        return f"{what}: {last}" if last else what


@dataclass(frozen=True)
class RunStarted:
    """A process was started."""

    run: Run
    number: int  #: 1, 2, … of ``total``
    total: int


@dataclass(frozen=True)
class StepSeen:
    """A step appeared in the record of the run under way."""

    run: Run
    step: int
    optimizer: int
    loss: float | None
    seconds: float | None
    tracked: bool  #: slowed down by the memory tracker


@dataclass(frozen=True)
class RunEnded:
    """A process ended."""

    run: Run
    exit_code: int


Event = RunStarted | StepSeen | RunEnded


class Interrupted(KeyboardInterrupt):
    """The user stopped the comparison; ``results`` holds the runs so far, the stopped one among them."""

    def __init__(self, results: Sequence[RunResult]) -> None:
        super().__init__(f"interrupted after {len(results)} runs")
        self.results = tuple(results)


def plan_runs(policies: Sequence[str], seeds: int) -> list[Run]:
    """Every policy once for each of ``seeds`` seeds, in rotated order.

    >>> [run.policy for run in plan_runs(["a", "b", "c"], 2)]
    ['a', 'b', 'c', 'b', 'c', 'a']

    Raises:
        ValueError: no policy, a policy named twice, or fewer than one seed.
    """
    if not policies or len(set(policies)) < len(policies):
        raise ValueError(f"policies must be named, each once; got {', '.join(policies) or 'none'}")
    if seeds < 1:
        raise ValueError(f"at least 1 seed is needed; got {seeds}")
    runs: list[Run] = []
    for seed in range(seeds):
        turn = seed % len(policies)
        runs += [Run(policy, seed) for policy in (*policies[turn:], *policies[:turn])]
    return runs


def run_all(
    script_command: Sequence[str],
    policies: Sequence[str],
    seeds: int,
    steps: int | None,
    folder: str | os.PathLike[str],
    *,
    on_event: Callable[[Event], None] | None = None,
    launcher: Sequence[str] | None = None,
    grace: float = INTERRUPT_GRACE_SECONDS,
) -> list[RunResult]:
    """Run the script under every policy and seed and return what each run left, in the order they ran.

    Args:
        script_command: the script and its arguments; ``{seed}`` inside an argument becomes the seed's index,
            ``{run}`` the run's own name (policy and seed), for files that runs must not share.
        steps: where to stop each run; None lets the script decide.
        folder: where records and logs go; made if missing.
        on_event: told of starts, steps and ends as they happen, in this thread.
        launcher: the command that runs a script under a policy; ``halfstep run`` of this Python by default.
        grace: seconds that an interrupted run gets to end by itself.

    Raises:
        ScheduleError: the folder cannot be written or holds such records already, or no run wrote a record.
        Interrupted: Ctrl-C; carries the results so far.
    """
    runs = plan_runs(policies, seeds)
    folder = Path(folder)
    _prepare(folder, runs)
    prefix = (sys.executable, "-m", "halfstep", "run") if launcher is None else tuple(launcher)
    emit: Callable[[Event], None] = on_event or (lambda event: None)
    results: list[RunResult] = []
    with sigterm_raises():
        for number, run in enumerate(runs, start=1):
            command = [*prefix, *_arguments(run, steps, folder), "--", *_filled(script_command, run)]
            try:
                results.append(_run_one(run, command, folder, emit, RunStarted(run, number, len(runs)), grace))
            except KeyboardInterrupt:  # between the processes; one that strikes during a run comes back as a result
                raise Interrupted(results) from None
            if results[-1].interrupted:
                raise Interrupted(results)
    if all(result.record is None for result in results):
        first = results[0]
        raise ScheduleError(
            f"none of the {len(results)} runs wrote a record; the first, {first.run.policy}, ended with "
            f"{first.failure}. Its output is in {first.log}."
        )
    return results


def _prepare(folder: Path, runs: Sequence[Run]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScheduleError(f"{folder}: cannot be made: {error.strerror or error}. Choose another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ScheduleError(f"{folder}: cannot be written. Choose another folder.")
    for run in runs:
        path = folder / f"{run.stem}.jsonl"
        if path.exists():  # else an old record would pass for the new run's
            raise ScheduleError(f"{path}: is there already, and a record is never overwritten. Choose another folder.")


def _arguments(run: Run, steps: int | None, folder: Path) -> list[str]:
    record = str(folder / f"{run.stem}.jsonl")
    limit = [] if steps is None else ["--steps", str(steps)]
    return ["--policy", run.policy, "--seed-index", str(run.seed), "--record", record, *limit, "--quiet"]


def _filled(script_command: Sequence[str], run: Run) -> list[str]:
    script, *arguments = script_command
    return [script, *(a.replace("{seed}", str(run.seed)).replace("{run}", run.stem) for a in arguments)]


def _run_one(
    run: Run,
    command: Sequence[str],
    folder: Path,
    emit: Callable[[Event], None],
    started: RunStarted,
    grace: float,
) -> RunResult:
    log, tail, interrupted = folder / f"{run.stem}.log", Tail(folder / f"{run.stem}.jsonl"), False
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        emit(started)
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_SECONDS)
            # Read after the wait: once the process has ended, this sees its last line.
            for line in tail.new_lines():
                if (event := _step_seen(run, line)) is not None:
                    emit(event)
    except KeyboardInterrupt:
        interrupted = True
        # The terminal sent the signal to the run as well, which closes its record before it ends. A second
        # Ctrl-C means that the user will not wait for that.
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=grace)
    finally:
        stop(process, _TERMINATE_SECONDS)
    tail.new_lines()
    record = tail.path if tail.lines_seen else None
    result = RunResult(run, record, log, process.returncode, interrupted)
    if not interrupted:
        emit(RunEnded(run, process.returncode))
    return result


def _step_seen(run: Run, line: bytes) -> StepSeen | None:
    try:
        fields = json.loads(line)
        if fields["kind"] != "step":
            return None
        loss, seconds = fields["loss"], fields["seconds"]
        return StepSeen(
            run,
            step=fields["step"],
            optimizer=fields["optimizer"],
            loss=None if loss is None else float(loss),  # float() reads the record's "NaN" and "Infinity"
            seconds=None if seconds is None else float(seconds),
            tracked=fields.get("tracked", False),
        )
    except (ValueError, KeyError, TypeError):
        return None  # only the display misses a damaged line here; reading the record later names it
