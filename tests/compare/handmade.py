"""Run records made by hand, for tests that know what must come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfstep.record import End, Header, Memory, Notice, RunRecord, Step


def record(
    policy: str = "fp32",
    seed: int = 0,
    losses: Sequence[float | None] | Mapping[int, Sequence[float | None]] = (),
    *,
    seconds: float | Sequence[float | None] = 0.01,
    effective: str | None = None,
    outcome: str | None = "finished",
    error: str | None = None,
    exit_code: int = 0,
    peak_bytes: int | None = None,
    skipped: int = 0,
    notices: Sequence[Notice] = (),
    started: str | None = None,
    lasted: float = 10.0,
    command: Sequence[str] = ("train.py",),
    environment: Mapping[str, Any] | None = None,
) -> RunRecord:
    """A record with one step per loss; ``outcome=None`` leaves the end out, as a killed run does."""
    series = losses if isinstance(losses, Mapping) else {0: losses}
    steps = []
    for optimizer, values in series.items():
        times = seconds if isinstance(seconds, Sequence) else [None, *[seconds] * len(values)][: len(values)]
        for number, (loss, time) in enumerate(zip(values, times, strict=True), start=1):
            steps.append(Step(number, optimizer, loss, time, number > skipped, None, None, 0, None))
    return RunRecord(
        path=Path(f"{policy}.seed{seed}.jsonl"),
        header=Header(
            started=started or f"2026-01-01T{seed:02d}:00:00+00:00",
            command=tuple(command),
            policy_requested=policy,
            policy=effective or policy,
            reason="as asked",
            seed=seed,
            environment={"load": 0.1, "cpu_count": 2, "threads": 2, **(environment or {})},
        ),
        steps=tuple(steps),
        memory=None if peak_bytes is None else Memory(3, peak_bytes, "aten.mm", {"activations": peak_bytes}),
        notices=tuple(notices),
        end=None if outcome is None else End(outcome, exit_code, lasted, 0, error),
    )
