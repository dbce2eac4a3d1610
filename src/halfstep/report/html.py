"""The report: one HTML file that needs nothing but itself, made from a comparison and its run records.

The page reads from the verdict down: result table, warnings and notices, figures, each run, environment, and
at the very end the comparison as JSON, so that the report is also the data. It has no script and loads
nothing; a content security policy in its head makes the browser hold it to that. Every word from a record
passes through the template's escaping; only the SVG drawn here and the stylesheet are inserted as they are.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from halfstep.compare import to_json
from halfstep.compare.result import Comparison, PolicyResult, Quality
from halfstep.record import RunRecord
from halfstep.report import environment, series, svg, wording
from halfstep.report.figures import Chart, loss_scales, losses, memory, step_times


def render(records: Sequence[RunRecord], comparison: Comparison) -> str:
    """The whole page.

    Args:
        records: the runs that ``comparison`` was made of.
        comparison: what is shown first and embedded as JSON; may lack a baseline, ratios or verdicts.
    """
    runs = series.runs_by_policy(records, comparison)
    looks = svg.looks(list(runs))
    pages = Environment(
        loader=PackageLoader("halfstep", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(typeset=_typeset, unbroken=_unbroken)
    pages.globals["wording"] = wording
    style = files("halfstep.report").joinpath("page.css").read_text(encoding="utf-8")
    return pages.get_template("page.html.jinja").render(
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
        style=Markup(style),
    )


def write(path: str | os.PathLike[str], records: Sequence[RunRecord], comparison: Comparison) -> Path:
    """Write the page to ``path``, whole or not at all: a failure leaves what was there before.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    # Words of a record that are not valid Unicode cannot be in a UTF-8 file; they become question marks.
    page = render(records, comparison).encode("utf-8", errors="replace")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:  # names the file that was asked for, not the temporary one
        raise OSError(error.errno, f"the report cannot be written here: {error.strerror}", str(path)) from error
    part = Path(name)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
        with os.fdopen(descriptor, "wb") as file:
            file.write(page)
        part.chmod(0o666 & ~_umask())  # mkstemp's own mode would keep others from reading the report
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    return path


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


def _typeset(text: str) -> str:
    """A number with a true minus sign in place of the hyphen."""
    return text.replace("-", "−")


def _unbroken(text: str) -> str:
    """Running text that breaks no line between a number and its percent or times sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ×", "\N{NO-BREAK SPACE}×")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
