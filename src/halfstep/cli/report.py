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
    """Write one self-contained HTML page from run records: verdict, table, figures, environment."""
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
