"""Live progress of a comparison: a moving line on a terminal, plain lines when piped; always on stderr."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from halfstep.compare import Event, RunEnded, RunStarted, StepSeen

#: Steps of each run whose time says little: allocation, first-touch and the memory measurement.
WARM_UP = 3


class Show:
    """Takes the events of a comparison, and shows them."""

    def __init__(self, console: Console, baseline: str, steps: int | None) -> None:
        self._console = console
        self._baseline = baseline
        self._steps = steps
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._loss: float | None = None
        self._step = 0
        self._task: TaskID | None = None
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=console,
                refresh_per_second=5,
            )
            self._live.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._step, self._loss = 0, None
            self._name = f"{event.run.policy}, seed {event.run.seed}"
            self._count = f"[{event.number}/{event.total}]"
            if self._live is not None:
                label = f"{event.number}/{event.total} {self._name}"
                self._task = self._live.add_task(label, total=self._steps, state="starting")
        elif isinstance(event, StepSeen) and event.optimizer == 0:
            self._step, self._loss = event.step, event.loss
            if event.seconds is not None and event.step > WARM_UP and not event.tracked:
                self._seconds[event.run.policy].append(event.seconds)
            if self._live is not None and self._task is not None:
                self._live.update(self._task, completed=event.step, state=self._state(event.run.policy))
        elif isinstance(event, RunEnded):
            ending = "" if event.exit_code == 0 else f"  exit code {event.exit_code}"
            if self._live is not None and self._task is not None:
                self._live.update(self._task, state=self._state(event.run.policy) + ending)
                self._live.stop_task(self._task)
            else:
                line = f"{self._count} {self._name}: {self._state(event.run.policy)}{ending}"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _state(self, policy: str) -> str:
        parts = [f"step {self._step}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        mine, base = self._seconds.get(policy), self._seconds.get(self._baseline)
        if mine:
            parts.append(f"{statistics.median(mine) * 1e3:.0f} ms/step")
            if base and policy != self._baseline:
                parts.append(f"{statistics.median(base) / statistics.median(mine):.2f}×")
        return "  ".join(parts)


@contextlib.contextmanager
def progress(policies: Sequence[str], steps: int | None) -> Iterator[Show]:
    """A display for `run_all`'s events; the first policy is the baseline of the speed-up so far."""
    show = Show(Console(stderr=True), policies[0], steps)
    try:
        yield show
    finally:
        show.close()
