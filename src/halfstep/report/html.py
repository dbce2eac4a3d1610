"""The report: one HTML file that needs nothing but itself, made from a comparison and its run records.

The page reads from the verdict down: result table, warnings and notices, figures, each run, environment, and
at the very end the comparison as JSON, so that the report is also the data. What all pages have in common is
in :mod:`halfstep.report.page`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfstep.compare import to_json
from halfstep.compare.result import Comparison, PolicyResult, Quality
from halfstep.record import RunRecord
from halfstep.report import environment, page, series, svg, wording
from halfstep.report.figures import Chart, loss_scales, losses, memory, step_times


def render(records: Sequence[RunRecord], comparison: Comparison) -> str:
    """The whole page.

    Args:
        records: the runs that ``comparison`` was made of.
        comparison: what is shown first and embedded as JSON; may lack a baseline, ratios or verdicts.
    """
    runs = series.runs_by_policy(records, comparison)
    looks = svg.looks(list(runs))
    return page.fill(
        "page.html.jinja",
        comparison=comparison,
        data=to_json(comparison),
        rows=[_row(result, comparison) for result in comparison.policies],
        compared=len(comparison.policies) > 1 and comparison.baseline in runs,
        looks=looks,
        notices=wording.notices(comparison),
        errors=wording.errors(comparison),
        charts=_charts(runs, comparison, looks),
        runs={policy: [_Run(record) for record in group] for policy, group in runs.items()},
        started=min((record.header.started for record in records), default=None),
        reasons=[(result.policy, why) for result in comparison.policies if (why := wording.unsaid(result, comparison))],
        verdict=wording.weighted(comparison),
        machine=environment.summary([record.header.environment for record in records]),
    )


def write(path: str | os.PathLike[str], records: Sequence[RunRecord], comparison: Comparison) -> Path:
    """Write the page to ``path``, whole or not at all: a failure leaves what was there before.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    return page.write(path, render(records, comparison))


@dataclass(frozen=True)
class _Row:
    """A policy in the result table, with one line per optimizer where it has several."""

    result: PolicyResult
    is_baseline: bool
    quality: tuple[Quality, ...]

    @property
    def single(self) -> Quality | None:
        """The only optimizer's quality: it stands in the policy's own line."""
        return self.quality[0] if len(self.quality) == 1 else None


def _row(result: PolicyResult, comparison: Comparison) -> _Row:
    return _Row(result, result.policy == comparison.baseline, result.quality)


@dataclass(frozen=True)
class _Run:
    """One run in the section on runs."""

    record: RunRecord

    @property
    def outcome(self) -> str:
        if self.record.end is None:
            return "killed or still running"
        return self.record.end.outcome + (", last line cut" if self.record.truncated else "")

    @property
    def steps(self) -> int:
        """Turns of the training loop: steps of the first optimizer."""
        return sum(1 for step in self.record.steps if step.optimizer == 0)

    @property
    def skipped(self) -> int:
        return sum(1 for step in self.record.steps if not step.applied)


def _charts(
    runs: Mapping[str, Sequence[RunRecord]], comparison: Comparison, looks: Mapping[str, svg.Look]
) -> list[Chart]:
    optimizers = series.optimizers(_all(runs)) or [0]
    several = len(optimizers) > 1
    charts = [losses(runs, comparison, looks, optimizer, several) for optimizer in optimizers]
    return [*charts, step_times(runs, comparison, looks), memory(comparison), loss_scales(runs, looks)]


def _all(runs: Mapping[str, Sequence[RunRecord]]) -> Iterable[RunRecord]:
    return (record for group in runs.values() for record in group)
