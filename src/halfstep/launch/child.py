"""A stage of the doctor as a process: started, read while it runs, ended in time, and accounted for.

The stage appends JSON lines to a file and the parent reads them as they come. So whatever ends the process (the
script's own error, a crash in a kernel, the out-of-memory killer, our timeout), every line before that moment is known.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfstep.processes import Tail, stop

POLL_SECONDS = 0.05
#: A stage that has been told to end gets so long to write what it saw; then it is killed.
GRACE_SECONDS = 20.0
#: After its last line a process gets so long for its threads and atexit handlers.
LEAVING_SECONDS = 10.0
_TAIL_BYTES = 4096


Stage = Literal["profile", "examine"]


@dataclass(frozen=True)
class Request:
    """What a stage's process is asked to do, as its only argument."""

    stage: Stage
    script: str
    arguments: tuple[str, ...]
    policy: str  #: the asked policy as it is in effect here
    requested: str  #: as the user wrote it, "auto" included
    device: str | None
    steps: int
    silence: tuple[str, ...]
    lines: str  #: the file that takes what is learnt
    number: int = 1  #: of the stage among all of one diagnosis, from 1
    remedy: Mapping[str, Any] | None = None  #: what is done otherwise, as `Remedy.to_json` wrote it

    def to_text(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def from_text(text: str) -> Request:
        values = json.loads(text)
        return Request(**{**values, "arguments": tuple(values["arguments"]), "silence": tuple(values["silence"])})


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended."""

    exit_code: int  #: negative: the number of the signal
    complete: bool  #: its last line came: all that it saw was written
    timed_out: bool  #: it did not end by itself in time
    log: Path

    @property
    def failure(self) -> str | None:
        """In one line, or None where it came to its own end."""
        if self.timed_out:
            return "was stopped at its time limit"
        if self.complete:
            return None
        if self.exit_code < 0:
            try:
                name = signal.Signals(-self.exit_code).name
            except ValueError:
                name = f"signal {-self.exit_code}"
            return f"was killed by {name}" + (" (memory ran out?)" if name == "SIGKILL" else "")
        last = last_line(self.log)
        return f"ended without a last word, exit code {self.exit_code}" + (f": {last}" if last else "")


def run_stage(
    command: Sequence[str],
    lines: Path,
    log: Path,
    on_line: Callable[[dict[str, Any]], None],
    *,
    environment: Mapping[str, str],
    timeout: float,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Ended:
    """Run ``command`` to its end and hand on each line that it appends to ``lines``.

    Args:
        log: takes the process's standard output and error.
        timeout: seconds after which the process is told to end (SIGTERM, at which a stage writes what it saw).
        on_wait: called again and again while it runs, with the seconds so far.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment)
        )
    tail, complete, timed_out = Tail(lines), False, False
    started, ends_by = time.monotonic(), float("inf")
    try:
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_SECONDS)
            # Read after the wait: once the process has ended, this sees its last line.
            for line in _values(tail.new_lines()):
                if line.get("kind") == "end":
                    complete, ends_by = True, time.monotonic() + LEAVING_SECONDS
                on_line(line)
            now = time.monotonic()
            on_wait(now - started)
            if now - started > timeout and not complete:
                timed_out = True
                break
            if now > ends_by:
                break
    finally:
        stop(process, GRACE_SECONDS)
    for line in _values(tail.new_lines()):
        complete = complete or line.get("kind") == "end"
        on_line(line)
    return Ended(process.wait(), complete, timed_out, log)


def last_line(log: Path) -> str:
    """The last line that a process printed; empty where it printed nothing."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace").rstrip().rpartition("\n")[2].strip()
    return ""


def _values(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Lines as JSON objects; one damaged by a dying process is lost, the others are not."""
    for line in lines:
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value
