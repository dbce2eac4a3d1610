"""``halfstep report``: run records to one offline HTML file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:  [bold]halfstep report halfstep-runs/gpt-20261123-101500[/]   ·   "
    "[bold]halfstep report a.jsonl b.jsonl --output report.html[/]"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(report)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run records, or folders of them.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    baseline: Annotated[str, typer.Option(help="The policy that the others are compared with.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON document.")] = False,
) -> None:
    """Write one self-contained HTML page from run records: verdict, table, figures, environment.

    The doctor.json of `halfstep doctor`, or its folder, becomes the doctor's page instead.
    """
    if len(runs) == 1 and (document := _diagnosis_in(runs[0])) is not None:
        _report_diagnosis(document, output, as_json)
        return
    from halfstep import record
    from halfstep.compare import CompareError, compare, to_json
    from halfstep.report import html

    records = [record.read(path) for path in record.find(runs)]
    known = sorted({name for r in records for name in (r.header.policy_requested, r.header.policy)})
    if baseline != "fp32" and baseline not in known:
        raise CompareError(f"no run of baseline {baseline!r} among these records; there are: {', '.join(known)}")
    comparison = compare(records, baseline=baseline)
    html.write(output, records, comparison)
    if as_json:
        print(json.dumps(to_json(comparison), indent=2))
    else:
        print(comparison.verdict)
    print(f"halfstep: report: {output}", file=sys.stderr)


def _diagnosis_in(path: Path) -> Path | None:
    """The doctor's document that ``path`` is or holds."""
    document = path / "doctor.json" if path.is_dir() else path
    return document if document.suffix == ".json" and document.is_file() else None


def _report_diagnosis(document: Path, output: Path, as_json: bool) -> None:
    from rich.console import Console

    from halfstep.doctor import diagnosis
    from halfstep.report import diagnosis as page
    from halfstep.report.findings_table import print_findings

    seen = diagnosis.read(document)
    page.write(output, seen)
    if as_json:
        print(json.dumps(seen.to_json(), allow_nan=False))
    else:
        print_findings(Console(highlight=False), seen.findings, policy=seen.policy, looked_at=page.looked_at(seen))
    print(f"halfstep: report: {output}", file=sys.stderr)
