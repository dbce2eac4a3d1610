"""A process for each section, so that a crash, a hang or an exhausted memory of one loses nothing of the others.

A section is sure of its own seconds; what earlier ones did not need goes to the next, and one that hangs takes no more
than that. At its limit it is ended with all that it started. Document and summary are written anew after each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import records
from gpu.plan import Planned

#: The command of a section that has to end in so many seconds.
Command = Callable[[Planned, float], Sequence[str]]

LINES, LOG, SUMMARY = "gpu_once.jsonl", "gpu_once.log", "summary.txt"
#: Below this a section does not even import torch.
LEAST = 5.0
#: Seconds that a section has to end by itself before it is killed.
GRACE = 3.0


@dataclass
class Started:
    """A section that runs."""

    section: Planned
    process: subprocess.Popen[bytes]
    began: float
    ends: float
    log: Path

    def ended(self) -> str:
        """Wait until it has ended or its time is up, end what is left of it; returns its status."""
        try:
            code = self.process.wait(timeout=max(0.0, self.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "limit"
        finally:
            self.kill()
        return "ok" if code == 0 else f"exit code {code}"

    def kill(self) -> None:
        """The section and what it started: a process group of their own."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE)


class Run:
    """One run: its folder, and how much of its time is left.

    Args:
        out: the folder for lines, log, document and summary; made if it is not there.
        name: of the run: the document is ``gpu-<name>.json``.
        command: what starts a section.
        budget: seconds in all.
        environment: of the sections' processes.
        stretch: how many times its seconds a section gets: machines without a GPU take longer to start.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        command: Command,
        budget: float,
        environment: Mapping[str, str],
        stretch: float = 1.0,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.name, self.command, self.stretch = out, name, command, stretch
        self.lines = out / LINES
        self.environment = dict(environment)
        self.deadline = time.monotonic() + budget

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def sections(self, planned: Sequence[Planned], described: Mapping[str, Any]) -> dict[str, Any]:
        """Run these sections; returns the document, which is on the disk as well."""
        records.append(self.lines, "run", self.name, "run", **described, wanted=[section.name for section in planned])
        in_order = [section for section in planned if not section.beside]
        with self._beside([section for section in planned if section.beside], alone=not in_order) as beside:
            for index, section in enumerate(in_order):
                later = sum(other.seconds for other in in_order[index + 1 :]) * self.stretch
                limit = min(self.left(), max(section.seconds * self.stretch, self.left() - later))
                if limit < LEAST:
                    self._note(section, "not run: the time was spent")
                    continue
                started = self._start(section, limit)
                self._close(started, started.ended())
            for started in beside:
                self._close(started, started.ended())
        return self.write()

    def write(self) -> dict[str, Any]:
        """Document and summary of what is known now."""
        document = records.document(records.read(self.lines))
        records.write_whole(self.out / f"gpu-{self.name}.json", records.json_text(document))
        records.write_whole(self.out / SUMMARY, records.summary(document))
        return document

    @contextlib.contextmanager
    def _beside(self, planned: Sequence[Planned], alone: bool) -> Iterator[list[Started]]:
        started: list[Started] = []
        try:
            for section in planned:
                limit = self.left() if alone else min(section.seconds * self.stretch, self.left())
                started.append(self._start(section, limit))
            yield started
        finally:
            for running in started:
                running.kill()

    def _start(self, section: Planned, limit: float) -> Started:
        say(f"{section.name}: up to {limit:.0f} s{', beside the others' if section.beside else ''}")
        log = self.out / (f"{section.name}.log" if section.beside else LOG)
        environment = dict(self.environment)
        if section.long_addresses:
            environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        began = time.monotonic()
        with log.open("ab") as output:
            output.write(f"\n===== {section.name}\n".encode())
            output.flush()
            command = [*self.command(section, limit)]
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return Started(section, process, began, began + limit, log)

    def _close(self, started: Started, status: str) -> None:
        took = {} if started.section.beside else {"seconds": round(time.monotonic() - started.began, 1)}
        self._note(started.section, status, **took)
        if status != "ok":
            end = started.log.read_text(errors="replace").splitlines()[-12:]
            say(f"{started.section.name}: {status}; the end of what it said:")
            say("\n".join(f"    | {line}" for line in end))
        self.write()

    def _note(self, section: Planned, status: str, **values: Any) -> None:
        records.append(self.lines, section.name, "status", "status", status=status, tiny=section.tiny, **values)


def say(text: str) -> None:
    print(text, flush=True)
